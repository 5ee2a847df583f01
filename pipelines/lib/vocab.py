r"""Tokenizers: trained, converted or loaded, always kept as one Hugging Face folder; and the fastest way to encode.

A stage's `tokenizer` setting is a name, a path or a mapping, one of `Vocabulary.kinds`:

    tokenizer={kind: bpe, vocab_size: 4096}     byte-level BPE, trained on the corpus by rustbpe
    tokenizer=bytes    tokenizer=chars          an id per byte; an id per character, as nanoGPT numbers them
    tokenizer={kind: chars, beside: [case]}     characters and streams beside them (pipelines.lib.streams)
    tokenizer=r50k_base.tiktoken                OpenAI's rank files
    tokenizer=spm.model                         SentencePiece, unigram or BPE
    tokenizer=tokenizer.json | FOLDER | gpt2    anything of Hugging Face: a file, a folder, a name on the Hub

`load_tokenizer(folder)` is what every other stage calls. `Encoder(folder)` is what the tokenisation itself uses: it
knows no transformers and picks, by the form of tokenizer.json, the fastest backend that gives the same ids:

    tokenizer of                   backend         M tokens/s   tokenizers' own encode_batch_fast
    bytes                          numpy                2,400     6.9
    characters                     numpy                  270     1.9
    BPE, GPT-2's pattern           tiktoken               2.6     0.8
    BPE, cl100k's and o200k's      kitoken                3.7     0.7    (without kitoken: tiktoken 2.5)
    SentencePiece unigram          sentencepiece          7.2     0.7
    SentencePiece BPE              sentencepiece          2.0     1.0
    others                         tokenizers             0.8     0.8

One core of a busy machine, in CPU seconds, documents of 4,000 characters of English books (benchmarks/tokenize.py and
its results, with further backends; on a quiet machine tiktoken reaches 4.3 to 5.4). SentencePiece models that rewrite
text (NFKC) are encoded by tokenizers.
A backend is proven when it is chosen, on PROBES, on 2,000 strings made of what tokenizers part in different ways and on
the corpus's own beginning, and again on the first document of every unit of work; one that differs is not used. (So
kitoken 0.11, which parts `\n's` in another way than GPT-2's pattern, serves the patterns cl100k and o200k only.)
"""

from __future__ import annotations

import base64
import difflib
import functools
import heapq
import io
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from models.spec import ConfigError, Part, near
from pipelines.lib import hub, streams
from pipelines.lib.config import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SENTENCEPIECE = "sentencepiece.model"  # a model's own file, in the folder of the tokenizer made from it

# Where text is split before BPE, as `tokenizers` takes it and, equal in what it matches, as tiktoken runs fastest
# (possessive: 4.3 against 3.3 M tokens/s). Source: GPT-2's encoder.py; tiktoken_ext/openai_public.py.
PATTERNS = {
    "gpt2": (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    ),
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s",
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
    * 2,
}


# ---- the kinds -------------------------------------------------------------------------------------------------------


class Vocabulary(Part):
    """How text becomes ids. `make(sample)` gives the Hugging Face tokenizer, trained on `sample()` if it must be."""

    kinds: ClassVar[dict[str, type]]
    reads_corpus: ClassVar[Literal["nothing", "sample", "everything"]] = "nothing"

    def make(self, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerFast:
        raise NotImplementedError


@dataclass(frozen=True)
class BPE(Vocabulary):
    """Byte-level BPE trained on a sample of the corpus: 256 bytes, merges, and the end-of-text token as last id.

    trainer: rustbpe is the fastest (17 MB/s on one core, tokenizers 7); `exact` breaks ties by the bytes of the pair
    (the greater one first), as the published reference merges do, in plain Python.

    vocab_size: number of ids, at least 257
    pattern: how text is split before merging [gpt2, cl100k, o200k, or a regular expression]
    trainer: which library counts and merges
    sample_mb: megabytes (2^20 bytes) of the corpus to train on, spread evenly over it
    """

    reads_corpus: ClassVar[Literal["nothing", "sample", "everything"]] = "sample"
    vocab_size: int = 4096
    pattern: str = "gpt2"
    trainer: Literal["rustbpe", "tokenizers", "exact"] = "rustbpe"
    sample_mb: float = 64

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: byte-level BPE needs at least 257 (256 bytes, end of text)"
            )
        if self.sample_mb <= 0:
            raise ConfigError(f"sample_mb={self.sample_mb} must be above 0")
        check_pattern(self.pattern)

    def make(self, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerFast:
        pattern = PATTERNS.get(self.pattern, (self.pattern,))[0]
        merges = train_bpe(texts(), self.vocab_size - 1, pattern, self.trainer)
        return hf_tokenizer(byte_level(merges, pattern), END_OF_TEXT)


@dataclass(frozen=True)
class Bytes(Vocabulary):
    """An id per byte (id = its value), and the end-of-text token as id 256."""

    def make(self, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE({character: byte for byte, character in BYTE_CHARACTERS.items()}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return hf_tokenizer(tokenizer, END_OF_TEXT)


@dataclass(frozen=True)
class Chars(Vocabulary):
    """An id per character that the corpus has, in code point order: nanoGPT's character ids.

    end_of_text: add an end-of-text token as last id (nanoGPT has none)
    beside: streams beside the characters, for model.embedding=streams [case, class, word_position]
    """

    reads_corpus: ClassVar[Literal["nothing", "sample", "everything"]] = "everything"
    end_of_text: bool = False
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        streams.check_annotators(self.beside)

    def make(self, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerFast:
        seen: set[str] = set()
        for text in texts():
            seen.update(text)
        return chars_tokenizer(sorted(seen), END_OF_TEXT if self.end_of_text else None, self.beside)


@dataclass(frozen=True)
class SentencePiece(Vocabulary):
    """A SentencePiece model, unigram or BPE.

    path: the .model file
    """

    path: str

    def make(self, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerFast:
        return from_sentencepiece(existing(self.path))


@dataclass(frozen=True)
class Tiktoken(Vocabulary):
    """An OpenAI rank file: a base64 token and its rank per line.

    path: the .tiktoken file
    pattern: how text is split; by default by the file's name [auto, gpt2, cl100k, o200k, or a regular expression]
    """

    path: str
    pattern: str = "auto"

    def __post_init__(self) -> None:
        check_pattern(self.pattern)

    def make(self, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerFast:
        return from_tiktoken(existing(self.path), self.pattern)


@dataclass(frozen=True)
class HuggingFace(Vocabulary):
    """A tokenizer.json, a folder (also GPT-2's encoder.json + vocab.bpe, or of shards or a model), or a Hub name.

    path: file, folder or name
    revision: which version of a Hub name
    """

    path: str
    revision: str | None = None

    def make(self, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.path, self.revision)


Vocabulary.kinds = {
    "bpe": BPE,
    "bytes": Bytes,
    "chars": Chars,
    "sentencepiece": SentencePiece,
    "tiktoken": Tiktoken,
    "hf": HuggingFace,
}


def vocabulary(setting: Vocabulary | str) -> Vocabulary:
    """A `tokenizer` setting as a kind: a name of a kind as it is, any other word as a path by its ending."""
    if isinstance(setting, Vocabulary):
        return setting
    if setting in ("bpe", "bytes", "chars"):
        return Vocabulary.kinds[setting]()
    if setting in Vocabulary.kinds:
        raise ConfigError(f"tokenizer={setting}: a path is needed, as in tokenizer={{kind: {setting}, path: FILE}}")
    suffix = Path(setting).suffix
    if suffix == ".model":
        return SentencePiece(setting)
    return Tiktoken(setting) if suffix == ".tiktoken" else HuggingFace(setting)


def _of_word(word: str) -> Vocabulary:
    """`{kind: WORD, ...}` where WORD is no kind: a path or Hub name, unless it can only be a slip of the pen."""
    if not Path(word).exists() and (close := near(word, Vocabulary.kinds)).startswith("; did you"):
        raise ConfigError(f"tokenizer kind {word!r} does not exist{close}")
    return vocabulary(word)


Vocabulary.of_word = staticmethod(_of_word)


def check_pattern(pattern: str) -> None:
    """Raises ConfigError unless `pattern` is a name of PATTERNS, "auto", or a well-formed regular expression."""
    if pattern in PATTERNS or pattern == "auto":
        return
    from tokenizers import Regex

    try:
        Regex(pattern)
    except Exception as error:  # a bare Exception, by that library's design
        raise ConfigError(
            f"pattern={pattern!r} is neither one of {', '.join(PATTERNS)} nor a regular expression: {error}"
        ) from None


def existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"tokenizer {path}: no such file")
    return Path(path)


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer at `path` as a Hugging Face fast tokenizer.

    path: a folder that `save_pretrained` wrote, or that holds one in tokenizer/ (shards), vocab.json + merges.txt or
    encoder.json + vocab.bpe; a tokenizer.json, .model or .tiktoken file; else a name on the Hugging Face Hub.
    Never runs code from the folder. Raises InputError.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path)
    if folder.suffix == ".model":
        return from_sentencepiece(existing(folder))
    if folder.suffix == ".tiktoken":
        return from_tiktoken(existing(folder))
    try:
        if folder.is_file():
            return hf_tokenizer(read_tokenizer_json(folder), None)
        if (folder / "tokenizer").is_dir():
            folder = folder / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            if (folder / "tokenizer_config.json").is_file():
                return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            return hf_tokenizer(read_tokenizer_json(folder / "tokenizer.json"), None)
        for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (folder / vocab).is_file() and (folder / merges).is_file():
                return from_vocab_and_merges(folder / vocab, folder / merges)
        for name in ("tokenizer.model", SENTENCEPIECE):
            if (folder / name).is_file():
                return from_sentencepiece(folder / name)
        if folder.exists() or Path(path).is_absolute() or str(path).startswith((".", "~")):
            raise InputError(f"tokenizer {path}: no tokenizer.json, vocab.json + merges.txt or tokenizer.model here")
        answer = hub.ask("model", str(path))
        if answer == "missing":
            raise InputError(_no_tokenizer(path, "the Hub has none of that name"))
        try:
            loaded: Any = AutoTokenizer.from_pretrained(
                str(path),
                revision=revision or "main",
                trust_remote_code=False,
                local_files_only=answer == "unreachable",
            )
        except Exception:
            if answer == "there":
                raise
            said = "the Hub cannot be reached, and nothing of that name was loaded before"
            raise InputError(_no_tokenizer(path, said)) from None
        if not isinstance(loaded, PreTrainedTokenizerFast):
            raise InputError(f"tokenizer {path}: {type(loaded).__name__} has no fast form (tokenizer.json)")
        return loaded
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, the Hub several kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(_no_tokenizer(path, first)) from None


def _no_tokenizer(path: str | Path, said: str) -> str:
    """The error for a word that names no tokenizer, with the nearest kind, file or Hub name that there is."""
    parent = Path(path).parent
    here = [str(p) for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(str(path), [*Vocabulary.kinds, *here, *hub.loaded_names("model"), "gpt2"], 1)
    nearest = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"tokenizer {path}: neither a kind ({', '.join(Vocabulary.kinds)}) nor a readable file, folder or Hub name: "
        f"{said}{nearest}"
    )


def read_tokenizer_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # a bare Exception, by that library's design
        raise InputError(f"{path}: expected a tokenizer.json, found {str(error).splitlines()[0]}") from None


def hf_tokenizer(tokenizer: Tokenizer, eot: str | None) -> PreTrainedTokenizerFast:
    """A `tokenizers` tokenizer as a transformers one. eot: its end-of-text token; None: the one that it has, if any."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    special: dict[str, str] = {}
    if eot is not None:
        tokenizer.add_special_tokens([AddedToken(eot, special=True, normalized=False)])
        special = {"bos_token": eot, "eos_token": eot}
    else:
        known = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        names = {
            "eos_token": (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]"),
            "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", END_OF_TEXT, "[CLS]"),
            "unk_token": ("<unk>", "[UNK]"),
            "pad_token": ("<pad>", "[PAD]", "<|padding|>"),
        }
        special = {
            role: name for role, choice in names.items() if (name := next((c for c in choice if c in known), ""))
        }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def end_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that ends a document: the tokenizer's eos token, None if it has none."""
    return tokenizer.eos_token_id


# ---- byte-level BPE --------------------------------------------------------------------------------------------------


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins: {byte: character}; printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(rest)}


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}


def printable(piece: bytes) -> str:
    return "".join(BYTE_CHARACTERS[b] for b in piece)


def byte_level(
    merges: Sequence[tuple[bytes, bytes]],
    pattern: str,
    vocab: dict[str, int] | None = None,
    ignore_merges: bool = False,
) -> Tokenizer:
    """Byte-level BPE as a `tokenizers` tokenizer. Without `vocab`, ids are the 256 bytes, then the merges in order."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if vocab is None:
        vocab = {printable(bytes([b])): b for b in range(256)}
        for a, b in merges:
            vocab.setdefault(printable(a + b), len(vocab))
    pairs = [(printable(a), printable(b)) for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=ignore_merges))
    if pattern == PATTERNS["gpt2"][0]:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # that very pattern
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str, trainer: str) -> list[tuple[bytes, bytes]]:
    """Learn vocab_size - 256 merges (fewer if the text has no more pairs). Returns them as pairs of byte strings."""
    if trainer == "rustbpe":
        import rustbpe

        model = rustbpe.Tokenizer()
        try:
            model.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
        except ValueError as error:  # its regular expressions are not quite those of tokenizers
            if "regex" not in str(error).lower():
                raise
            raise ConfigError(f"pattern={pattern!r}: rustbpe says {error}; try trainer=tokenizers") from None
        return merges_of({bytes(piece): rank for piece, rank in model.get_mergeable_ranks()})
    if trainer == "tokenizers":
        from tokenizers import pre_tokenizers, trainers

        tokenizer = byte_level([], pattern)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            iter(texts), trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        )
        return [(_raw(a), _raw(b)) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]
    return exact_bpe(texts, vocab_size - 256, pattern)


def _raw(piece: str) -> bytes:
    return bytes(CHARACTER_BYTES[c] for c in piece)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that made each token of a rank table, in rank order: what BPE with the lower ranks leaves of it."""
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) == 1:
            continue
        parts = [bytes([b]) for b in piece]
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if best >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:  # else no chain of lower ranks leads to it; it can match as a whole only
            merges.append((parts[0], parts[1]))
    return merges


def exact_bpe(texts: Iterable[str], n_merges: int, pattern: str) -> list[tuple[bytes, bytes]]:
    """BPE whose ties are defined: among the most frequent pairs the lexicographically greatest pair of byte strings.

    Plain Python with counts kept up to date, so it repeats published merges anywhere; the libraries break ties by the
    order in which they met the pairs.
    """
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    words: Counter[str] = Counter()
    for text in texts:
        words.update(piece for piece, _ in split.pre_tokenize_str(text))
    pieces = [[bytes([b]) for b in word.encode()] for word in words]
    weights = list(words.values())
    counts: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = {}
    for i, parts in enumerate(pieces):
        for pair in itertools.pairwise(parts):
            counts[pair] += weights[i]
            where.setdefault(pair, set()).add(i)
    # A heap of every count that a pair has had; an entry that is no longer its pair's count is passed over.
    heap = [(-n, _descending(pair), pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        n, _, best = heapq.heappop(heap)
        if counts.get(best) != -n:
            continue
        merges.append(best)
        changed: set[Pair] = set()
        for i in where.pop(best):
            parts, weight = pieces[i], weights[i]
            merged, at = [], 0
            while at < len(parts):
                if tuple(parts[at : at + 2]) == best:
                    merged.append(parts[at] + parts[at + 1])
                    at += 2
                else:
                    merged.append(parts[at])
                    at += 1
            for pair in itertools.pairwise(parts):
                counts[pair] -= weight
                changed.add(pair)
            for pair in itertools.pairwise(merged):
                counts[pair] += weight
                where.setdefault(pair, set()).add(i)
                changed.add(pair)
            pieces[i] = merged
        for pair in changed:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], _descending(pair), pair))
            else:
                del counts[pair]
    return merges


Pair = tuple[bytes, bytes]


def _descending(pair: Pair) -> tuple[tuple[int, ...], ...]:
    """A key that sorts pairs of byte strings from the greatest to the least; a longer string is the greater one."""
    return tuple((*(255 - b for b in part), 256) for part in pair)


def from_vocab_and_merges(vocab: Path, merges: Path) -> PreTrainedTokenizerFast:
    """GPT-2's two files (vocab.json or encoder.json, merges.txt or vocab.bpe) as a tokenizer."""
    ids = json.loads(vocab.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{merges}: expected two tokens a line")
    eot = END_OF_TEXT if END_OF_TEXT in ids else None
    return hf_tokenizer(byte_level([(_raw(a), _raw(b)) for a, b in pairs], PATTERNS["gpt2"][0], ids), eot)


def from_tiktoken(path: Path, pattern: str = "auto") -> PreTrainedTokenizerFast:
    """A .tiktoken rank file as a tokenizer: same ids, end of text as the next free id. Raises InputError."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
    except ValueError as error:
        raise InputError(f"{path}: expected a base64 token and a rank per line, found {error}") from None
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing or len(set(ranks.values())) != len(ranks):
        raise InputError(f"{path}: expected every byte as a token and every rank once; byte {missing[:1]} is missing")
    if pattern == "auto":
        name = next((n for n in ("o200k", "cl100k") if n in path.name), None)
        name = name or ("gpt2" if re.search("r50k|p50k|gpt2", path.name) else None)
        if name is None:
            raise InputError(
                f"{path}: no pattern is known for a file of this name; give {{kind: tiktoken, pattern: ...}}"
            )
        pattern = name
    pattern = PATTERNS.get(pattern, (pattern,))[0]
    vocab = {printable(piece): rank for piece, rank in ranks.items()}
    return hf_tokenizer(byte_level(merges_of(ranks), pattern, vocab, ignore_merges=True), END_OF_TEXT)


# ---- characters, SentencePiece ---------------------------------------------------------------------------------------


def chars_tokenizer(
    chars: Sequence[str], eot: str | None = None, beside: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """An id per character, in the order given. Encoding a character that is not in the list raises.

    beside: annotators (pipelines.lib.streams) of further streams in the same ids.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if beside:
        pieces = [*chars, eot] if eot else list(chars)
        sizes = (len(pieces), *(streams.ANNOTATORS[name].size for name in beside))
        last = (eot, len(chars)) if eot else None
        return hf_tokenizer(streams.tokenizer_of(pieces, sizes, decoders.Fuse(), beside, last), eot)
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token="<unknown character>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return hf_tokenizer(tokenizer, eot) if eot else hf_tokenizer(tokenizer, None)


def characters(tokenizer: PreTrainedTokenizerFast) -> list[str] | None:
    """The characters of a tokenizer that `chars_tokenizer` made, by id; None for every other tokenizer."""
    return _characters(json.loads(tokenizer.backend_tokenizer.to_str()))


def _characters(tree: dict[str, Any]) -> list[str] | None:
    model = tree["model"]
    if model["type"] != "WordLevel" or tree["normalizer"] or any(len(c) != 1 for c in model["vocab"]):
        return None
    split = tree["pre_tokenizer"] or {}
    if split.get("type") != "Split" or split["pattern"] != {"Regex": r"[\s\S]"}:
        return None
    chars = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return chars if sorted(model["vocab"].values()) == list(range(len(chars))) else None


def from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """A SentencePiece .model (unigram or BPE) as a fast tokenizer with the same ids. Raises InputError.

    Proven on PROBES against the sentencepiece library; a model whose rules have no equal here is refused. Many models
    rewrite text (NFKC, spaces, no newlines), so that decoding does not give it back; in these, `tokenizers` 0.23 drops
    a combining mark or joiner that follows a rewritten character, which SentencePiece keeps, and so do we, since the
    saved tokenizer decides.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as protocol
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto: Any = protocol.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
        reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # DecodeError, RuntimeError, OSError
        raise InputError(f"{path}: expected a SentencePiece model, found {str(error).splitlines()[0]}") from None
    kind, rules = proto.trainer_spec.model_type, proto.normalizer_spec
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    plain = {p.piece: i for i, p in enumerate(proto.pieces)}
    byte_fallback = proto.trainer_spec.byte_fallback
    if kind == 1:
        model: Any = models.Unigram(scores, unk_id=proto.trainer_spec.unk_id, byte_fallback=byte_fallback)
    elif kind == 2:
        unknown = proto.trainer_spec.unk_piece
        model = models.BPE(
            plain, _merges_by_score(proto), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback
        )
    else:
        raise InputError(f"{path}: a SentencePiece model of type {kind}; unigram (1) and BPE (2) are read")
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    splits = []
    if not any("▁" in p.piece[1:] for p in proto.pieces if p.type == 1):  # no piece crosses a space: words are apart
        splits.append(pre_tokenizers.Split("▁", "merged_with_next"))
    if kind == 1:
        # SentencePiece never finds a control or byte piece in a text, this Unigram would: so such a string is parted.
        hidden = [p.piece for p in proto.pieces if p.type not in (1, 4, 6) and len(p.piece) > 1]
        inside = [f"(?<={re.escape(p[0])})(?={re.escape(p[1:])})" for p in hidden] + ["(?<=<)(?=0x[0-9A-F]{2}>)"]
        splits.append(pre_tokenizers.Split(Regex("|".join(inside)), "isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    pieces: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*pieces, decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else pieces)
    added = [AddedToken(p.piece, special=p.type == 3, normalized=False) for p in proto.pieces if p.type in (3, 4)]
    tokenizer.add_tokens([t for t in added if not t.special])
    tokenizer.add_special_tokens([t for t in added if t.special])
    tokenizer.encode_special_tokens = True
    different = [t for t in PROBES if tokenizer.encode(t, add_special_tokens=False).ids != reference.encode(t)]
    if different:
        raise InputError(
            f"{path}: this model has rules with no equal in a fast tokenizer; it differs on {different[0]!r}"
        )
    tokenizer.encode_special_tokens = False
    made = hf_tokenizer(tokenizer, None)
    made.sentencepiece_model = path.read_bytes()
    return made


def _merges_by_score(proto: Any) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model: every way to put a piece together, the best piece first."""
    ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == 1}
    merges = []
    for piece, _ in sorted(ids.items(), key=lambda item: (-proto.pieces[item[1]].score, item[1])):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted((c for c in cuts if c[0] in ids and c[1] in ids), key=lambda c: (ids[c[0]], ids[c[1]]))
    return merges


# ---- what each id stands for -----------------------------------------------------------------------------------------


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """int32 [V]: UTF-8 bytes of text behind each id; 0 for special tokens, so that bits per byte count text only.

    Exact for bytes, characters, byte-level BPE and SentencePiece without normalisation; for tokenizers that rewrite
    text (lower case, NFKC) it is the length of what they decode to. Of several streams, the first one's.
    """
    backend = tokenizer.backend_tokenizer
    tree = json.loads(backend.to_str())
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    first_stream = streams.bare if streams.find(tree) is not None else str
    size = max([*backend.get_vocab(with_added_tokens=True).values(), -1]) + 1
    table = np.zeros(size, np.int32)
    decoder = json.dumps(tree.get("decoder") or {})
    byte_level_decoder, word_piece = '"ByteLevel"' in decoder, '"WordPiece"' in decoder
    for word, i in backend.get_vocab(with_added_tokens=True).items():
        piece = first_stream(word)
        if piece in special:
            table[i] = 0
        elif byte_level_decoder:
            table[i] = sum(1 if c in CHARACTER_BYTES else len(c.encode()) for c in piece)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            table[i] = 1
        elif word_piece:
            table[i] = len(piece[2:].encode()) if piece.startswith("##") else len(piece.encode()) + 1
        else:
            table[i] = len(piece.replace("▁", " ").encode())
    for i, token in backend.get_added_tokens_decoder().items():
        if not token.special:
            table[i] = len(token.content.encode())
    model = tree["model"]
    unknown = model.get("unk_token") or (
        model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
    )
    if unknown is not None and (unknown_id := backend.token_to_id(unknown)) is not None:
        table[unknown_id] = 0
    return table


# ---- encoding --------------------------------------------------------------------------------------------------------

# Texts that tell tokenizers apart: contractions, runs of spaces and newlines, scripts, marks, emoji, controls, numbers.
PROBES = (
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "don't we'll I'VE they'd it's 'tis ’s",
    "a  b   c    d\n\n\ne\t\tf \n g\r\n\r\nh \n\n  i",
    "1234567890 3.14159 1,000,000 ½ ² ٣ 五",
    "naïve café Ångström ﬁne Straße ΑΒΓ привет שלום مرحبا हिन्दी ไทย 日本語テキスト 中文。한국어",
    "e\u0301 vs é, a\u200bb, x\u00a0y, z\u3000w, \ufeffbom, soft\u00adhyphen",
    "🙂👩‍👩‍👧‍👦🇫🇷 ✈️ 𝔘𝔫𝔦 \U0001f9ff",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass\n",
    "http://example.org/a?b=c&d=%20e_f-g--h___i...!!!???",
    "control \x00\x01\x1b[0m\x7f\x85\u2028\u2029 end",
    END_OF_TEXT + "text with <|endoftext|> inside</s><s>[SEP]<unk>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "$$$$ €€ ¥¥ ££ ©®™ ±×÷ ∑∫√ ≤≥ →←",
    "\n's a\r\n't\u3000'll\t're ''s 'S",
)
PARTS = (
    *"a b the ing 's 'T 'll ’s 1 23 ½ ٣ é e\u0301 ß İ ǅ ʰ ः 中 文。 日本 🙂 \u200d _ / - ... !".split(" "),
    *(END_OF_TEXT, "\x00", "\x1c", "\ufeff", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028"),
)


def hard_texts(n: int = 2000) -> list[str]:
    """n strings of up to 40 parts on whose borders tokenizers have been seen to differ; always the same ones."""
    rng = random.Random(0)
    return ["".join(rng.choice(PARTS) for _ in range(rng.randrange(1, 40))) for _ in range(n)]


CHUNK = 1 << 16  # characters given to a backend at once, so that a document of any length needs little memory
LONGEST_RUN = 1 << 20  # characters without a place where text may be parted without changing ids
LONGEST_WHOLE = 1 << 22  # characters in a document whose tokenizer cannot take it in parts
# Between a letter or digit and white space, or between a line's end and a letter, every pattern of PATTERNS begins a
# new piece whatever stands around, so encoding may part there.
SEAM = re.compile(r"(?<=[^\W_])(?=[ \n\t\r])|(?<=\S\n)(?=[^\W_])")


class Encoder:
    """Text to ids by the fastest backend that gives the ids of the tokenizer in `folder`.

    backend: "auto" finds and proves it (on PROBES and `sample`); a name from an earlier choice skips the proof.
    Text is text: the characters of a special token in a document are encoded like any others.
    `cuts` counts the places where a document had to be parted although that may change ids: runs of more than 2^20
    characters without a seam, or documents of more than 2^22 for a tokenizer that has no seams.
    """

    def __init__(self, folder: str | Path, backend: str = "auto", sample: Iterable[str] = ()) -> None:
        path = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
        self.tokenizer = read_tokenizer_json(path)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        tree = json.loads(path.read_text(encoding="utf-8"))
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.cuts = 0
        found = streams.find(tree)
        self.sizes = [] if found is None else list(found.sizes)  # of the streams that its ids are made of, if several
        if found is not None and not found.beside:
            raise InputError(
                f"{path}: text alone does not give these ids, which stand for other streams beside it; join the tokens "
                "of each with `python -m pipelines.tokenize streams`"
            )
        self.parts, self.seams = _makes_parts(tree)
        candidates: dict[str, Callable[[dict[str, Any]], Callable[[str], np.ndarray] | None]] = {
            "numpy": _numpy_backend,
            "kitoken": _kitoken_backend,
            "tiktoken": _tiktoken_backend,
            "sentencepiece": lambda tree: _sentencepiece_backend(path.with_name(SENTENCEPIECE)),
        }
        self.backend = "tokenizers"
        self._encode: Callable[[str], np.ndarray] = self.reference
        if backend == "auto":
            texts = [*PROBES, *hard_texts(), *sample]
            for name, make in candidates.items():
                encode = make(tree)
                if encode is not None and all(self._same(encode, text) for text in texts):
                    self.backend, self._encode = name, encode
                    break
        elif backend != "tokenizers":
            made = candidates[backend](tree)
            if made is None:
                raise InputError(f"{path}: {backend} cannot encode for this tokenizer")
            self.backend, self._encode = backend, made

    def __call__(self, text: str) -> np.ndarray:
        """The ids of one document, [N] of an unsigned type. Raises InputError for a character with no id."""
        if len(text) <= CHUNK or self.backend == "numpy":
            return self._encode(text)
        if not self.seams:
            pieces = [text[i : i + LONGEST_WHOLE] for i in range(0, len(text), LONGEST_WHOLE)]
            self.cuts += len(pieces) - 1
        else:
            pieces = self._split_at_seams(text)
        return np.concatenate([self._encode(piece) for piece in pieces])

    def reference(self, text: str) -> np.ndarray:
        """The ids that the tokenizers library gives for a text that is not parted."""
        try:
            return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)
        except Exception as error:  # a bare Exception, by that library's design
            raise InputError(f"the tokenizer cannot encode {text[:40]!r}: {error}") from None

    def audit(self, text: str) -> bool:
        """Whether the backend gives the tokenizer's own ids for the beginning of a text; cheap enough to repeat."""
        seam = SEAM.search(text, 2048)
        text = text[: seam.start()] if seam and self.seams else text[:2048]
        return self.backend == "tokenizers" or self._same(self._encode, text)

    def _same(self, encode: Callable[[str], np.ndarray], text: str) -> bool:
        try:
            expected = self.reference(text)
        except InputError:
            return True  # a character with no id: there is nothing to compare
        try:
            return np.array_equal(encode(text), expected)
        except InputError:
            return False

    def _split_at_seams(self, text: str) -> list[str]:
        pieces, start = [], 0
        while len(text) - start > CHUNK:
            seam = SEAM.search(text, start + CHUNK, start + LONGEST_RUN)
            end = seam.start() if seam else min(start + LONGEST_RUN, len(text))
            self.cuts += seam is None and end < len(text)
            pieces.append(text[start:end])
            start = end
        return [*pieces, text[start:]] if start < len(text) else pieces


def _makes_parts(tree: dict[str, Any]) -> tuple[str | None, bool]:
    """(the pattern of a byte-level BPE tokenizer.json or None, whether its text may be parted at SEAM)."""
    steps = tree["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if tree["model"]["type"] != "BPE" or tree["normalizer"] or steps[-1].get("type") != "ByteLevel":
        return None, False
    if steps[-1].get("add_prefix_space"):
        return None, False
    if len(steps) == 1:
        pattern = PATTERNS["gpt2"][0] if steps[0].get("use_regex", True) else None
    elif len(steps) == 2 and steps[0].get("type") == "Split" and not steps[-1].get("use_regex", True):
        split = steps[0]
        is_plain = split["behavior"] == "Isolated" and not split.get("invert") and "Regex" in split["pattern"]
        pattern = split["pattern"]["Regex"] if is_plain else None
    else:
        pattern = None
    return pattern, pattern in {p for p, _ in PATTERNS.values()}


def _numpy_backend(tree: dict[str, Any]) -> Callable[[str], np.ndarray] | None:
    """Bytes and characters need no search: their ids are a view of the text, or one look-up each."""
    if any(not token["special"] for token in tree["added_tokens"]):
        return None
    steps = tree["pre_tokenizer"] or {}
    model = tree["model"]
    if model["type"] == "BPE" and not model["merges"] and not tree["normalizer"]:
        whole = steps.get("type") == "ByteLevel" and not steps.get("use_regex", True)
        by_value = all(model["vocab"].get(c) == b for b, c in BYTE_CHARACTERS.items())
        if not whole or not by_value or steps.get("add_prefix_space"):
            return None
        return lambda text: np.frombuffer(text.encode(), np.uint8)
    found = streams.find(tree)
    if found is not None:
        characters = [piece for piece in found.pieces if len(piece) == 1]  # behind them an end-of-text token may be
        return streams.encoder(found, _by_table(characters)) if found.beside else None
    chars = _characters(tree)
    return None if chars is None else _by_table(chars)


def _by_table(chars: Sequence[str]) -> Callable[[str], np.ndarray]:
    """Text -> the place of each character in `chars`, [N] uint32."""
    table = np.full(max(map(ord, chars), default=0) + 2, -1, np.int32)  # the last place is for all beyond
    table[[ord(c) for c in chars]] = np.arange(len(chars))

    def encode(text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = table[np.minimum(points, len(table) - 1)]
        if ids.min(initial=0) < 0:
            missing = text[int(np.argmin(ids))]
            raise InputError(f"the tokenizer has no id for the character {missing!r} (U+{ord(missing):04X})")
        return ids.astype(np.uint32)

    return encode


def _tiktoken_backend(tree: dict[str, Any]) -> Callable[[str], np.ndarray] | None:
    """tiktoken for byte-level BPE: it merges by rank, so the merges' order becomes the ranks and ids are looked up."""
    pattern, _ = _makes_parts(tree)
    model = tree["model"]
    if pattern is None or any(not token["special"] for token in tree["added_tokens"]) or model.get("dropout"):
        return None
    import tiktoken

    vocab: dict[str, int] = model["vocab"]
    added = {token["content"] for token in tree["added_tokens"]}
    if any(c not in vocab for c in CHARACTER_BYTES):
        return None
    order = dict.fromkeys(CHARACTER_BYTES)  # insertion order = rank
    for merge in model["merges"]:
        a, b = merge if isinstance(merge, list) else merge.split(" ")
        order.setdefault(a + b)
    if model.get("ignore_merges"):
        for piece in sorted(vocab, key=vocab.__getitem__):
            if piece not in added:
                order.setdefault(piece)
    pieces = list(order)
    try:
        ranks = {_raw(piece): rank for rank, piece in enumerate(pieces)}
    except KeyError:
        return None  # a token that is no byte string
    ids = np.array([vocab[piece] for piece in pieces], np.uint32)
    fastest = dict(PATTERNS.values()).get(pattern, pattern)
    encoding = tiktoken.Encoding("novella", pat_str=fastest, mergeable_ranks=ranks, special_tokens={})
    encode = functools.partial(encoding.encode_to_numpy, allowed_special=set(), disallowed_special=())
    if np.array_equal(ids, np.arange(len(ids))):
        return encode
    return lambda text: ids[encode(text)]


def _kitoken_backend(tree: dict[str, Any]) -> Callable[[str], np.ndarray] | None:
    """kitoken, if it is installed, for byte-level BPE: up to twice as fast as tiktoken on the patterns it has right."""
    pattern, has_seams = _makes_parts(tree)
    if pattern is None or not has_seams or any(not token["special"] for token in tree["added_tokens"]):
        return None
    try:
        import kitoken
    except ImportError:
        return None
    names = {token["content"] for token in tree["added_tokens"]}  # it would part a text at their letters
    vocab = {piece: i for piece, i in tree["model"]["vocab"].items() if piece not in names}
    bare = {**tree, "added_tokens": [], "post_processor": None, "model": {**tree["model"], "vocab": vocab}}
    try:
        model = kitoken.Kitoken.from_tokenizers(json.dumps(bare).encode())
    except Exception:  # a bare exception for a form that it does not know
        return None
    return lambda text: np.asarray(model.encode(text, False), np.uint32)


def _sentencepiece_backend(path: Path) -> Callable[[str], np.ndarray] | None:
    """The library of the model itself, where the model lies beside the tokenizer that was made from it."""
    if not path.is_file():
        return None
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return lambda text: np.asarray(model.encode(text), np.uint32)


# ---- comparing -------------------------------------------------------------------------------------------------------


def compare_on(text: str, encoder: Encoder, decode: Callable[[list[int]], str] | None = None) -> dict[str, Any]:
    """One tokenizer on one text.

    unigram_bits_per_byte is the entropy of the text's own token frequencies per byte of text: what a model without any
    context would pay, fitted to this very text. It is no language model's bits per byte, and it favours large
    vocabularies on short texts.
    """
    import time

    started = time.perf_counter()
    ids = encoder(text)
    seconds = time.perf_counter() - started
    n_bytes = len(text.encode())
    counts = np.unique(ids, return_counts=True)[1]
    bits = float(-(counts * np.log2(counts / counts.sum())).sum()) if len(ids) else 0.0
    return {
        "vocab_size": encoder.vocab_size,
        "tokens": len(ids),
        "bytes": n_bytes,
        "tokens_per_byte": len(ids) / max(n_bytes, 1),
        "bytes_per_token": n_bytes / max(len(ids), 1),
        "unigram_bits_per_byte": bits / max(n_bytes, 1),
        "ids_used": len(counts),
        "round_trip": decode is None or decode(ids.tolist()) == text,
        "backend": encoder.backend,
        "tokens_per_s": len(ids) / max(seconds, 1e-9),
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> np.ndarray:
    """Save as a Hugging Face folder, whole or not at all; returns token_bytes. `folder` must not exist yet.

    A SentencePiece model is kept beside tokenizer.json, because its own library encodes up to nine times faster.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():
        import shutil

        shutil.rmtree(temporary)
    tokenizer.save_pretrained(str(temporary))
    if model := getattr(tokenizer, "sentencepiece_model", None):
        (temporary / SENTENCEPIECE).write_bytes(model)
    temporary.rename(folder)
    return token_bytes(tokenizer)


def array_bytes(array: np.ndarray) -> bytes:
    """The array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
