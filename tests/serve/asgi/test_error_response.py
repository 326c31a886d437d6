"""An error is said where it can still be said: as the answer, as a stream's last event, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from serve.asgi.error_response import send_error
from serve.asgi.exchange import Tap
from serve.errors import EngineUnavailable


@pytest.mark.parametrize("ended", [False, True])
async def test_a_stream_that_has_ended_is_sent_no_error_behind_its_end(ended):
    sent: list[Any] = []

    async def send(message):
        sent.append(message)

    async def receive():
        raise AssertionError("nothing is asked of the client")

    tap = Tap(send)
    await tap.send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await tap.send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": not ended})
    scope = {"type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": []}
    await send_error(EngineUnavailable("the engine is gone"), scope, receive, tap)
    said = [message for message in sent[2:] if b"the engine is gone" in message["body"]]
    assert len(sent) == (2 if ended else 3) and len(said) == (0 if ended else 1)
