"""The catalogue holds every registered part, says all of it, and is current."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import models
from models.catalogue import __main__ as command
from models.catalogue.collect import TRAINING, collect, describe, registries, snake
from models.catalogue.costs import MEASURES, Setting
from models.catalogue.limits import combinations
from models.family import Family
from models.parts.norm import Norm, RMSNorm
from models.spec import Part, fields

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def catalogue():
    return {r.name: r for r in collect(Setting())}


@pytest.fixture(scope="module")
def refusals():
    return combinations(Setting().spec())


def test_every_registry_of_the_package_is_in_it(catalogue):
    for module in pkgutil.walk_packages(models.__path__, "models."):
        importlib.import_module(module.name)
    found = {cls for cls in Part.__subclasses__() if cls.__module__.startswith("models.") and cls is not Family}
    assert found == {r.cls for r in catalogue.values()}
    for registry in catalogue.values():
        assert [k.name for k in registry.kinds] == list(registry.cls.kinds)
        assert registry.places and all(meaning for _, meaning in registry.places), registry.name


def test_every_kind_has_a_formula_and_every_option_a_type_a_default_and_a_meaning(catalogue):
    for registry in catalogue.values():
        for kind in registry.kinds:
            assert kind.formula, f"{registry.name}={kind.name}"
            assert [o.name for o in kind.options] == list(fields(kind.cls))
            for option in kind.options:
                where = f"{registry.name}={kind.name}.{option.name}"
                assert option.meaning, where
                assert not re.search(r"[<\[\]]|typing|None", option.type), f"{where}: {option.type}"


def test_a_docstring_is_taken_apart():
    @dataclass(frozen=True)
    class Thing(Part):
        """y = a x.   Source: E. Miller et al., 2023, arXiv:1.2. It is short.

        More of it.

        a: the factor,
            of any sign
        """

        a: float = 1.0

    kind = describe("thing", Thing)
    assert (kind.formula, kind.source) == ("y = a x. It is short.", "E. Miller et al., 2023, arXiv:1.2")
    assert kind.text == ("More of it.",)
    (option,) = kind.options
    assert (option.name, option.type, option.default) == ("a", "number", "1")
    assert option.meaning == "the factor, of any sign"


def test_what_costs_something_at_run_time_is_measured():
    first, _ = registries()
    without = {snake(cls.__name__) for cls in (*first, *TRAINING)} - set(MEASURES)
    # They choose when, which or how weights are used, or belong to training: no arithmetic of their own.
    assert without == {"sharing", "rope_scaling", "objective", "schedule", "optim"}


def test_costs_by_hand(catalogue):
    d, T, H = 768, 1024, 12
    by_name = {name: {k.name: k for k in r.kinds} for name, r in catalogue.items()}
    causal = by_name["attention"]["causal"]
    assert causal.parameters == 4 * d * d
    # Four matrices; scores, their scale and weighted sum; one product per weight by the inverse of the sum.
    assert causal.ops.multiplies == 4 * d * d + 2 * T * d + T * H + T * H
    assert causal.ops.exponentials == T * H
    assert by_name["mlp"]["mlp"].parameters == 8 * d * d
    assert by_name["linear"]["dense"].ops.multiplies == d * d
    assert by_name["linear"]["dense"].ops.bit_operations == 16 * 16 * d * d
    assert by_name["linear"]["bitnet"].ops.weight_bits < 2 * d * d
    assert by_name["position"]["learned"].parameters == d * T
    assert by_name["norm"]["identity"].ops.multiplies == 0
    assert by_name["placement"]["peri"].parameters == 2 * d


def test_refused_combinations_have_a_reason_that_is_no_excuse(catalogue, refusals):
    reasons = [r.reason for r in refusals] + [r for reg in catalogue.values() for k in reg.kinds for r in k.limits]
    assert ("attention=ssm", "position=rotary") in {(r.one, r.other) for r in refusals}
    excuse = re.compile(r"implement|support|not yet|todo|cannot be used|not allowed|invalid", re.I)
    for reason in set(reasons):
        assert not excuse.search(reason) and len(reason) > 15, reason


def test_ranges_of_options_are_found_by_trying(catalogue):
    by_name = {k.name: k for k in catalogue["norm"].kinds}
    assert any(reason.startswith("eps=") and "above 0" in reason for reason in by_name["rmsnorm"].limits)
    softmax = next(k for k in catalogue["attention"].kinds if k.name == "causal")
    assert any("consmax" in reason and "sink=fixed, learned, head" in reason for reason in softmax.limits)


def test_the_committed_catalogue_is_current():
    here = (REPO / "docs" / "catalogue.md").read_text()
    assert here == command.text(".md", Setting()), "run: python -m models.catalogue --out docs/catalogue.md"


def test_the_page_is_one_file_that_asks_the_network_for_nothing_and_names_every_kind():
    page = command.text(".html", Setting())
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", page)
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {f"norm.{name}" for name in Norm.kinds} < set(ids)
    links = set(re.findall(r'href="?#([^">]+)', page))
    assert links <= set(ids)


def test_a_part_of_ones_own_is_in_it(monkeypatch):
    @dataclass(frozen=True)
    class Mine(RMSNorm):
        """y = <script>x</script> * gain.   Source: me."""

    monkeypatch.setitem(Norm.kinds, "mine", Mine)
    page = command.text(".html", Setting(d_model=64, heads=4), "norm")
    assert "norm: mine" in page and "&lt;script&gt;x" in page and "<script>x" not in page
    assert "--kind norm --d-model 64 --heads 4" in page


def test_the_command_prints_a_summary_or_one_sort(capsys, tmp_path):
    assert command.main([]) == 0
    assert " kinds; " in capsys.readouterr().out
    assert command.main(["--kind", "norm", "--d-model", "64", "--heads", "4"]) == 0
    out = capsys.readouterr().out
    assert "d_model 64" in out and "rmsnorm" in out and "softmax" not in out
    assert command.main(["--kind", "gate", "--out", str(tmp_path / "gate.md")]) == 0
    assert "## gate" in (tmp_path / "gate.md").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--kind", "norms"], "did you mean 'norm'"),
        (["--d-model", "770"], "d_model=770 is not divisible by n_heads=12"),
        (["--layers", "0"], "--layers 0 must be at least 1"),
        (["--out", "catalogue.pdf"], ".md or .html is needed, not .pdf"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words, said, capsys):
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_loads_no_torch():
    code = "import sys; from models.catalogue.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr


def test_an_identity_outside_the_blocks_is_fine_with_any_placement(refusals):
    """Where it is the blocks' norm, a placement has no effect; where it is another one, a placement has nothing to do
    with it."""
    others = {r.other if "norm=identity" in r.one else r.one for r in refusals if "norm=identity" in (r.one + r.other)}
    assert "placement=peri" in others and "mlp_placement=post" in others
    assert not [r for r in refusals if "final_norm=identity" in (r.one, r.other)]
