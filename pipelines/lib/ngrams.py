"""Runs of words that two texts share: words as numbers, runs of n words as one number, and the items they are of.

Words are runs of letters and digits in lower case; punctuation and spaces are nothing. A word is a 64-bit hash, and a
run of n words the number sum(word_i * BASE^(n - 1 - i)) mod 2^64, so all runs of a text come from n array operations.
Among 10^7 runs of items and 10^10 of a corpus, less than one in a hundred scans meets two that share a number by chance
(10^17 pairs over 2^64).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WORD = re.compile(r"[^\W_]+")
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's bits are lost
REMEMBERED = 1 << 20  # words whose hashes a process keeps

_known: dict[str, int] = {}


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def hashes_of(words: Sequence[str]) -> np.ndarray:
    """[N] uint64, the same in every process."""
    if len(_known) > REMEMBERED:
        _known.clear()
    for word in set(words).difference(_known):
        _known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.fromiter((_known[word] for word in words), np.uint64, len(words))


def runs_of(hashes: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(n, the numbers of all runs of n words [N - n + 1]) for each of `sizes`, which ascend."""
    total = np.zeros(len(hashes), np.uint64)
    for n in range(1, max(sizes, default=0) + 1):
        if n > len(hashes):
            return
        total = total[: len(hashes) - n + 1] * BASE + hashes[n - 1 :]
        if n in sizes:
            yield n, total


def size_for(lengths: Sequence[int], least: int, most: int) -> int:
    """Words in a run for items of these lengths: the 5th percentile, held between least and most.

    Source: Brown et al., Language Models are Few-Shot Learners, arXiv:2005.14165, appendix C (8 and 13).
    """
    return int(np.clip(np.percentile(lengths, 5), least, most)) if len(lengths) else most


@dataclass(frozen=True)
class Index:
    """The runs of many items, for looking up. runs: {n: sorted distinct numbers [M]}."""

    runs: Mapping[int, np.ndarray]

    @property
    def sizes(self) -> list[int]:
        return sorted(self.runs)

    def found(self, words: Sequence[str]) -> dict[int, np.ndarray]:
        """{n: the distinct numbers of the index that stand in this text}."""
        met = {}
        for n, numbers in runs_of(hashes_of(words), self.sizes):
            table = self.runs[n]
            at = np.searchsorted(table, numbers)
            at[at == len(table)] = 0
            hits = numbers[table[at] == numbers]
            if len(hits):
                met[n] = np.unique(hits)
        return met


def index_of(items: Mapping[int, Sequence[Sequence[str]]]) -> Index:
    """The index over items of words, {n: items}."""
    runs = {}
    for n, several in items.items():
        numbers = [run for words in several for _, run in runs_of(hashes_of(words), [n])]
        if numbers:
            runs[n] = np.unique(np.concatenate(numbers))
    return Index(runs)
