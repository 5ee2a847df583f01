"""Settings of many runs as a search file says them: what all have is `fixed`, the rest `vary`, in as few products."""

from __future__ import annotations

import json
from typing import Any

from models.parts.attention import Attention
from models.parts.mlp import MLP
from models.spec import ConfigError, build, flatten, plain
from pipelines.lib.config import override, recipe
from pipelines.lib.training import LENGTHS, TrainConfig

RECIPE = "gpt_debug"  # where our search files begin; `fixed` says all that it would say otherwise
REGISTRIES: dict[str, Any] = {"model.attention": Attention, "model.mlp": MLP}  # parts whose options are keys


def arrange(configs: list[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    """`fixed` and `vary` that together give exactly these settings."""
    keys = list(dict.fromkeys(key for config in configs for key in config))
    varying = {key for key in keys if len({_text(config.get(key, ...)) for config in configs}) > 1}
    # Another kind of part begins without options, so all of them are said together with it.
    varying |= {key for key in keys if any(key.startswith(f"{kind}.") for kind in varying)}
    fixed = {key: _short(configs[0][key]) for key in keys if key not in varying}
    usual, said = plain(built({"steps": 1})), set(flatten(recipe(RECIPE)))
    for key in [key for key in keys if key not in LENGTHS and not _is_said(key, said)]:
        having = [config for config in configs if key in config]
        if (key in fixed or _registry(key)) and all(_is_usual(c[key], _usual(usual, c, key)) for c in having):
            fixed.pop(key, None)
            varying.discard(key)
    fixed |= _base(configs, varying)
    fixed = {key: fixed[key] for key in keys if key in fixed}
    found = boxes([{key: config[key] for key in keys if key in varying and key in config} for config in configs])
    shared = [
        key for key in keys if key in varying and all(_text(box.get(key)) == _text(found[0].get(key)) for box in found)
    ]
    vary = {key: _options(found[0][key]) for key in shared}
    if len(found) > 1:
        vary["parameter_groups"] = [
            {key: _options(values) for key, values in box.items() if key not in shared} for box in found
        ]
    return fixed, vary


def _base(configs: list[dict[str, Any]], varying: set[str]) -> dict[str, Any]:
    """Sizes and lengths that vary, of settings that can be: a search looks at what is fixed before anything varies."""
    first = next((config for config in configs if refusal(config) is None), configs[0])
    fits = {key for key in varying if key.rpartition(".")[0] not in varying and type(first.get(key)) in (int, float)}
    base = {key: first[key] for key in first if key in fits}
    heads = first.get("model.attention.n_heads")
    if "model.attention" in varying and heads is not None:  # or the recipe's heads would have to divide the width
        base["model.attention"] = {"kind": first["model.attention"], "n_heads": heads}
    return base


def boxes(points: list[dict[str, Any]]) -> list[dict[str, list[Any]]]:
    """Products, key -> values, that together hold each of the points once. The last key is merged first."""
    found = [{key: [value] for key, value in point.items()} for point in points]
    keys = list(dict.fromkeys(key for point in points for key in point))
    before = -1
    while before != len(found):
        before = len(found)
        for key in reversed(keys):
            merged: dict[str, dict[str, list[Any]]] = {}
            for number, box in enumerate(found):
                rest = _text({k: v for k, v in box.items() if k != key}) if key in box else f"{number} has no {key}"
                if rest in merged:
                    merged[rest][key] = merged[rest][key] + box[key]
                else:
                    merged[rest] = dict(box)
            found = list(merged.values())
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def built(settings: dict[str, Any]) -> Any:
    """The training config of dotted settings. Raises ConfigError."""
    tree: dict[str, Any] = {"data": "", "out": ""}
    for key, value in settings.items():
        tree = override(tree, key, value)
    return build(TrainConfig, tree)


def refusal(settings: dict[str, Any]) -> str | None:
    """Why settings cannot be."""
    try:
        assert built(settings).rows
    except ConfigError as error:
        return str(error)
    return None


def _is_said(key: str, said: set[str]) -> bool:
    return any(key == other or other.startswith(f"{key}.") for other in said)


def _registry(key: str) -> Any:
    """The registry of the part that a key is an option of, where options are keys."""
    return REGISTRIES.get(key.rpartition(".")[0])


def _usual(tree: Any, config: dict[str, Any], key: str) -> Any:
    """What a setting is where nobody says so: of an option, what its own kind of part has. `...`: there is none."""
    if (base := _registry(key)) is not None:
        return plain(base.kinds[config[key.rpartition(".")[0]]]()).get(key.rpartition(".")[2], ...)
    for word in key.split("."):
        if not isinstance(tree, dict) or word not in tree:
            return ...
        tree = tree[word]
    return tree


def _is_usual(value: Any, usual: Any) -> bool:
    """Whether a setting, a part among them, says what holds anyhow."""
    if isinstance(usual, dict):
        given = {"kind": value} if isinstance(value, str) else value
        return isinstance(given, dict) and all(_is_usual(item, usual.get(name, ...)) for name, item in given.items())
    return bool(value == usual)


def _short(value: Any) -> Any:
    """A part without options by its name alone."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return value["kind"] if set(value) == {"kind"} else {key: _short(item) for key, item in value.items()}
    return value


def _options(values: list[Any]) -> Any:
    """Values of a key as `vary` has them."""
    options = [_option(_short(value)) for value in values]
    return options if len(options) > 1 or isinstance(options[0], list) else options[0]


def _option(value: Any) -> Any:
    """A list as an option of a part would be options, so it stands in a list."""
    if not isinstance(value, dict):
        return value
    return {key: [item] if isinstance(item, list) else _option(item) for key, item in value.items()}
