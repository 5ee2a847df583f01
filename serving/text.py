"""Between tokens and text: incremental detokenisation, stop strings across token borders, names of single tokens.

Released text is final: a character is held back until all of its bytes are there, and text that may turn out to be
the beginning of a stop string is held back until it is decided.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoders show for bytes that are no character (yet)
LONGEST_CHARACTER = 4  # bytes in UTF-8


class TokenBytes:
    """What every token stands for, as bytes.

    exact: whether joining these bytes is what the tokenizer's own decoder does (checked on a sample of its tokens);
    true for byte-level, SentencePiece and character vocabularies.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._added = {i: str(t) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        self._letters = _byte_letters() if "ByteLevel" in decoder else None
        self._spaced = "Metaspace" in decoder or "▁" in decoder
        self._marks = re.compile("[\U00100000-\U0010fffd]") if of_streams(tokenizer) else None
        self._known: dict[int, bytes] = {}
        sample = self._sample()
        # SentencePiece writes a space before the first word and takes it away again when it decodes.
        leading = next((i for i in sample if self.of(i)[:1] == b" "), None)
        self.drops_leading_space = leading is not None and self._decode([leading])[:1] != " "
        text = b"".join(map(self.of, sample)).decode()
        self.exact = self._decode(sample) == (text[1:] if self.drops_leading_space and text[:1] == " " else text)

    def of(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def name(self, token: int) -> str:
        """A token as text, for tables of log-probabilities; `bytes:\\xe2\\x82` (as OpenAI has it) for a part of one."""
        raw = self.of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"<|{token}|>".encode()  # a row that only pads the embedding
        piece = piece if self._marks is None else self._marks.sub("", piece)
        if self._letters is not None and all(c in self._letters for c in piece):
            return bytes(self._letters[c] for c in piece)
        single = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        if single:
            return bytes([int(single[1], 16)])
        return (piece.replace("▁", " ") if self._spaced else piece).encode()

    def _sample(self, size: int = 512) -> list[int]:
        """Some tokens from all over the vocabulary that are whole text."""
        ids = [i for i in sorted(set(self.tokenizer.get_vocab().values())) if i not in self.special]
        spread = [ids[k * len(ids) // size] for k in range(size)] if len(ids) > size else ids
        return [i for i in spread if _is_text(self.of(i))]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def of_streams(tokenizer: Any) -> bool:
    """Whether ids are several streams' tokens in one, whose marks the decoder takes away (pipelines.lib.streams)."""
    return r"\x{100000}" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))


class Detokenizer:
    """Turns tokens into text as they come; the pieces joined are the text of all tokens.

    Special tokens have no text.  A character left incomplete by the end of the generation is dropped.
    """

    def __init__(self, tokens: TokenBytes, before: Sequence[int] = ()) -> None:
        """before: the prompt. It decides about a leading space, and may end within a character."""
        self.tokens = tokens
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in before[-LONGEST_CHARACTER:]:
            self.utf8.decode(b"" if token in tokens.special else tokens.of(token))
        self.at_start = all(token in tokens.special for token in before)

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often the token's own, sometimes nothing."""
        if token in self.tokens.special:
            return ""
        piece = self.utf8.decode(self.tokens.of(token))
        if self.at_start and piece:
            self.at_start = False
            if self.tokens.drops_leading_space and piece[0] == " ":
                return piece[1:]
        return piece

    def flush(self) -> str:
        """What is left at the end and can still be text."""
        return ""


class WindowDetokenizer(Detokenizer):
    """For tokenizers whose decoder does more than join (WordPiece and others).

    A short window that begins before the new token is decoded, and what is new in it released.
    """

    def __init__(self, tokens: TokenBytes, before: Sequence[int] = ()) -> None:
        self.tokens = tokens
        self.window = [token for token in before if token not in tokens.special][-8:]
        self.last = len(self.window)  # tokens of the window before the newest clean border
        self.done = len(self._decode().rstrip(BROKEN))  # characters of the window's text already released

    def _decode(self) -> str:
        return self.tokens._decode(self.window)

    def add(self, token: int) -> str:
        if token in self.tokens.special:
            return ""
        self.window.append(token)
        text = self._decode()
        end = len(text.rstrip(BROKEN))
        if len(text) - end >= LONGEST_CHARACTER:  # longer than an unfinished character: these bytes never become one
            end = len(text) - (LONGEST_CHARACTER - 1)
        piece = text[self.done : end]
        self.done = max(self.done, end)
        if end == len(text):  # a clean border: the window may begin at the previous one
            del self.window[: self.last]
            self.last = len(self.window)
            self.done = len(self._decode())
        return piece

    def flush(self) -> str:
        text = self._decode()
        left = text[self.done :]
        self.done = len(text)
        return left.rstrip(BROKEN)


def detokenizer(tokens: TokenBytes, before: Sequence[int] = ()) -> Detokenizer:
    return (Detokenizer if tokens.exact else WindowDetokenizer)(tokens, before)


class StopStrings:
    """Finds the first stop string in text that comes in pieces, as if it came character by character."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held = tuple(stops), ""
        self.met: str | None = None  # the one that ended the text

    def add(self, piece: str) -> tuple[str, bool]:
        """Returns the text that is certain to stand before any stop string, and whether one was met."""
        if not self.stops:
            return piece, False
        text = self.held + piece
        hits = [(at + len(s), at) for s in self.stops if (at := text.find(s)) >= 0]
        if hits:  # the one complete first; of those the longest
            self.held = ""
            end, at = min(hits)
            self.met = text[at:end]
            return text[:at], True
        keep = max(_overlap(text, s) for s in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)


def _is_text(raw: bytes) -> bool:
    try:
        return bool(raw.decode())
    except UnicodeDecodeError:
        return False


def _byte_letters() -> dict[str, int]:
    """GPT-2's printable letter for each byte, inverted: printable Latin-1 stands for itself, the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
