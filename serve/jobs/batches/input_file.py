"""A batch's input: one JSON object a line, {"custom_id", "method": "POST", "url", "body"}.

It is read from the disk line by line; a line that cannot be asked is an error with its number, and then none is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import msgspec

from serve.jobs.batches.objects import Limits, LineError
from serve.names import shown

# Errors of one input that are told.
MAX_ERRORS = 100
MAX_ID = 512


class _Fields(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


_decode = msgspec.json.Decoder(_Fields).decode


@dataclass(frozen=True, slots=True)
class Line:
    """A request; `body` is its JSON, an object. `error` says why it cannot be asked after all."""

    number: int
    custom_id: str
    body: bytes
    error: str = ""


class _Wrong(Exception):
    """What is wrong with a line."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        self.error = LineError(code, message, param=param)


def check(path: Path, endpoint: str, limits: Limits) -> tuple[int, list[LineError]]:
    """How many requests the input has, and what is wrong with it. Blocks."""
    total, errors = 0, []
    seen: set[bytes] = set()
    for number, raw in _lines(path, limits.line_bytes):
        total += 1
        if total > limits.lines:
            return total, [
                LineError("too_many_tasks", f"the file has more than {limits.lines} requests: send it in parts")
            ]
        try:
            line = _parsed(number, raw, endpoint, limits.line_bytes)
            digest = blake2b(line.custom_id.encode(), digest_size=16).digest()
            if digest in seen:
                raise _Wrong(
                    "duplicate_custom_id",
                    f"an earlier line has the custom_id {shown(line.custom_id, 80)} too: each takes one of its own",
                    "custom_id",
                )
            seen.add(digest)
        except _Wrong as wrong:
            error = wrong.error
            errors.append(LineError(error.code, error.message, number, error.param))
            if len(errors) >= MAX_ERRORS:
                return total, errors
    if not total:
        errors.append(LineError("empty_batch", "the file has no request: it takes a JSON object a line"))
    return total, errors


def requests(path: Path, endpoint: str, limits: Limits, answered: Collection[int] = ()) -> Generator[Line, None, None]:
    """The requests of a file that was checked, without those that were answered. Blocks at each step."""
    for number, raw in _lines(path, limits.line_bytes):
        if number not in answered:
            try:
                yield _parsed(number, raw, endpoint, limits.line_bytes)
            except _Wrong as wrong:  # it was checked under other limits, before the server started again
                yield Line(number, f"line {number}", b"", wrong.error.message)


def _lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number from 1; of one that is too long its beginning."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(limit + 2):
            number += 1
            rest = raw
            while not rest.endswith(b"\n") and (rest := file.readline(limit + 2)):
                continue
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield number, raw


def _parsed(number: int, raw: bytes, endpoint: str, limit: int) -> Line:
    if len(raw.rstrip(b"\r\n")) > limit:
        raise _Wrong("invalid_request", f"this line is above the {limit} bytes that a request may have")
    try:
        fields = _decode(raw)
        fields.custom_id.encode()
    except msgspec.ValidationError as error:
        raise _Wrong("invalid_request", f'a line takes "custom_id", "method", "url" and "body": {error}') from error
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError is a ValueError
        raise _Wrong("invalid_json_line", f"This line is not parseable as valid JSON: {shown(error)}") from error
    if not 0 < len(fields.custom_id) <= MAX_ID:
        raise _Wrong("invalid_request", f"custom_id takes 1 to {MAX_ID} characters", "custom_id")
    if fields.method != "POST":
        raise _Wrong("invalid_request", f"method takes POST, not {shown(fields.method, 40)}", "method")
    if fields.url != endpoint:
        raise _Wrong(
            "url_mismatch",
            f"the url {shown(fields.url, 80)} is not the batch's endpoint, which is {endpoint}",
            "url",
        )
    body = bytes(fields.body).strip()
    if not body.startswith(b"{"):
        raise _Wrong("invalid_request", "body takes a JSON object", "body")
    return Line(number, fields.custom_id, body)
