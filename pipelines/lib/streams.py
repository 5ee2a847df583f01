r"""Tokens beside the text's: streams that are read off the characters, and tokenizers whose ids are several streams.

An id is s_1 + V_1 (s_2 + V_2 (s_3 + ...)) of the streams' tokens (models.parts.streams). Its piece in tokenizer.json is
the first stream's piece and, behind it, a mark per further stream, a character of the private plane 16: U+100000 + s_i.
A decoder takes the marks away, so ids decode to the first stream's text. The streams of ANNOTATORS follow from the text
alone: rules of tokenizer.json put the marks behind each character. So such a tokenizer encodes and decodes anywhere,
without this code; one of other streams (parts of speech) decodes only.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.spec import ConfigError, near
from pipelines.lib.config import InputError
from pipelines.lib.shards import (
    TOKEN_BYTES,
    TokenFolder,
    Tokens,
    dtype_for,
    file_sha256,
    folder_sha256,
    make_folder,
    write_atomically,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FIRST, LAST = 0x100000, 0x10FFFD
MARK = r"\x{100000}-\x{10FFFD}"  # inside a class of a regular expression
PROVEN = 2000  # ids that a joined tokenizer must decode as the first stream's own does
MOST_IDS = 1 << 22  # each is a piece of tokenizer.json and a logit wherever tokens are drawn
ONE = f"[{MARK}]"
WHOLE = r"[\s\S]"


# ---- what can be read off the text


@dataclass(frozen=True)
class Annotator:
    """A number for each character, from characters alone.

    classes: those of digit 1, 2, ... as the inside of a regular expression's class; every other character has 0.
    longest: none, or the digit is the place in the run of characters of the one class, counted from 1 up to this.
    """

    classes: tuple[str, ...]
    longest: int | None = None

    @property
    def size(self) -> int:
        return 1 + (self.longest or len(self.classes))

    def rules(self, stage: int) -> list[tuple[str, str]]:
        """(pattern of an empty place, mark to put there) where each character has `stage` marks behind it already."""
        marks, after = ONE * stage, f"(?!{ONE})"
        none = (f"(?<=[^{''.join(self.classes)}{MARK}]{marks}){after}", chr(FIRST))
        if self.longest is None:
            found = [(f"(?<=[{inside}]{marks}){after}", chr(FIRST + d)) for d, inside in enumerate(self.classes, 1)]
            return [*found, none]
        one, found = f"[{self.classes[0]}]{marks}", []
        for place in range(self.longest, 0, -1):  # from the longest, because marks part the run for the rules after
            longer = "" if place == self.longest else f"(?<!{one * (place + 1)})"
            found.append((f"(?<={one * place}){longer}{after}", chr(FIRST + place)))
        return [*found, none]


ANNOTATORS = {
    "case": Annotator((r"\p{Ll}", r"\p{Lu}\p{Lt}")),  # 0 without case, 1 lower, 2 upper
    "class": Annotator((r"\p{L}\p{M}", r"\p{N}", r"\s")),  # 0 punctuation and others, 1 letter, 2 digit, 3 white space
    "word_position": Annotator((r"\p{L}\p{M}\p{N}",), 11),  # 0 outside, else 1 to 11 and 11 for all beyond
}


def check_annotators(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is none, or comes twice."""
    for i, name in enumerate(names):
        if name not in ANNOTATORS:
            raise ConfigError(f"beside={name}: no such stream{near(name, ANNOTATORS)}")
        if name in names[:i]:
            raise ConfigError(f"beside: {name} comes twice; its second stream would say nothing new")


def _rules(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every rule of tokenizer.json's normalizer; what has a mark's place in the text becomes a character of no id."""
    rules = [(ONE, "\N{REPLACEMENT CHARACTER}")] if names else []
    return rules + [rule for stage, name in enumerate(names) for rule in ANNOTATORS[name].rules(stage)]


# ---- tokenizers


def sizes_text(sizes: Sequence[int]) -> str:
    """`65 x 3 x 12`."""
    return " x ".join(map(str, sizes))


def tokenizer_of(
    pieces: Sequence[str],
    sizes: Sequence[int],
    decoder: Any,
    beside: Sequence[str] = (),
    eot: tuple[str, int] | None = None,
) -> Tokenizer:
    """The tokenizer of several streams.

    pieces: of the first stream, by id.  sizes: of all streams.  decoder: the first stream's own.
    beside: the annotators of the further streams; without them it cannot encode.
    eot: name and id (of all streams) of the token that ends a text.  Raises InputError.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    n_ids = math.prod(sizes)
    if n_ids > MOST_IDS or max(sizes[1:]) > LAST - FIRST:
        raise InputError(
            f"streams of {sizes_text(sizes)} words make {n_ids:,} ids; {MOST_IDS:,} can be handled, "
            f"and {LAST - FIRST:,} words beside the first stream: give fewer streams, or smaller ones"
        )
    if len(set(pieces)) < len(pieces):
        raise InputError("the first stream's tokenizer has two ids for one piece of text; no tokenizer can hold both")
    marked = next((piece for piece in pieces if bare(piece) != piece), None)
    if marked is not None:
        raise InputError(
            f"the text holds {marked!r}, of the characters U+100000 to U+10FFFD that mark streams; take them out of it"
        )
    # The second stream's digit runs fastest, and its mark stands first.
    digits = (reversed(d) for d in itertools.product(*(range(size) for size in reversed(sizes[1:]))))
    ends = ["".join(chr(FIRST + d) for d in place) for place in digits]
    words = [piece + end for end in ends for piece in pieces]
    if eot is not None:
        words[eot[1]] = eot[0]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<in none of the streams>"))
    if beside:
        rules = [normalizers.Replace(Regex(pattern), mark) for pattern, mark in _rules(beside)]
        made.normalizer = normalizers.Sequence(rules)  # type: ignore[assignment]
        made.pre_tokenizer = pre_tokenizers.Split(Regex(WHOLE + ONE * len(beside)), "isolated")  # type: ignore[assignment]
    made.decoder = decoders.Sequence([decoders.Replace(Regex(ONE), ""), decoder])  # type: ignore[assignment]
    return made


def bare(piece: str) -> str:
    """A piece without its marks: the first stream's."""
    return "".join(c for c in piece if not FIRST <= ord(c) <= LAST)


@dataclass(frozen=True)
class Found:
    """What a tokenizer.json of streams holds.

    pieces: of the first stream.  sizes: of all streams.
    beside: the annotators of the further streams; none: it only decodes.
    """

    pieces: list[str]
    sizes: tuple[int, ...]
    beside: tuple[str, ...]


def find(tree: dict[str, Any]) -> Found | None:
    """The streams of a tokenizer.json; None where it is of one stream."""
    steps = (tree.get("decoder") or {}).get("decoders") or [{}]
    if tree["model"]["type"] != "WordLevel" or steps[0].get("pattern") != {"Regex": ONE}:
        return None
    words = sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].__getitem__)
    ends = [word[len(bare(word)) :] for word in words]
    largest = [max(digits) for digits in zip(*(map(ord, end) for end in ends if end), strict=True)]
    further = tuple(mark - FIRST + 1 for mark in largest)
    first = len(words) // math.prod(further)
    rules = [(step["pattern"]["Regex"], step["content"]) for step in (tree["normalizer"] or {}).get("normalizers", ())]
    return Found([bare(word) for word in words[:first]], (first, *further), _beside(rules))


def _beside(rules: list[tuple[str, str]]) -> tuple[str, ...]:
    """The annotators that these rules are of."""
    names: tuple[str, ...] = ()
    while len(_rules(names)) < len(rules):
        longer = [(*names, name) for name in ANNOTATORS]
        names = next(more for more in longer if _rules(more) == rules[: len(_rules(more))])
    return names


def encoder(found: Found, first: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Text -> ids, [N] uint32, without the regular expressions.   first: text -> the first stream's tokens."""
    tables = [_classes(name, found.pieces) for name in found.beside]
    strides = np.cumprod([1, *found.sizes[:-1]])

    def encode(text: str) -> np.ndarray:
        characters = first(text)
        ids = characters.astype(np.uint32)
        for name, table, stride in zip(found.beside, tables, strides[1:].tolist(), strict=True):
            digits = table[characters]
            if (longest := ANNOTATORS[name].longest) is not None:
                at = np.arange(len(digits))
                outside = np.maximum.accumulate(np.where(digits == 0, at, -1)) if len(at) else at
                digits = np.minimum(at - outside, longest)
            ids += digits.astype(np.uint32) * np.uint32(stride)
        return ids

    return encode


def _classes(name: str, pieces: Sequence[str]) -> np.ndarray:
    """[V_1] the digit of each character on its own, from the rules that tokenizer.json has."""
    from tokenizers import Regex, normalizers

    rules = [normalizers.Replace(Regex(pattern), mark) for pattern, mark in ANNOTATORS[name].rules(0)]
    normal = normalizers.Sequence(rules)  # type: ignore[arg-type]
    return np.array([ord(normal.normalize_str(piece)[-1]) - FIRST for piece in pieces], np.int64)


# ---- folders of tokens -----------------------------------------------------------------------------------------------


def join(folders: Sequence[TokenFolder], out: Path) -> dict[str, Any]:
    """Write the tokens of aligned folders as one folder of ids and return its manifest.

    Shards, documents and bytes are the first folder's, whose tokenizer gives the text.
    Raises InputError for folders that do not hold the same places.
    """
    from pipelines.lib import vocab

    first, counts = folders[0], [folder.vocab_size for folder in folders]
    # A folder's ids may be several streams already: in mixed radix theirs stand beside the others as they are.
    sizes = [n for f in folders for n in f.manifest["tokenizer"].get("sizes") or [f.vocab_size]]
    if first.tokenizer_dir is None:
        raise InputError(f"{first.path}: the first stream gives the text, and no tokenizer lies beside it")
    for folder in folders[1:]:
        _check_aligned(first, folder)
    eot_id = _end_of_text(folders, counts)
    source = vocab.load_tokenizer(first.tokenizer_dir)
    made = _joined(source, first.vocab_size, sizes, eot_id)
    table = first.token_bytes()
    table = np.tile(vocab.token_bytes(source) if table is None else table, math.prod(counts[1:]))
    dtype = dtype_for(math.prod(sizes))
    make_folder(out)
    splits: dict[str, Any] = {}
    for name, tokens in first.splits.items():
        entries = []
        for i, shard in enumerate(tokens.shards):
            begin = int(tokens.first[i])
            ids, stride = np.zeros(shard.tokens, np.int64), 1
            for folder in folders:
                ids += folder.splits[name].window(begin, shard.tokens).astype(np.int64) * stride
                stride *= folder.vocab_size
            ends = tokens.document_ends(i)
            offsets = np.concatenate([[0], [shard.tokens] if ends is None else ends - begin])
            n_bytes = first.manifest["splits"][name]["shards"][i].get("bytes")
            n_bytes = int(table[ids].sum(dtype=np.int64)) if n_bytes is None else n_bytes
            entries.append(write_shard(out / f"{name}-{i:05d}.arrow", ids.astype(dtype), offsets, n_bytes))
        splits[name] = {"shards": entries}
    vocab.save_tokenizer(made, out / "tokenizer")
    write_atomically(out / TOKEN_BYTES, vocab.array_bytes(table))
    return write_manifest(
        out,
        {
            "dtype": str(dtype),
            "eot_id": eot_id,
            "tokenizer": {
                "folder": "tokenizer",
                "sha256": folder_sha256(out / "tokenizer"),
                "vocab_size": math.prod(sizes),
                "kind": "streams",
                "sizes": sizes,
            },
            "token_bytes": {
                "file": TOKEN_BYTES,
                "size": (out / TOKEN_BYTES).stat().st_size,
                "sha256": file_sha256(out / TOKEN_BYTES),
            },
            "source": {
                "kind": "streams",
                "streams": [{"path": str(f.path), "fingerprint": f.fingerprint, "size": f.vocab_size} for f in folders],
            },
            "splits": splits,
        },
    )


def _check_aligned(first: TokenFolder, other: TokenFolder) -> None:
    if first.splits.keys() != other.splits.keys():
        raise InputError(
            f"{other.path} has the splits {', '.join(other.splits)}, {first.path} has {', '.join(first.splits)}; "
            "streams stand beside each other in each"
        )
    for name, tokens in first.splits.items():
        beside = other.splits[name]
        if tokens.n_tokens != beside.n_tokens:
            raise InputError(
                f"{other.path}: {beside.n_tokens:,} {name} tokens, but {first.path} has {tokens.n_tokens:,}; "
                "each place needs a token of each stream"
            )
        ours, theirs = (_document_ends(stream) for stream in (tokens, beside))
        if ours is None or theirs is None:
            continue  # a layout that marks no documents has only its length to compare
        if len(ours) != len(theirs) or (ours != theirs).any():
            shorter = min(len(ours), len(theirs))
            apart = np.flatnonzero(ours[:shorter] != theirs[:shorter])
            at = int(apart[0]) if len(apart) else shorter
            said = [f"at token {ends[at]:,}" if at < len(ends) else "nowhere" for ends in (ours, theirs)]
            raise InputError(
                f"{other.path}: {name} document {at} ends {said[1]}, but {said[0]} in {first.path}; streams need the "
                "same documents in the same order"
            )


def _document_ends(tokens: Tokens) -> np.ndarray | None:
    """The ends of all documents of a split; None where the files do not mark them."""
    ends = [tokens.document_ends(i) for i in range(len(tokens.shards))]
    marked = [e for e in ends if e is not None]
    return np.concatenate(marked) if len(marked) == len(ends) else None


def _end_of_text(folders: Sequence[TokenFolder], counts: Sequence[int]) -> int | None:
    """The id that ends a document, of the streams' own; None where the first stream has none."""
    ends = [folder.manifest["eot_id"] for folder in folders]
    if ends[0] is None:
        return None
    without = [str(folder.path) for folder, end in zip(folders, ends, strict=True) if end is None]
    if without:
        raise InputError(
            f"{without[0]}: no end-of-text id, but {folders[0].path} has one ({ends[0]}), and there a document's last "
            "place is this token; tokenize both with it, or both without"
        )
    return sum(end * math.prod(counts[:i]) for i, end in enumerate(ends))


def _joined(
    source: PreTrainedTokenizerFast, n_first: int, sizes: Sequence[int], eot_id: int | None
) -> PreTrainedTokenizerFast:
    """The tokenizer of joined streams: it decodes to the first folder's text, proven on some of its n_first ids."""
    from pipelines.lib.vocab import hf_tokenizer

    names = {i: word for word, i in source.get_vocab().items()}
    found = find(json.loads(source.backend_tokenizer.to_str()))
    pieces = [names.get(i, f"<id {i} without a piece>") for i in range(sizes[0])] if found is None else found.pieces
    name = None if eot_id is None else pieces[eot_id % sizes[0]]
    decoder = source.backend_tokenizer.decoder
    if decoder is None:
        raise InputError("the first stream's tokenizer has no decoder, so no text could be had of the joined ids")
    made = hf_tokenizer(
        tokenizer_of(pieces, sizes, decoder, eot=None if name is None or eot_id is None else (name, eot_id)), name
    )
    special = set(source.all_special_ids)
    ids = [i for i in range(n_first) if i not in special and i in names][:PROVEN]
    beside = [i + n_first * (i % (math.prod(sizes) // n_first)) for i in ids]
    if made.decode(beside) != source.decode(ids):
        raise InputError(
            "the first stream's tokenizer decodes by rules that do not survive in the joined one; use one of "
            "characters, bytes or byte-level BPE"
        )
    return made
