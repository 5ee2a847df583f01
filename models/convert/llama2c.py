"""llama2.c's files: a trained Llama in one .bin (legacy float32 form), its vocabulary in another. All little-endian.

model.bin: seven int32 (dim, hidden, layers, heads, kv heads, vocabulary, length; a negative vocabulary means an untied
head), then float32 arrays. tokens.bin: int32 longest token, then per token float32 score, int32 length, bytes.
Its rotary embedding turns neighbours (2m, 2m + 1); ours turns halves (m, m + h/2), so rows of wq and wk are permuted.
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models.gpt.config import GPT, GPTConfig
from models.gpt.model import GPTForCausalLM
from models.parts.attention import Causal
from models.parts.mlp import SwiGLU
from models.parts.norm import RMSNorm
from models.parts.position import Rotary
from models.spec import ConfigError

BOS = 1
SPACE = "\u2581"  # SentencePiece's visible space
HEADER = struct.Struct("<7i")


def load(path: str | Path) -> GPTForCausalLM:
    """A model.bin as our model, float32. Raises ConfigError when the file is not as long as its header says."""
    data = Path(path).read_bytes()
    if len(data) < HEADER.size:
        raise ConfigError(f"{path} has {len(data)} bytes; a llama2.c header alone has {HEADER.size}")
    dim, hidden, layers, heads, kv_heads, vocab, length = HEADER.unpack_from(data)
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), length) < 1 or dim % heads or heads % kv_heads:
        raise ConfigError(f"{path} is no llama2.c model: its header reads {HEADER.unpack_from(data)}")
    h = dim // heads
    shapes = {
        "embedding": (abs(vocab), dim),
        "mixer_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_heads * h, dim),
        "wv": (layers, kv_heads * h, dim),
        "wo": (layers, dim, dim),
        "mlp_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "cos": (length, h // 2),  # rotary tables, not used
        "sin": (length, h // 2),
        "head": (0 if vocab > 0 else -vocab, dim),
    }
    expected = HEADER.size + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    if len(data) != expected:
        raise ConfigError(f"{path} has {len(data)} bytes, its header promises {expected}")
    flat = torch.from_numpy(np.frombuffer(data, "<f4", offset=HEADER.size).copy())
    w = dict(zip(shapes, flat.split([int(np.prod(s)) for s in shapes.values()]), strict=True))
    w = {name: w[name].view(shape) for name, shape in shapes.items()}

    spec = GPT(
        vocab_size=abs(vocab),
        d_model=dim,
        n_layers=layers,
        seq_len=length,
        attention=Causal(n_heads=heads, n_kv_heads=kv_heads),
        mlp=SwiGLU(hidden=hidden),
        norm=RMSNorm(eps=1e-5),
        position=Rotary(),
        tie_embeddings=vocab > 0,
    )
    state = {
        "embedding.weight": w["embedding"],
        "norm.weight": w["norm"],
        "head.weight": w["embedding"] if vocab > 0 else w["head"],
    }
    for i in range(layers):
        q, k = halves(w["wq"][i], heads), halves(w["wk"][i], kv_heads)
        state[f"blocks.{i}.mixer_norm.weight"] = w["mixer_norm"][i]
        state[f"blocks.{i}.mixer.qkv.weight"] = torch.cat([q, k, w["wv"][i]])
        state[f"blocks.{i}.mixer.out.weight"] = w["wo"][i]
        state[f"blocks.{i}.mlp_norm.weight"] = w["mlp_norm"][i]
        state[f"blocks.{i}.mlp.gate_up.weight"] = torch.cat([w["w1"][i], w["w3"][i]])
        state[f"blocks.{i}.mlp.down.weight"] = w["w2"][i]
    model = GPTForCausalLM(GPTConfig.of(spec))
    model.load_state_dict(state)
    return model.eval()


def halves(w: Tensor, heads: int) -> Tensor:
    """Rows of w [heads * h, D] from neighbouring pairs to pairs that lie half a head apart."""
    return w.view(heads, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)


class Pieces(NamedTuple):
    """A llama2.c vocabulary: the bytes and the merge score of each id."""

    pieces: list[bytes]
    scores: list[float]

    @classmethod
    def load(cls, path: str | Path, vocab_size: int) -> Pieces:
        """Reads tokens.bin. Raises ConfigError when it does not hold exactly `vocab_size` tokens."""
        data, at, pieces, scores = Path(path).read_bytes(), 4, [], []
        try:
            for _ in range(vocab_size):
                score, length = struct.unpack_from("<fi", data, at)
                piece = data[at + 8 : at + 8 + length]
                if length < 0 or len(piece) != length:
                    raise struct.error("a token ends behind the file")
                at += 8 + length
                pieces.append(piece)
                scores.append(score)
        except struct.error:
            raise ConfigError(f"{path} ends within token {len(pieces)} of {vocab_size}") from None
        if at != len(data):
            raise ConfigError(f"{path} holds more than the model's {vocab_size} tokens")
        return cls(pieces, scores)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The same vocabulary as a Hugging Face tokenizer: BPE with byte fallback, start token added."""
        text = [piece.decode("utf-8", "replace").replace(" ", SPACE) for piece in self.pieces]
        text[:3] = ["<unk>", "<s>", "</s>"]
        vocab = {piece: i for i, piece in reversed(list(enumerate(text)))}
        pairs = [
            (-self.scores[vocab[piece]], a, b)
            for piece in vocab
            if not (piece.startswith("<") and piece.endswith(">"))
            for cut in range(1, len(piece))
            if (a := piece[:cut]) in vocab and (b := piece[cut:]) in vocab
        ]
        model = models.BPE(vocab, [(a, b) for _, a, b in sorted(pairs)], unk_token="<unk>", byte_fallback=True)
        backend = Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, **special, model_input_names=["input_ids", "attention_mask"]
        )

    def decode(self, ids: list[int]) -> bytes:
        """The text of ids, as llama2.c prints it: a space right after the start token is dropped."""
        out, previous = b"", -1
        for i in ids:
            piece = self.pieces[i]
            if previous == BOS and piece.startswith(b" "):
                piece = piece[1:]
            if len(piece) == 6 and piece.startswith(b"<0x") and piece.endswith(b">"):
                piece = bytes([int(piece[3:5], 16)])
            if i != BOS:
                out += piece
            previous = i
        return out

    def encode(self, text: str) -> list[int]:
        """Start token, a space, and greedy merges by score, as llama2.c does it; unknown characters become bytes."""
        index = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}
        ids: list[int] = []
        for char in f" {text}" if text else "":
            raw = char.encode()
            ids.extend([index[raw]] if raw in index else [byte + 3 for byte in raw])
        while True:
            pairs = [
                (self.scores[index[merged]], -k, index[merged])
                for k, (a, b) in enumerate(itertools.pairwise(ids))
                if (merged := self.pieces[a] + self.pieces[b]) in index
            ]
            if not pairs:
                return [BOS, *ids]
            _, k, merged_id = max(pairs)
            ids[-k : -k + 2] = [merged_id]
