"""The JSON body of a request: decoded into a struct of serve.api.schemas by one dependency, documented from the same.

    async def promote(name: str, caller: Manager, body: Annotated[Promote, JsonBody(Promote)]) -> ...

Write it behind the caller, whose key is looked at first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.params import Depends

from serve.errors import BadRequest

T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r"(?P<message>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?", re.S)
_FIELD = re.compile(r"Object (?P<wrong>missing required|contains unknown) field `(?P<name>.*)`", re.S)
_WRONG = {"missing required": "Field required", "contains unknown": "Extra inputs are not permitted"}
JSON_LINES = ("application/jsonl", "application/x-ndjson", "application/jsonlines")


class BodyReader:
    """The dependency itself; a body that may be left out is the struct's defaults then."""

    def __init__(self, kind: type[msgspec.Struct], *, required: bool, strict: bool, lines: str) -> None:
        self.kind = kind
        self.required = required
        self.strict = strict
        self.lines = lines

    async def __call__(self, request: Request) -> Any:
        data = await request.body()
        if not data and not self.required:
            return self.kind()
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self.lines and media in JSON_LINES:
            return decoded_lines(data, self.kind, self.lines)
        if data and media != "application/json" and not media.endswith("+json"):
            raise BadRequest(
                "the body: send it as JSON, with the header Content-Type: application/json", param="the body"
            )
        return decoded(data, self.kind, strict=self.strict)


def JsonBody(kind: type[msgspec.Struct], *, required: bool = True, strict: bool = False, lines: str = "") -> Any:
    """A parameter's annotation; where `strict`, a number may not come as text.

    `lines` names the struct's list that may come as JSON lines instead, one entry a line.
    """
    return Depends(BodyReader(kind, required=required, strict=strict, lines=lines))


def decoded(data: bytes, kind: type[T], *, strict: bool = False) -> T:
    """The struct that the JSON says, or BadRequest that names the field."""
    try:
        return msgspec.json.decode(data or b"null", type=kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _refused(str(error) if data else "Field required") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body: it is not JSON ({error})", param="the body") from error


def decoded_lines(data: bytes, kind: type[T], name: str) -> T:
    """The struct whose list `name` has an entry a line, or BadRequest that names the line or the field."""
    entries = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                entries.append(msgspec.json.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BadRequest(f"line {number}: it is not JSON ({error})", param="the body") from error
    try:
        return msgspec.convert({name: entries}, kind)
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from error


def converted(fields: Mapping[str, Any], kind: type[T]) -> T:
    """The struct that a form's fields say, numbers as text, or BadRequest that names the field."""
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from error


def _refused(message: str) -> BadRequest:
    where, what = _located(message)
    return BadRequest(f"{where}: {what}", param=where)


def _located(text: str) -> tuple[str, str]:
    """(field by its path, what is wrong with it) from msgspec's message."""
    match = _AT.fullmatch(text)
    assert match is not None
    message, path = match["message"], (match["path"] or "").replace("[...]", "").replace("[", ".").replace("]", "")
    if field := _FIELD.fullmatch(message):
        message, path = _WRONG[field["wrong"]], f"{path}.{field['name']}"
    return path.strip(".") or "the body", message
