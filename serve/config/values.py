"""One value of a setting: read from text as people write it, then held against its type and bounds by msgspec."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import yaml

from serve.errors import ConfigError
from serve.rollout.policy import Policy
from serve.rollout.policy import parse as parse_policies
from serve.telemetry.prices import Price
from serve.telemetry.prices import parse as parse_prices
from serve.telemetry.slo import Slo
from serve.telemetry.slo import parse as parse_slos

SIZES = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}

_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def converted(name: str, kind: Any, value: Any) -> Any:
    """`value` as the setting `name` of this type has it; ConfigError says what it takes."""
    plain = _plain(kind)
    try:
        read = _READ[plain](value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{name} takes {_TAKES[plain]}, not {value!r}") from error
    try:
        return msgspec.convert(read, kind, dec_hook=_passed)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name} takes {takes(kind)}, not {read!r}") from error


def takes(kind: Any) -> str:
    """What a setting of this type takes, in words."""
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        return f"{', '.join(others)} or {last}"
    for item in get_args(kind):
        if isinstance(item, msgspec.Meta) and item.description:
            return item.description
    return _TAKES[_plain(kind)]


def _plain(kind: Any) -> Any:
    """The type without its bounds and choices."""
    if get_origin(kind) is Annotated:
        return get_args(kind)[0]
    return str if get_origin(kind) is Literal else kind


def size(text: str) -> int:
    """Bytes, as 512MiB or in digits."""
    try:
        return _integer(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a size: give bytes, or as 512MiB or 4GiB") from error


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(value)
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+)\s*([kmgt]i?|)b?\s*", str(value).lower())
    if not match:
        raise ValueError(value)
    return int(match[1]) * SIZES[match[2]]


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(value)
    return float(value)


def _switch(value: Any) -> bool:
    return _SWITCH[str(value).lower()]


def _path(value: Any) -> Path:
    return Path(str(value)).expanduser().resolve()


def _texts(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    return tuple(str(item).strip() for item in items if str(item).strip())


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise TypeError(value)
    return str(value)


def _mapping(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: parse(read_yaml(value) if isinstance(value, str) else value)


def read_yaml(text: str) -> Any:
    """What a YAML holds. A key that is there twice is an error: of two values YAML takes the last without a word."""
    return yaml.load(text, _Once)


class _Once(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConfigError(f"the settings have {key.value!r} twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _passed(kind: type, value: Any) -> Any:
    """Types that msgspec does not know are made by the readers above."""
    return value


_READ: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    int: _integer,
    float: _number,
    bool: _switch,
    Path: _path,
    tuple[str, ...]: _texts,
    tuple[Policy, ...]: _mapping(parse_policies),
    tuple[Slo, ...]: _mapping(parse_slos),
    tuple[Price, ...]: _mapping(parse_prices),
}
_TAKES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    tuple[str, ...]: "a list",
    tuple[Policy, ...]: "a mapping",
    tuple[Slo, ...]: "a mapping",
    tuple[Price, ...]: "a mapping",
}
