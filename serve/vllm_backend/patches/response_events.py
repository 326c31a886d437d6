"""A stream of the Responses API that ends at `max_output_tokens` says so in its last event, as OpenAI's does.

vLLM closes every stream with `response.completed`, also with a response whose status is `incomplete`: a client that
goes by the event takes half an answer for a whole one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from openai.types.responses import ResponseIncompleteEvent
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse


class IncompleteEvent(ResponseIncompleteEvent):
    """With vLLM's response, as its other events have."""

    response: ResponsesResponse


async def generate(
    original: Callable[..., AsyncGenerator[Any, None]], self: Any, *args: Any, **named: Any
) -> AsyncGenerator[Any, None]:
    """vLLM's, with that event."""
    async with aclosing(original(self, *args, **named)) as events:
        async for event in events:
            if event.type == "response.completed" and event.response.status == "incomplete":
                yield IncompleteEvent.model_construct(
                    type="response.incomplete", sequence_number=event.sequence_number, response=event.response
                )
            else:
                yield event
