"""Which window of which source is sample number g: a pure function, so that any number of workers see the same run.

Sample numbers run through blocks of 4096 slots. In each block a source owns the number of slots that its weight asks
for (largest remainder), and another keyed permutation decides which. Inside a source the windows of one epoch are
visited in a keyed random order, every window once before the next epoch starts; each epoch cuts the tokens at another
phase. Nothing is stored: the permutation is a Feistel network with cycle walking, so a run can start at any sample.
Six Feistel rounds pass the uniformity tests, two fail.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.spec import ConfigError

BLOCK = 4096
ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_U = np.uint64


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words that spreads every bit (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))


def key(*words: int) -> int:
    """One 63-bit seed from several whole numbers; any change of any word gives another seed."""
    h: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            h = mix(np.asarray(h * _GOLDEN + _U(word & 0xFFFFFFFFFFFFFFFF) + _U(1), _U))[()]
    return int(h) & (2**63 - 1)


def permute(i: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The i-th element of a keyed permutation of range(n), for each i.

    i: uint64, each below n.  keys: uint64, one per element, or one for all.
    An unbalanced Feistel network permutes the 2^bits numbers of the smallest such range that holds n; a result outside
    range(n) is fed back until it falls inside (cycle walking: fewer than two rounds on average).
    """
    if n <= 1:
        return np.zeros_like(i, _U)
    bits = max(2, int(n - 1).bit_length())
    low_bits = _U(bits - bits // 2)
    high_mask, low_mask = _U((1 << (bits // 2)) - 1), _U((1 << int(low_bits)) - 1)
    with np.errstate(over="ignore"):
        round_keys = mix(np.arange(1, ROUNDS + 1, dtype=_U) * _GOLDEN + np.asarray(keys, _U)[..., None])

        def once(x: np.ndarray, k: np.ndarray) -> np.ndarray:
            for r in range(0, ROUNDS, 2):
                high, low = x >> low_bits, x & low_mask
                high = high ^ (mix(low + k[..., r]) & high_mask)
                low = low ^ (mix(high + k[..., r + 1]) & low_mask)
                x = (high << low_bits) | low
            return x

        x = once(np.asarray(i, _U), round_keys)
        while (outside := x >= _U(n)).any():
            x = x.copy()
            x[outside] = once(x[outside], round_keys[outside] if round_keys.ndim > 1 else round_keys)
    return x


@dataclass(frozen=True)
class Source:
    """One token folder's training split as the plan sees it.

    name: for messages and per-source counts.  tokens: usable tokens, from `start` on.
    weight: share of the samples, relative to the other sources.  fingerprint: of the token folder.
    """

    name: str
    tokens: int
    weight: float = 1.0
    start: int = 0
    fingerprint: str = ""


class Order:
    """sample number -> (source, first token, epoch).

    sources: at least one, each holding at least one window.  seq_len: tokens per window (one more is read: the target
    of the last).  seed: any whole number.
    """

    def __init__(self, sources: list[Source], seq_len: int, seed: int):
        self.sources, self.seq_len, self.seed = list(sources), seq_len, seed
        for s in sources:
            if s.tokens < seq_len + 1:
                raise ConfigError(
                    f"{s.name}: {s.tokens} training tokens hold no window of seq_len={seq_len} and its target; "
                    f"try seq_len={max(1, s.tokens - 1)} or more text"
                )
            if not s.weight > 0:
                raise ConfigError(f"{s.name}: weight={s.weight} is not positive")
        self.windows = np.array([(s.tokens - 1) // seq_len for s in sources], np.int64)
        share = np.array([s.weight for s in sources], np.float64)
        share = share / share.sum() * BLOCK
        slots = np.floor(share).astype(np.int64)
        slots[np.argsort(-(share - slots), kind="stable")[: BLOCK - slots.sum()]] += 1  # largest remainder
        if (slots == 0).any():
            poor = self.sources[int(np.argmin(slots))]
            raise ConfigError(f"{poor.name}: weight={poor.weight} is less than one sample in {BLOCK}")
        self.slots = slots
        self._slot_source = np.repeat(np.arange(len(slots)), slots)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def hash(self) -> str:
        """Identifies the plan: the same hash means the same tokens for the same sample number."""
        plan = {
            "sources": [asdict(s) for s in self.sources],
            "seq_len": self.seq_len,
            "seed": self.seed,
            "block": BLOCK,
        }
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which the first source to do so has been seen whole."""
        return int((self.windows * BLOCK / self.slots).min())

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """samples: [B] sample numbers. Returns source [B], first token [B] and epoch [B], all int64."""
        g = np.asarray(samples, np.int64)
        block, slot = g // BLOCK, g % BLOCK
        source, earlier = np.empty_like(g), np.empty_like(g)
        for b in np.unique(block):
            mine = block == b
            sources, ranks = self._block(int(b))
            source[mine], earlier[mine] = sources[slot[mine]], ranks[slot[mine]]
        nth = (block * self.slots[source] + earlier).astype(_U)
        with np.errstate(over="ignore"):
            windows = self.windows[source].astype(_U)
            epoch, index = nth // windows, nth % windows
            first = np.empty(g.shape, np.int64)
            for s in np.unique(source):
                mine = source == s
                keys = mix(np.asarray(key(self.seed, 2, int(s)), _U) + mix(epoch[mine]))
                window = permute(index[mine], int(self.windows[s]), keys)
                spare = self.sources[s].tokens - 1 - int(self.windows[s]) * self.seq_len
                phase = mix(keys ^ _GOLDEN) % _U(spare + 1)
                first[mine] = self.sources[s].start + (window * _U(self.seq_len) + phase).astype(np.int64)
        return source, first, epoch.astype(np.int64)

    def _block(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each of the block's 4096 samples: its source, and how many earlier samples of the block share it."""
        if b not in self._blocks:
            seed = np.asarray(key(self.seed, 1, b), _U)
            source = self._slot_source[permute(np.arange(BLOCK, dtype=_U), BLOCK, seed).astype(np.int64)]
            rank = np.empty(BLOCK, np.int64)
            for s, count in enumerate(self.slots):
                rank[source == s] = np.arange(count)
            if len(self._blocks) > 4:  # a batch touches one or two
                self._blocks.clear()
            self._blocks[b] = source, rank
        return self._blocks[b]
