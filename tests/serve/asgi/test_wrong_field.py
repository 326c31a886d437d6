"""A sentence about one field, of whatever pydantic says about it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le, MaxLen
from pydantic import BaseModel, TypeAdapter, ValidationError, field_validator

from serve.asgi.wrong_field import refused
from serve.vllm_backend.first_error import validator


class Part(BaseModel):
    text: str


class Body(BaseModel, extra="forbid"):
    input: str | list[Part]
    count: Annotated[int, Ge(1), Le(9)] = 1
    stop: Annotated[list[str], MaxLen(2)] = []
    role: Literal["user", "system"] = "user"
    other: dict[str, Any] | None = None
    stream: bool = False

    @field_validator("other")
    @classmethod
    def is_known(cls, value):
        if value == {"a": 1}:
            raise ValueError("a is not known here")
        return value


LOOK = validator(TypeAdapter(Body).core_schema).validate_python


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"input": 3}, "input takes a text or a list, not 3"),
        ({"input": True}, "input takes a text or a list, not true"),
        ({"input": None}, "input takes a text or a list, not null"),
        ({"input": {"a": 1}}, "input takes a text or a list, not an object"),
        ({"count": 0}, "count takes a number from 1, not 0"),
        ({"count": 10}, "count takes a number up to 9, not 10"),
        ({"count": "many"}, "count takes a whole number, not 'many'"),
        ({"count": 1.5}, "count takes a whole number, not 1.5"),
        ({"stop": ["a"] * 3}, "stop takes up to 2 entries, not a list of 3"),
        ({"role": "x" * 500}, "role takes 'user' or 'system', not 'xxx"),
        ({"other": []}, "other takes an object, not a list of 0"),
        ({"other": {"a": 1}}, "other: a is not known here"),
        ({"stream": "perhaps"}, "stream takes true or false, not 'perhaps'"),
        ({"more": 1}, "more is no field that is taken here: leave it out"),
    ],
)
def test_it_says_what_came_and_what_is_taken(fields, sentence):
    with pytest.raises(ValidationError) as caught:
        LOOK({"input": "x", **fields})
    refusal = refused(caught.value.errors())
    assert refusal.message.startswith(sentence) and len(refusal.message) < 600
    assert refusal.param == next(iter(fields))


def test_what_is_missing_and_what_is_no_object():
    for body, sentence in (({}, "input is required, and is not there"), (3, "the body takes an object, not 3")):
        with pytest.raises(ValidationError) as caught:
            LOOK(body)
        assert refused(caught.value.errors()).message == sentence


async def test_a_parameter_of_a_query_is_named_by_itself(client):
    answer = await client.get("/v1/batches", params={"limit": "many"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "limit")
    assert error["message"] == "limit takes a whole number, not 'many'"
