"""Holds an answer against a JSON schema that somebody sent, within a time limit and without a look outside.

jsonschema fetches a `$ref` by its URL, matches `pattern` with an engine that may take for ever, and follows references
as often as they branch. Here a reference stays within its schema, and every keyword and pattern has a deadline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from time import monotonic
from typing import Any

import regex

from serve.adapters.patterns import occurs, pattern_problem
from serve.names import shown

SECONDS = 1.0
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")

_deadline: ContextVar[float] = ContextVar("deadline", default=0.0)


class UnusableSchema(ValueError):
    """The schema gives no answer in time, or none at all; the message says why."""


def schema_problem(schema: Mapping[str, Any]) -> str:
    """What is wrong with it, in words behind "a json_schema that"; "" if it can be used."""
    if problem := _structural_problem(schema):
        return problem
    try:
        # Not by the library's own check, which has no deadline.
        if wrong := _mismatch(_validator().META_SCHEMA, _plain(schema)):
            return f"is no JSON schema: {wrong}"
        _mismatch(schema, {})  # an endless reference shows with any answer
    except UnusableSchema as error:
        return f"cannot be used: {error}"
    return ""


def schema_mismatch(schema: Mapping[str, Any], answer: str) -> str:
    """Why the answer does not fit the schema; "" if it does. UnusableSchema after `SECONDS`."""
    try:
        instance = json.loads(answer, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        return f"the answer is no JSON: {shown(error)}"
    return _mismatch(schema, instance)


def _mismatch(schema: Mapping[str, Any], instance: Any) -> str:
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    # A registry of our own: the default one fetches what it does not know.
    validator = _validator()(_plain(schema), registry=REGISTRY)
    token = _deadline.set(monotonic() + SECONDS)
    try:
        error = next(validator.iter_errors(instance), None)
    except Unresolvable as nowhere:
        raise UnusableSchema(f"a reference leads nowhere: {shown(nowhere)}") from nowhere
    except TimeoutError as slow:
        raise UnusableSchema(f"it takes longer than {SECONDS:g} s") from slow
    except RecursionError as endless:
        raise UnusableSchema("it is nested too deeply, or its references go round and round") from endless
    except OverflowError as large:
        return f"a number in it is too large to be checked: {shown(large)}"
    finally:
        _deadline.reset(token)
    return shown(error.message, 300) if error else ""


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is none of its numbers")


def _structural_problem(schema: Mapping[str, Any]) -> str:
    ahead: list[Any] = list(schema.values())
    problem = _problem_of(schema)
    while ahead and not problem:
        value = ahead.pop()
        if isinstance(value, dict):
            problem = _problem_of(value)
            if isinstance(value.get("$schema"), str):
                problem = "has $schema in a part of it: one dialect counts for all"
        if isinstance(value, (dict, list)):
            ahead += value.values() if isinstance(value, dict) else value
    return problem


def _problem_of(node: Mapping[str, Any]) -> str:
    if isinstance(node.get("patternProperties"), dict):
        # Matched with Python's own engine, which knows no deadline.
        return "uses patternProperties, which are not taken: name the properties"
    for name in _REFERENCES:
        if isinstance(node.get(name), str) and not node[name].startswith("#"):
            return f"refers to {shown(node[name])}: a reference begins with # and stays within the schema"
    pattern = node.get("pattern")
    if isinstance(pattern, str) and (problem := pattern_problem(pattern)):
        return f"has the pattern {problem}"
    return ""


def _plain(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Without `$schema`: with another dialect the validator would be another one, without a deadline."""
    return {key: value for key, value in schema.items() if key != "$schema"}


@lru_cache(maxsize=1)
def _validator() -> Any:
    """The draft 2020-12, each of whose keywords looks at the clock."""
    from jsonschema import Draft202012Validator, validators

    keywords = {name: _timed(check) for name, check in Draft202012Validator.VALIDATORS.items()}
    ours = {"pattern": _timed(_pattern), "uniqueItems": _timed(_unique)}
    return validators.extend(Draft202012Validator, {**keywords, **ours})


def _timed(check: Callable[..., Any]) -> Callable[..., Any]:
    def timed(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if monotonic() > _deadline.get():
            raise TimeoutError
        yield from check(validator, value, instance, schema) or ()

    return timed


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if not isinstance(instance, str):
        return
    try:
        matches = occurs(pattern, instance, _deadline.get() - monotonic())
    except regex.error as error:
        raise UnusableSchema(f"the pattern {shown(pattern)} cannot be used: {shown(error)}") from error
    if not matches:
        yield ValidationError(f"{shown(instance)} does not match {shown(pattern)}")


def _unique(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[Any]:
    """jsonschema compares each two elements: 3,000 of them take 10 s."""
    from jsonschema.exceptions import ValidationError

    if wanted and isinstance(instance, list) and len(set(map(_hashable, instance))) < len(instance):
        yield ValidationError(f"{shown(instance)} has the same element twice")


def _hashable(value: Any) -> Any:
    """Equal for equal JSON values alone: true is not 1, and 1.0 is."""
    if isinstance(value, list):
        return (list, *map(_hashable, value))
    if isinstance(value, dict):
        return frozenset((key, _hashable(member)) for key, member in value.items())
    return (bool, value) if isinstance(value, bool) else value
