"""Where norms stand around a branch f of the residual stream x; the sum itself is models/parts/residual.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.spec import Part


class Placement(Part):
    """A kind of placement: which of the three places around a branch hold a norm of their own.

    before: on the branch's input.  output: on its output, before the sum.  after: on the sum.
    """

    kinds: ClassVar[dict[str, type]]
    before: ClassVar[bool] = False
    output: ClassVar[bool] = False
    after: ClassVar[bool] = False

    @property
    def n_norms(self) -> int:
        return self.before + self.output + self.after


@dataclass(frozen=True)
class Pre(Placement):
    """x + f(norm(x)): the sum is never normalised, so gradients pass it unchanged.   Source: arXiv:2002.04745."""

    before = True


@dataclass(frozen=True)
class Post(Placement):
    """norm(x + f(x)), as the first transformer had it; needs warm-up.   Source: arXiv:1706.03762."""

    after = True


@dataclass(frozen=True)
class Peri(Placement):
    """x + norm(f(norm(x))): input and output of every branch have a known scale.   Source: arXiv:2502.02732."""

    before = True
    output = True


@dataclass(frozen=True)
class Output(Placement):
    """x + norm(f(x)): only what is added has a known scale.   Source: OLMo 2, arXiv:2501.00656."""

    output = True


@dataclass(frozen=True)
class PrePost(Placement):
    """norm(x + f(norm(x))): a norm before the branch and one on the sum."""

    before = True
    after = True


@dataclass(frozen=True)
class PeriPost(Placement):
    """norm(x + norm(f(norm(x)))): a norm in each of the three places."""

    before = True
    output = True
    after = True


@dataclass(frozen=True)
class OutputPost(Placement):
    """norm(x + norm(f(x))): norms on what is added and on the sum."""

    output = True
    after = True


@dataclass(frozen=True)
class Bare(Placement):
    """x + f(x): no norm; small initialisation, ReZero or a norm inside the branch must keep it stable."""


Placement.kinds = {
    "pre": Pre,
    "post": Post,
    "peri": Peri,
    "output": Output,
    "pre_post": PrePost,
    "peri_post": PeriPost,
    "output_post": OutputPost,
    "none": Bare,
}
