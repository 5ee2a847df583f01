"""Which layers use the same weights: one module, several applications, each with its own memory and its own norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.spec import ConfigError, Part


class Sharing(Part):
    """A kind of sharing: `owner(i, n_layers)` is the layer whose module layer i uses (its own: i)."""

    kinds: ClassVar[dict[str, type]]

    def owner(self, index: int, n_layers: int) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Own(Sharing):
    """Every layer has its own weights."""

    def owner(self, index: int, n_layers: int) -> int:
        return index


@dataclass(frozen=True)
class Shared(Sharing):
    """Layers of one group use the first one's weights; mirror, then size, then cycle say which group.

    Sources: ALBERT, arXiv:1909.11942; MobileLLM, arXiv:2402.14905.

    size: so many consecutive layers make a group (AABB...)
    cycle: so many groups, again and again (ABAB... for 2); none: as many as it takes
    mirror: the second half uses the first half's weights in reverse order (ABBA)
    """

    size: int = 1
    cycle: int | None = None
    mirror: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "cycle"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.size == 1 and self.cycle is None and not self.mirror:
            raise ConfigError("size=1 without cycle or mirror shares nothing; say `own`, or set one of them")

    @classmethod
    def small(cls) -> Shared:
        """Has an effect on the two layers that the conformance suite uses."""
        return cls(size=2)

    def group(self, index: int, n_layers: int) -> int:
        index = min(index, n_layers - 1 - index) if self.mirror else index
        index //= self.size
        return index % self.cycle if self.cycle else index

    def owner(self, index: int, n_layers: int) -> int:
        return next(i for i in range(n_layers) if self.group(i, n_layers) == self.group(index, n_layers))


Sharing.kinds = {"own": Own, "shared": Shared}
