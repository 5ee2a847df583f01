"""Between tokens and text: incremental detokenisation, stop strings across token borders, names of single tokens.

Released text is final: a character is held back until all of its bytes are there, and text that may turn out to be
the beginning of a stop string is held back until it is decided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoders show for bytes that are no character (yet)
LONGEST_CHARACTER = 4  # bytes in UTF-8


class Detokenizer:
    """Turns tokens into text as they come; the pieces joined are the text of all tokens.

    Decoding a token alone is wrong for two reasons: a character may span tokens, and some tokenizers (SentencePiece)
    drop a leading space. So a short window that begins before the new token is decoded, and what is new in it released.
    A character left incomplete by the end of the generation is dropped.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), skip_special: bool = True) -> None:
        """before: the last tokens of the prompt, which decide about a leading space."""
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.window = list(before[-8:])
        self.last = len(self.window)  # tokens of the window before the newest clean border
        self.done = len(self._decode().rstrip(BROKEN))  # characters of the window's text already released

    def _decode(self) -> str:
        return self.tokenizer.decode(
            self.window, skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False
        )

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often the token's own, sometimes nothing."""
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
        """What is left at the end: held text, without a trailing character that never became whole."""
        text = self._decode()
        left = text[self.done :]
        self.done = len(text)
        return left.rstrip(BROKEN)


class StopStrings:
    """Finds the first stop string in text that comes in pieces, as if it came character by character."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held = tuple(stops), ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Returns the text that is certain to stand before any stop string, and whether one was met."""
        if not self.stops:
            return piece, False
        text = self.held + piece
        hits = [(at + len(s), at) for s in self.stops if (at := text.find(s)) >= 0]
        if hits:  # the one complete first; of those the longest
            self.held = ""
            return text[: min(hits)[1]], True
        keep = max(_overlap(text, s) for s in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)


class TokenNames:
    """Single tokens as bytes and as text, for log-probability tables. Two tokens never share a name.

    A token that is no whole UTF-8 text is named `bytes:\\xe2\\x82`, as OpenAI's completions do.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = set(getattr(tokenizer, "all_special_tokens", ()))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = repr(getattr(backend, "decoder", None))
        self.added = {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        self.letters = _byte_letters() if "ByteLevel" in decoder else None
        self.spaced = "Metaspace" in decoder or "▁" in decoder
        self.known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        if token not in self.known:
            self.known[token] = self._bytes_of(token)
        return self.known[token]

    def _bytes_of(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"<|{token}|>".encode()  # a row of a padded embedding: no such token
        if piece in self.special or piece in self.added:
            return piece.encode()
        if self.letters is not None and all(c in self.letters for c in piece):
            return bytes(self.letters[c] for c in piece)
        single = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        if single:
            return bytes([int(single[1], 16)])
        return (piece.replace("▁", " ") if self.spaced else piece).encode()

    def name(self, token: int) -> str:
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def _byte_letters() -> dict[str, int]:
    """GPT-2's printable letter for each byte, inverted: printable Latin-1 stands for itself, the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
