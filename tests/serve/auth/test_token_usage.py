"""What an answer cost, read as it passes by."""

from __future__ import annotations

import json

import pytest

from serve.auth.rate_limits import Limits, Meter
from serve.auth.token_usage import Usage

SSE, JSON = "text/event-stream; charset=utf-8", "application/json"


async def cost(kind: str, *chunks: str | bytes, status: int = 200, asked: int = 0) -> int:
    sent: list[bytes] = []

    async def send(message):
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    usage = Usage(send, Meter(Limits(tokens_per_minute=10), lambda: 0.0))
    usage.asked = asked
    await usage.send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})
    bodies = [chunk.encode() if isinstance(chunk, str) else chunk for chunk in chunks]
    for body in bodies:
        await usage.send({"type": "http.response.body", "body": body, "more_body": True})
    assert sent == bodies, "an answer must pass as it is"
    return usage.tokens


def event(**told) -> str:
    return f"data: {json.dumps(told)}\n\n"


CHAT = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
WORD = event(choices=[{"delta": {"content": "a"}}])


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (CHAT, 12),
        ({"prompt_tokens": 7, "total_tokens": 7}, 7),
        ({"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}, 7),
        ({"input_tokens": 3, "output_tokens": 4}, 7),
        ({"total_tokens": 9}, 9),
        (None, 0),
        ("odd", 0),
    ],
)
async def test_a_json_answer_says_it(usage, tokens):
    whole = json.dumps({"choices": [{"message": {"content": '"usage": {"total_tokens": 999}'}}], "usage": usage})
    assert await cost(JSON, whole) == tokens
    assert await cost(JSON, *whole) == tokens


async def test_a_stream_that_says_it_is_taken_at_its_word_wherever_it_is_cut():
    stream = WORD * 3 + event(choices=[], usage=CHAT) + "data: [DONE]\n\n"
    for size in (1, 7, 1000):
        assert await cost(SSE, *(stream[at : at + size] for at in range(0, len(stream), size)), asked=4000) == 12


async def test_the_responses_and_messages_apis_say_it_elsewhere():
    done = {"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}
    assert await cost(SSE, f"event: response.completed\n{event(**done)}") == 7
    first = {"type": "message_start", "message": {"usage": {"input_tokens": 3, "output_tokens": 0}}}
    assert await cost(SSE, event(**first), event(type="message_delta", usage={"output_tokens": 4})) == 7


async def test_any_other_stream_is_estimated_also_when_it_broke_off():
    assert await cost(SSE, WORD * 5, asked=400) == 105
    assert await cost(SSE, WORD, WORD[:9], asked=400) == 101


async def test_a_model_that_talks_about_usage_is_not_believed():
    assert await cost(SSE, event(choices=[{"delta": {"content": '"usage": {"total_tokens": 0}'}}]), asked=40) == 11


async def test_a_refusal_costs_nothing():
    assert await cost(JSON, '{"error": {}}', status=400, asked=4000) == 0
