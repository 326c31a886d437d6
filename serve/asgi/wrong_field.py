"""What is wrong with a request, as one sentence about one field: what came, and what is taken.

Pydantic names classes of models that no client has heard of, and says of a field with several forms only what one of
them is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve.errors import BadRequest
from serve.names import shown

# What begins so in the place of an error is a choice of a union, and no field of a body.
CHOICE = "\0"
MAX_MESSAGE = 500
# Where FastAPI says that a field is.
_PLACES = ("body", "query", "path", "header", "cookie", "form")
_KINDS = {
    "an object": ("dict", "mapping", "model", "model_attributes", "dataclass", "frozen_dict", "ordered_dict"),
    "a list": ("list", "tuple", "set", "frozen_set", "iterable", "deque"),
    "a text": ("string",),
    "true or false": ("bool",),
    "a whole number": ("int",),
    "a number": ("float",),
}
_TAKEN = {f"{name}_type": what for what, names in _KINDS.items() for name in names}
_TAKEN |= {"bool_parsing": "true or false", "float_parsing": "a number", "none_required": "null"}
_TAKEN |= dict.fromkeys(("int_parsing", "int_from_float", "int_parsing_size"), "a whole number")
_CHOICES = ("literal_error", "enum", "union_tag_invalid")
_BOUNDS = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number from {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number up to {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "string_too_short": "a text of {min_length} characters or more",
    "string_too_long": "a text of up to {max_length} characters",
    "too_short": "{min_length} entries or more",
    "too_long": "up to {max_length} entries",
}
_CLASS = re.compile(r" or (?:an )?instance of \S+")


def refused(errors: Sequence[Mapping[str, Any]]) -> BadRequest:
    """Of the errors about one request those that looked deepest into it, in a sentence."""
    where = max(map(_where, errors), key=len)
    deepest = [error for error in errors if _where(error) == where]
    field = shown(".".join(where), MAX_MESSAGE) or "the body"
    return BadRequest(shown(_sentence(field, deepest), 2 * MAX_MESSAGE), param=field)


def _where(error: Mapping[str, Any]) -> list[str]:
    """The fields and numbers of items that lead to it."""
    where = [part for part in map(str, error["loc"]) if not part.startswith(CHOICE)]
    return where[1:] if where[:1] and where[0] in _PLACES else where


def _sentence(field: str, errors: Sequence[Mapping[str, Any]]) -> str:
    first = errors[0]
    if taken := list(dict.fromkeys(filter(None, map(_taken, errors)))):
        return f"{field} takes {shown(' or '.join(taken), MAX_MESSAGE)}, not {_said(first.get('input'))}"
    if first["type"] == "missing":
        return f"{field} is required, and is not there"
    if first["type"] == "extra_forbidden":
        return f"{field} is no field that is taken here: leave it out"
    cause = (first.get("ctx") or {}).get("error")
    said = str(cause) if isinstance(cause, Exception) else _CLASS.sub("", str(first["msg"]))
    return f"{field}: {shown(said, MAX_MESSAGE)}"


def _taken(error: Mapping[str, Any]) -> str | None:
    """What the field takes by this error; None where it says something else."""
    kind = error["type"]
    ctx = error.get("ctx") or {}
    if kind in _CHOICES:
        return str(ctx.get("expected") or ctx.get("expected_tags"))
    bound = _BOUNDS.get(kind)
    return bound.format(**ctx) if bound else _TAKEN.get(kind)


def _said(value: Any) -> str:
    """What came, in JSON's words."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"'{shown(value, 60)}'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shown(value, 40)
