"""Tiny models and tokenizers for the tests of serving: made in milliseconds, with real structure."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from models.convert import llama2c
from models.families import create
from models.gpt.config import GPT
from models.parts.attention import Causal
from models.parts.position import Rotary

TEXT = """The grey cat sat on the mat. «Où est le chat?» Das Mädchen läuft über die Brücke. 你好，世界！ こんにちは 🙂🙃
Once upon a time there was a tiny model that said: hello, hello, hello. def f(x): return x + 1\n"""
END = "<|endoftext|>"


def byte_level_tokenizer(vocab_size: int = 300, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """GPT-2's kind: BPE over bytes, so that tokens may be parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)
    fast.chat_template = chat_template
    return fast


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: words begin with a space mark, unknown characters fall back to single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "▁the", "▁cat", "t", "h", "e", "c", "a", "s", "▁s", "at", "é", "你", ".", "\n"]
    vocab = {p: i for i, p in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "t")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind: its decoder joins `##` pieces and puts spaces between words."""
    letters = sorted(set(TEXT) - set(" \n"))
    pieces = ["[UNK]", "the", "cat", *letters, *(f"##{c}" for c in letters)]
    tokenizer = Tokenizer(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def stories_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The vocabulary of llama2.c's small models: SentencePiece pieces, merged in the order of their scores."""
    pieces = llama2c.Pieces.load(path, 512)
    names = ["<unk>", "<s>", "</s>", *(p.decode().replace(" ", "▁") for p in pieces.pieces[3:])]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [
        (name[:k], name[k:])
        for _, name in sorted(zip(pieces.scores[259:], names[259:], strict=True), reverse=True)
        for k in range(1, len(name))
        if name[:k] in vocab and name[k:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gpt(vocab_size: int = 300, seq_len: int = 64, init_std: float = 0.5, **options):
    """A random GPT whose large weights make its greedy text wander instead of repeating one token."""
    torch.manual_seed(0)
    attention = Causal(n_heads=4, n_kv_heads=2, window=options.pop("window", None))
    spec = GPT(
        vocab_size=vocab_size,
        d_model=options.pop("d_model", 32),
        n_layers=options.pop("n_layers", 2),
        seq_len=seq_len,
        attention=attention,
        init_std=init_std,
        position=options.pop("position", Rotary()),
        **options,
    )
    return create(spec).eval()


def foreign(kind: str, vocab_size: int = 300):
    """An unmodified transformers model of random weights."""
    torch.manual_seed(0)
    shapes = {
        "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "gemma3_text": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, initializer_range=0.5, **shapes[kind], **ends)
    return AutoModelForCausalLM.from_config(config).eval()
