"""models/spec.py and pipelines/lib/config.py: one schema gives YAML, overrides, help and errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from models.spec import ConfigError, Part, Raw, build, flatten, plain
from pipelines.lib.config import InputError, assemble, command, describe, read_yaml, recipe, write_yaml


class Norm(Part):
    """A norm."""


@dataclass(frozen=True)
class RMS(Norm):
    """eps: added under the root."""

    eps: float = 1e-6


@dataclass(frozen=True)
class Partial(Norm):
    fraction: float = 0.25

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} is outside (0, 1]; try 0.25")


Norm.kinds = {"rmsnorm": RMS, "prmsnorm": Partial}


@dataclass(frozen=True)
class Optim:
    """lr: peak learning rate"""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Config:
    """A thing.

    norm: which norm
    steps: how many updates
    """

    out: str = "runs/x"
    norm: Norm | tuple[Norm, ...] = RMS()
    optim: Optim = field(default_factory=Optim)
    steps: int = 10
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    prompt: tuple[str, ...] = ()
    fast: bool = False


def test_plain_then_build_is_the_identity():
    config = build(
        Config, {"norm": [{"kind": "prmsnorm", "fraction": 0.5}, "rmsnorm"], "steps": 1e3, "optim": {"lr": 1}}
    )
    assert config.norm == (Partial(0.5), RMS())
    assert config.steps == 1000
    assert build(Config, plain(config)) == config
    assert build(Config, read_yaml(write_yaml(plain(config)))) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], "optim has no option 'lrr'; did you mean 'lr'?"),
        (["norm=rmsnrm"], "norm='rmsnrm' does not exist; did you mean 'rmsnorm'?"),
        (["norm.fraction=0.5"], "norm=rmsnorm has no option 'fraction'; it has eps; norm=prmsnorm has it"),
        (["norm={kind: prmsnorm, fraction: 2}"], "norm: fraction=2.0 is outside (0, 1]; try 0.25"),
        (["steps=1.5"], "steps='1.5' is no whole number"),
        (["steps=true"], "steps='true' is no whole number"),
        (["fast=1"], "fast='1' is no true or false"),
        (["mode=c"], "mode='c'; there is a, b"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9]: 2 values are needed"),
        (["optim=3"], "optim='3': a mapping is needed, of lr, betas"),
    ],
)
def test_an_error_names_the_key_the_value_and_the_nearest_right_one(words, message):
    with pytest.raises(ConfigError) as caught:
        assemble(words, Config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source.path=x"], "source=stdlib has no option 'path'; it has max_mb; source=files has it"),
        (["source.max=1"], "source=stdlib has no option 'max'; did you mean 'max_mb'?"),
        (["tokenizer=bytes", "tokenizer.size=9"], "tokenizer=bytes has no option 'size'; it has none"),
        (["tokenizr=bytes"], "there is no option 'tokenizr'; did you mean 'tokenizer'?"),
    ],
)
def test_an_error_speaks_of_options_as_they_are_typed_and_not_of_classes(words, message):
    from pipelines.tokenize import TokenizeConfig

    with pytest.raises(ConfigError) as caught:
        assemble(["out=x", *words], TokenizeConfig)
    assert str(caught.value) == message


def test_an_option_that_many_kinds_have_is_not_listed_for_all_of_them():
    from models.parts.norm import Norm as Norms

    with pytest.raises(
        ConfigError, match=r"^norm=identity has no option 'eps'; it has none; norm=\w+, \w+, \w+ and \d more have it$"
    ):
        build(Norms, {"kind": "identity", "eps": 1.0}, "norm")


def test_overrides_merge_into_the_default_part_and_replace_another_kind():
    assert assemble(["norm.eps=1e-5"], Config).norm == RMS(1e-5)
    assert assemble(["norm=prmsnorm", "norm.fraction=0.5"], Config).norm == Partial(0.5)
    with pytest.raises(ConfigError, match="norm=prmsnorm has no option 'eps'; it has fraction; norm=rmsnorm has it"):
        assemble(["norm.eps=1e-5", "norm=prmsnorm"], Config)
    assert assemble(["norm.fraction=0.5", "norm=prmsnorm"], Config).norm == Partial(0.5)
    assert assemble(["norm={kind: rmsnorm, eps: 1e-5}", "norm=prmsnorm"], Config).norm == Partial()
    assert assemble(["optim.lr=6e-3"], Config).optim == Optim(lr=6e-3)


def test_text_fields_keep_the_text_as_typed():
    assert assemble(["out=007"], Config).out == "007"
    assert assemble(["out=no"], Config).out == "no"
    assert assemble(["--prompt", "Once: upon", "--prompt", "12"], Config).prompt == ("Once: upon", "12")
    assert assemble(["limit=null"], Config).limit is None
    assert assemble(["limit=5", "--fast"], Config) == Config(limit=5, fast=True)
    assert assemble(["runs/y"], Config, positional="out").out == "runs/y"


def test_yaml_scalars_are_those_of_yaml_1_2():
    assert read_yaml("[6e-3, no, 0123, 12:30, 1_000, .5, 1., true, null, ~, -.inf, 1e5]") == [
        6e-3, "no", "0123", "12:30", 1000, 0.5, 1.0, True, None, None, float("-inf"), 1e5,
    ]  # fmt: skip
    for value in (6e-3, 1e-8, 1e20, "no", "1e5", "0123", "null", True, None, "a: b", 1.0):
        assert read_yaml(write_yaml({"x": value})) == {"x": value}


def test_a_recipe_states_only_its_difference_from_its_base(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 5\nnorm: {kind: prmsnorm, fraction: 0.5}\noptim: {lr: 1e-2}\n")
    (tmp_path / "b.yaml").write_text("base: a\noptim: {betas: [0.8, 0.9]}\nnorm: rmsnorm\n")
    config = assemble([str(tmp_path / "b.yaml"), "steps=6"], Config)
    assert config == Config(steps=6, norm=RMS(), optim=Optim(1e-2, (0.8, 0.9)))
    (tmp_path / "c.yaml").write_text("base: d\n")
    (tmp_path / "d.yaml").write_text("base: c\n")
    with pytest.raises(InputError, match="leads back to itself"):
        recipe(tmp_path / "c.yaml")
    (tmp_path / "e.yaml").write_text("steps: [1\n")
    with pytest.raises(InputError, match=r"e\.yaml line 2"):
        recipe(tmp_path / "e.yaml")


def test_help_says_every_field_its_default_and_its_words(capsys):
    lines = describe(Config)
    assert any(line.split() == ["norm=rmsnorm", "which", "norm", "[rmsnorm,", "prmsnorm]"] for line in lines)
    assert any("norm.eps=1e-06" in line and "added under the root" in line for line in lines)
    assert any("optim.lr=0.001" in line and "peak learning rate" in line for line in lines)
    assert command(Config, lambda c: None, ["--help"]) == 0
    assert "steps=10" in capsys.readouterr().out
    assert command(Config, lambda c: None, ["--help", "norm=prmsnorm"]) == 0  # the options of a kind that is asked for
    said = capsys.readouterr().out
    assert "norm.fraction=0.25" in said and "norm.eps" not in said


@pytest.mark.parametrize(
    "value",
    [
        ["\n", "a, b"],
        ["{x}", "no: yes"],
        {"kind": "prmsnorm", "fraction": 0.5},
        [1, 2.5e-5],
        None,
        True,
        3,
        1e-7,
        "1e-3",
    ],
)
def test_a_value_as_a_word_comes_back_from_the_command_line(value):
    from pipelines.lib.config import as_word, scalar

    back = scalar(as_word(value))
    assert (back.value if hasattr(back, "value") and not isinstance(value, str) else back) == value


@pytest.mark.parametrize("word", ['"\\n\\n"', "\n\n"])
def test_a_line_break_can_be_typed_for_an_option_of_a_part(word):
    from pipelines.tokenize import TokenizeConfig

    assert assemble(["source=README.md", f"source.separator={word}"], TokenizeConfig).source.separator == "\n\n"
    assert assemble(["source=README.md", "source.separator=---"], TokenizeConfig).source.separator == "---"
    assert assemble(["source=README.md", "source.separator=null"], TokenizeConfig).source.separator is None


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    assert command(Config, lambda c: None, ["stepps=3"]) == 2
    assert capsys.readouterr().err == "error: there is no option 'stepps'; did you mean 'steps'?\n"
    assert command(Config, lambda c: None, ["no_such_recipe"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    def fails(config):
        raise InputError("two\nlines")

    assert command(Config, fails, []) == 2
    assert capsys.readouterr().err == "error: two lines\n"


def test_a_key_that_stands_twice_is_named():
    with pytest.raises(InputError, match="line 2: 'steps' stands twice"):
        read_yaml("steps: 3\nsteps: 4\n")


def test_one_of_several_names_replaces_the_recipes(tmp_path):
    @dataclass(frozen=True)
    class Length:
        ONE_OF = (("steps", "seconds"),)
        steps: int | None = None
        seconds: float | None = None

    (tmp_path / "r.yaml").write_text("steps: 5\n")
    assert assemble([str(tmp_path / "r.yaml"), "seconds=2"], Length) == Length(None, 2.0)
    assert assemble(["seconds=2", "steps=3"], Length) == Length(3, None)
    assert assemble(["seconds=null", "steps=3"], Length) == Length(3, None)


def test_flatten_gives_one_dotted_name_per_setting():
    assert flatten(plain(Config(norm=(RMS(), Partial())))) == {
        "out": "runs/x", "norm[0]": "rmsnorm", "norm[0].eps": 1e-6, "norm[1]": "prmsnorm", "norm[1].fraction": 0.25,
        "optim.lr": 1e-3, "optim.betas": [0.9, 0.95], "steps": 10, "mode": "a", "limit": None, "prompt": [],
        "fast": False,
    }  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """Numbers.

    rate: a number
    separator: a text
    """

    rate: float = 1.0
    separator: str | None = None


@pytest.mark.parametrize("word", [".inf", "-.inf", ".nan", "1e400"])
def test_numbers_are_finite(word):
    with pytest.raises(ConfigError, match=r"rate=.* is no finite number"):
        build(Numbers, {"rate": float(word.replace(".", "") if "e" not in word else word)})


def test_white_space_that_was_typed_is_a_text():
    assert build(Numbers, {"separator": Raw("\n\n", None)}).separator == "\n\n"
    assert build(Numbers, {"separator": Raw("null", None)}).separator is None
    assert build(Numbers, {"separator": Raw("", None)}).separator is None
