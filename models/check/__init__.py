"""The conformance suite: what every model family promises, as functions that return results with figures.

`conformance(make)` runs all of it on the models that `make()` returns, and is used by the tests over every registered
part, option and preset (`models.check.variants`) and by `python -m pipelines.evaluate check`. It computes in float64:
there an error of 1e-9 is a bug and no rounding. Two checks are about narrower formats, judged by float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from models.check.decoding import (
    beams_equal_uncached,
    cached_equals_full,
    generate_equals_greedy,
    padding_is_unseen,
    rollback_forgets,
    rows_equal_single,
)
from models.check.fields import every_field_matters
from models.check.files import (
    operations_are_counted,
    parameters_follow_formula,
    save_load_is_bitwise,
    ties_are_declared,
)
from models.check.formats import autocast_is_finite, narrow_memory_errs_as_a_full_pass
from models.check.helpers import Make, Result, Verdict, stirred
from models.check.masks import (
    documents_are_apart,
    fused_equals_written_out,
    masked_rows_are_finite,
    no_look_ahead,
    rows_do_not_mix,
)
from models.check.training import (
    checkpointing_equals_plain,
    compiled_equals_eager,
    every_parameter_learns,
    learns_by_heart,
    repeats_itself,
)
from models.check.variants import Variant, shrunk, variants

__all__ = ["CHECKS", "QUICK", "Make", "Result", "Variant", "Verdict", "conformance", "shrunk", "stirred", "variants"]

CHECKS: dict[str, Callable[..., Verdict]] = {
    f.__name__: f
    for f in (
        cached_equals_full,
        rows_equal_single,
        rollback_forgets,
        padding_is_unseen,
        no_look_ahead,
        rows_do_not_mix,
        documents_are_apart,
        masked_rows_are_finite,
        fused_equals_written_out,
        narrow_memory_errs_as_a_full_pass,
        autocast_is_finite,
        every_parameter_learns,
        repeats_itself,
        learns_by_heart,
        compiled_equals_eager,
        checkpointing_equals_plain,
        generate_equals_greedy,
        beams_equal_uncached,
        save_load_is_bitwise,
        ties_are_declared,
        parameters_follow_formula,
        operations_are_counted,
        every_field_matters,
    )
}
# What parts that get along alone could still break together, and what costs little to look at.
QUICK = (
    "cached_equals_full",
    "padding_is_unseen",
    "no_look_ahead",
    "rows_do_not_mix",
    "documents_are_apart",
    "masked_rows_are_finite",
    "fused_equals_written_out",
    "every_parameter_learns",
    "repeats_itself",
    "save_load_is_bitwise",
    "parameters_follow_formula",
    "operations_are_counted",
)


def conformance(
    make: Make,
    backend: str = "eager",
    only: str | None = None,
    focus: str | None = None,
    names: Iterable[str] | None = None,
) -> list[Result]:
    """All checks on one model.

    make: gives the model, with the same weights each time.  backend: of torch.compile ("eager" traces and runs no
    compiler; "inductor" is the real one).  only: checks whose name contains this.  focus: dotted config field; only it
    and what is below it must matter.  names: checks to choose from; None: all.
    """
    options: dict[str, dict[str, Any]] = {
        "compiled_equals_eager": {"backend": backend},
        "every_field_matters": {"focus": focus},
    }
    results = []
    for name in CHECKS if names is None else names:
        if only is not None and only not in name:
            continue
        try:
            torch.manual_seed(0)
            ok, detail = CHECKS[name](make, **options.get(name, {}))
        except Exception as error:  # a check that cannot run is a promise that does not hold
            ok, detail = False, f"{type(error).__name__}: {error}".splitlines()[0]
        results.append(Result(name, ok, detail))
    return results
