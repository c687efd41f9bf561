"""A config to JSON text, and JSON text, FastVideo's too, to the arguments of a config."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vmoba_flex.approx_blocks import ApproxBlocks
from vmoba_flex.by_steps import BySteps
from vmoba_flex.remember import Remember
from vmoba_flex.rules import Pool, Rule, Threshold, TopK
from vmoba_flex.tail import Tail

T = TypeVar("T")

VERSION = 1
FIELDS = (
    "temporal",
    "spatial",
    "spatiotemporal",
    "rule",
    "cycle",
    "dense_layers",
    "dense_steps",
    "dispatch",
    "backend",
    "tail",
    "remember",
)
"""Arguments of ``VMoBAConfig``; the first four are needed."""


def dump(config: Any) -> str:
    """JSON text of a ``VMoBAConfig``, one field a line."""
    values = {"version": VERSION} | {name: _plain(getattr(config, name)) for name in FIELDS}
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()) + "\n}"


def load(text: str) -> dict[str, Any]:
    """Arguments of ``VMoBAConfig`` from what ``dump`` wrote, or from FastVideo's VMoBA JSON.

    Raises:
        TypeError: if ``text`` is not a str, or a rule's value has a wrong type.
        ValueError: if ``text`` is not JSON of one of the two, or has an unknown key or value.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str of JSON, got {text!r:.40}: VMoBAConfig.load(path) reads a file")
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_int)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"text must be JSON, got {text[:40]!r}: {error}; VMoBAConfig.load(path) reads a file"
        ) from error
    except RecursionError:
        raise ValueError(f"text must be JSON that is not nested as deeply, got {text[:40]!r}") from None
    if not isinstance(data, dict):
        raise ValueError(f"text must be a JSON object, got {text[:40]!r}")
    if "version" not in data and not data.keys().isdisjoint(FASTVIDEO):
        return _fastvideo(data)
    return _own(data)


def _plain(value: Any) -> Any:
    if isinstance(value, ApproxBlocks):
        return {"approx_blocks": value.count}
    if isinstance(value, Tail):
        return value.cell
    if isinstance(value, Remember):
        return dataclasses.asdict(value)
    if isinstance(value, TopK | Threshold):
        return {key: item for key, item in dataclasses.asdict(value).items() if item not in (None, ())}
    if isinstance(value, Mapping):
        return {kind: _plain(rule) for kind, rule in value.items()}
    if isinstance(value, BySteps):
        return {"by_steps": _plain(value.entries)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _own(data: dict[str, Any]) -> dict[str, Any]:
    if "version" not in data:
        raise ValueError(f"text must have 'version', or keys of FastVideo's VMoBA JSON, got keys {sorted(data)}")
    if data["version"] != VERSION or isinstance(data["version"], bool):
        raise ValueError(f"version must be {VERSION}, got {data['version']!r}")
    arguments = {key: value for key, value in data.items() if key != "version"}
    _check_keys("text", arguments, FIELDS)
    for key in FIELDS[:4]:
        if key not in arguments:
            raise ValueError(f"text must have {key!r}, got keys {sorted(data)}")
    for key in FIELDS[:3]:
        if isinstance(arguments[key], dict):
            arguments[key] = _approx_blocks(key, arguments[key])
    if arguments.get("remember") is not None:
        arguments["remember"] = _remember(arguments["remember"])
    arguments["tail"] = _by_steps("tail", arguments.get("tail"), _tail)
    rule = arguments["rule"]
    if isinstance(rule, dict) and "by_steps" not in rule and any(isinstance(value, dict) for value in rule.values()):
        arguments["rule"] = {kind: _by_steps(f"rule of {kind!r}", value, _rule) for kind, value in rule.items()}
    elif isinstance(rule, list):
        arguments["rule"] = [_by_steps(f"rule of layer {i}", value, _rule) for i, value in enumerate(rule)]
    else:
        arguments["rule"] = _by_steps("rule", rule, _rule)
    return arguments


def _approx_blocks(name: str, data: dict[str, Any]) -> ApproxBlocks:
    if len(data) != 1 or data.keys().isdisjoint(("approx_blocks", "about_blocks")):  # the second: before version 0.2
        raise ValueError(f'{name} must be sizes or {{"approx_blocks": count}}, got {data}')
    return _made(name, ApproxBlocks, *data.values())


def _by_steps(name: str, data: Any, one: Callable[[str, Any], T]) -> T | BySteps[T]:
    """A value, or one after another over the steps."""
    if not isinstance(data, dict) or "by_steps" not in data:
        return one(name, data)
    entries = data["by_steps"]
    if len(data) > 1 or not isinstance(entries, list) or any(not _is_pair(entry) for entry in entries):
        raise ValueError(f'{name} must be {{"by_steps": [[start, value], ...]}} where it changes by steps, got {data}')
    values = [(start, one(f"{name} from {start}", value)) for start, value in entries]
    made: Any = _made(name, BySteps, values)  # a type checker cannot tell its T
    return made


def _made(name: str, cls: Callable[..., T], *values: Any, **fields: Any) -> T:
    """An object of a config; errors tell which key it is of."""
    try:
        return cls(*values, **fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _remember(data: Any) -> Remember:
    if not isinstance(data, dict):
        raise ValueError(f"remember must be an object, got {data!r}")
    _check_keys("remember", data, tuple(field.name for field in dataclasses.fields(Remember)))
    return _made("remember", Remember, **data)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2


def _tail(name: str, data: Any) -> Tail | None:
    return None if data is None else _made(name, Tail, data)


def _rule(name: str, data: Any) -> Rule:
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be an object with 'tau', or with 'k' or 'density', got {data!r}")
    rule = Threshold if "tau" in data else TopK
    _check_keys(name, data, tuple(field.name for field in dataclasses.fields(rule)))
    return _made(name, rule, **data)


def _check_keys(name: str, data: dict[str, Any], known: tuple[str, ...]) -> None:
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"{name} must have keys of {known}, got {key!r}: {value!r}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError(f"text must have each key once in an object, got keys {[key for key, _ in pairs]}")
    return data


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"text must have ints of at most {_MAX_DIGITS} digits, got {digits[:_MAX_DIGITS]}...")
    return int(digits)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _sizes(length: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == length and all(map(_is_count, value))


_MAX_DIGITS = 20
_MAX_CYCLE = 10_000  # more layers than any model has, few enough to list
_POOLS: dict[str, Pool] = {"query_head": "query", "block": "block", "head_global": "head", "overall": "global"}
_MODES = ("topk", "threshold")

_COUNT = ("an int of at least 1", _is_count)
_MAYBE_COUNT = ("an int of at least 1", lambda value: value is None or _is_count(value))
_COUNT_OR_0 = ("an int of at least 0", lambda value: _is_count(value, 0))
_SHARE = (
    "a number in (0, 1]",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1,
)

# Key: FastVideo's default (None: it has none), what the value must be, and a test of that.
FASTVIDEO: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "temporal_chunk_size": (None, *_COUNT),
    "spatial_chunk_size": (None, "a list of 2 ints of at least 1 (height, width)", _sizes(2)),
    "st_chunk_size": (None, "a list of 3 ints of at least 1 (frames, height, width)", _sizes(3)),
    "temporal_topk": (None, *_MAYBE_COUNT),
    "spatial_topk": (None, *_MAYBE_COUNT),
    "st_topk": (None, *_MAYBE_COUNT),
    "moba_select_mode": ("threshold", f"one of {_MODES}", lambda value: value in _MODES),
    "moba_threshold": (0.25, *_SHARE),
    "moba_threshold_type": ("query_head", f"one of {tuple(_POOLS)}", lambda value: value in tuple(_POOLS)),
    "first_full_layer": (0, *_COUNT_OR_0),
    "first_full_step": (12, *_COUNT_OR_0),
    "temporal_layer": (1, *_COUNT_OR_0),
    "spatial_layer": (1, *_COUNT_OR_0),
    "st_layer": (1, *_COUNT_OR_0),
}


def _fastvideo(data: dict[str, Any]) -> dict[str, Any]:
    _check_keys("FastVideo's VMoBA JSON", data, tuple(FASTVIDEO))
    values = {key: data.get(key, default) for key, (default, _, _) in FASTVIDEO.items()}
    for key, (_, rule, is_valid) in FASTVIDEO.items():
        if not is_valid(values[key]):
            raise ValueError(f"{key} must be {rule}, got {values[key]!r}")
    kinds = {"temporal": "temporal", "spatial": "spatial", "spatiotemporal": "st"}
    layers = sum(values[f"{name}_layer"] for name in kinds.values())
    if not 1 <= layers <= _MAX_CYCLE:
        raise ValueError(f"temporal_layer + spatial_layer + st_layer must lie in 1..{_MAX_CYCLE}, got {layers}")
    cycle = [kind for kind, name in kinds.items() for _ in range(values[f"{name}_layer"])]
    # FastVideo counts the layers of the cycle from the first sparse one, and a config from the model's first.
    start = -values["first_full_layer"] % len(cycle)
    pool = _POOLS[values["moba_threshold_type"]]
    if values["moba_select_mode"] == "threshold":
        rule = Threshold(values["moba_threshold"], pool=pool)
    elif pool == "block":
        raise ValueError("moba_threshold_type must not be 'block' where moba_select_mode is 'topk', got 'block'")
    else:
        for name in kinds.values():
            if values[f"{name}_topk"] is None:
                raise ValueError(f"{name}_topk must be given where moba_select_mode is 'topk', got None")
        rule = {kind: TopK(values[f"{name}_topk"], pool=pool) for kind, name in kinds.items()}
    blocks = {kind: values[f"{name}_chunk_size"] for kind, name in kinds.items()}
    dense = {"dense_layers": values["first_full_layer"], "dense_steps": values["first_full_step"]}
    return blocks | dense | {"rule": rule, "cycle": cycle[start:] + cycle[:start]}
