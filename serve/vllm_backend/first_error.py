"""vLLM's routes look at a body up to its first wrong item, and say what is wrong with it in one sentence.

Pydantic goes on through a list to its end and keeps an error for every choice of every wrong item: for `input` of
/v1/responses that is 233 for each, built on the event loop. Nothing else stands between a body and the engine's app:
requests of clients, lines of batches, prompts of baselines, golden sets and replays all pass these fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from fastapi import FastAPI, Request
from fastapi._compat.v2 import ModelField
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import SchemaValidator
from pydantic_core.core_schema import no_info_before_validator_function

from serve.asgi.wrong_field import CHOICE, refused
from serve.vllm_backend.tagged_unions import OTHER, tagged

# No model of vLLM's has so many fields.
MOST_KEYS = 200
# Schemas of what holds any number of items.
_MANY = frozenset({"list", "tuple", "set", "frozenset", "dict"})


def install(app: FastAPI) -> None:
    """Into the routes of vLLM's app, before it has answered anything."""
    for field in body_fields(app):
        field._type_adapter.validator = validator(field._type_adapter.core_schema)
    app.add_exception_handler(RequestValidationError, _answer)


def body_fields(app: FastAPI) -> list[ModelField]:
    """What the routes of an app take as bodies."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return [field for route in routes for field in route.dependant.body_params]


def validator(schema: Any) -> SchemaValidator:
    """Of a model with this core schema, which looks up to the first wrong item."""
    # Without what the models built for themselves, which collects.
    read = no_info_before_validator_function(_with_types, tagged(ends_at_first_error(schema)))
    return SchemaValidator(read, _use_prebuilt=False)


def _with_types(body: Any) -> Any:
    """The body, with the type of each answer in `input` that has parts. OpenAI lets it be left out, and vLLM takes
    such an answer for a client's message, whose parts are others."""
    items = body.get("input") if isinstance(body, dict) else None
    if not isinstance(items, list) or not any(map(_is_untyped_answer, items)):
        return body
    typed = [{"type": "message", **item} if _is_untyped_answer(item) else item for item in items]
    return {**body, "input": typed}


def _is_untyped_answer(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and "type" not in item
        and item.get("role") == "assistant"
        and isinstance(item.get("content"), list)
    )


def ends_at_first_error(schema: Any) -> Any:
    """The same core schema, whose lists, sets and dictionaries end at their first wrong item.

    Errors name no choice of a union: `CHOICE` stands in its place.
    """
    copies: dict[int, Any] = {}

    def copied(part: Any) -> Any:
        if isinstance(part, list | tuple):
            return type(part)(map(copied, part))
        if not isinstance(part, dict):
            return part
        if id(part) not in copies:
            copies[id(part)] = copy = {}
            # Without a type it holds schemas by the names of fields, which may be any.
            kind = part["type"] if isinstance(part.get("type"), str) else None
            copy.update({name: value if kind and name in OTHER else copied(value) for name, value in part.items()})
            if kind in _MANY:
                copy["fail_fast"] = True
            elif kind == "union":
                copy["choices"] = [(each[0] if isinstance(each, tuple) else each, CHOICE) for each in copy["choices"]]
            elif "forbid" in (part.get("extra_behavior"), (part.get("config") or {}).get("extra_fields_behavior")):
                copies[id(part)] = _with_few_keys(copy)
        return copies[id(part)]

    return copied(schema)


def _with_few_keys(schema: Any) -> Any:
    """For a schema that keeps an error for each key that it does not know."""
    return no_info_before_validator_function(_few_keys, schema, ref=schema.pop("ref", None))


def _few_keys(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST_KEYS:  # so that some of these are unknown as well
        return dict(islice(value.items(), MOST_KEYS))
    return value


def _in_its_message(wrong: Any, body: Any) -> Any:
    """The error, with its place in the whole body: vLLM reads tool calls one message at a time, and an error of them
    begins with the number of the call."""
    inside = wrong["loc"][1:]
    messages = body.get("messages") if isinstance(body, dict) else None
    if not (inside and isinstance(inside[0], int) and isinstance(messages, list)):
        return wrong
    for number, message in enumerate(messages):
        if isinstance(message, dict) and _holds(message.get("tool_calls"), inside, wrong["input"]):
            return {**wrong, "loc": ("body", "messages", number, "tool_calls", *inside)}
    return wrong


def _holds(value: Any, inside: Sequence[Any], said: Any) -> bool:
    """Whether what an error is about is there; of a field that is missing, what should have it."""
    for at in (each for each in inside if not str(each).startswith(CHOICE)):
        if value is said:
            return True
        try:
            value = list(value)[at] if isinstance(at, int) else value[at]
        except (KeyError, IndexError, TypeError):
            return False
    return value is said or (isinstance(said, str | int) and bool(value == said))


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    refusal = refused([_in_its_message(wrong, error.body) for wrong in error.errors()])
    # Their frames lead to one of FastAPI's that holds these errors, and the body: nothing would go before a collection.
    for each in (error, *((wrong.get("ctx") or {}).get("error") for wrong in error.errors())):
        if isinstance(each, BaseException):
            each.__traceback__ = each.__cause__ = each.__context__ = None
    return JSONResponse(refusal.body(), status_code=refusal.status)
