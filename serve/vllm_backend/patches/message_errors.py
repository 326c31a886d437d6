"""Messages that vLLM takes and then cannot read: the client's error, which was a 500.

The Responses API's models let pass what its code looks into without asking: a tool's output in parts that were
answers of the API before, an answer of the assistant that is empty or a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel
from vllm.exceptions import VLLMValidationError

from serve.cpu_kernels.patches import Patch, apply
from serve.vllm_backend.patches.error_translation import sentence

_CHATS = "vllm.renderers.chat_utils"
_PARSED = "messages model_config content_format media_io_kwargs mm_processor_kwargs"
_WHY = "what a client sends and vLLM cannot read is a 500"

PATCHES = [
    Patch(_CHATS, "parse_chat_messages", _PARSED, f"{__name__}:parse", _WHY, copies="vllm"),
    Patch(_CHATS, "parse_chat_messages_async", _PARSED, f"{__name__}:parse_async", _WHY, copies="vllm"),
    Patch(
        "vllm.entrypoints.openai.responses.utils",
        "construct_input_messages",
        "request_instructions request_input prev_msg prev_response_output",
        f"{__name__}:construct",
        f"{_WHY}; parts that are models are read by nobody",
        copies="vllm",
    ),
]


def install() -> None:
    """In the server's process."""
    apply(PATCHES)


def parse(original: Callable[..., Any], messages: Any, *args: Any, **named: Any) -> Any:
    """vLLM's."""
    with _reading("messages"):
        return original(messages, *args, **named)


async def parse_async(original: Callable[..., Any], messages: Any, *args: Any, **named: Any) -> Any:
    """vLLM's."""
    with _reading("messages"):
        return await original(messages, *args, **named)


def construct(original: Callable[..., Any], **named: Any) -> Any:
    """vLLM's, with parts of messages as dictionaries, which is how all other code reads them."""
    with _reading("input"):
        messages = original(**named)
        for message in messages:
            if isinstance(message, dict) and isinstance(content := message.get("content"), list):
                message["content"] = [
                    part.model_dump(exclude_none=True) if isinstance(part, BaseModel) else part for part in content
                ]
        return messages


@contextmanager
def _reading(field: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise VLLMValidationError(
            f"{field} holds a message that cannot be read ({sentence(error)}): its content takes a text, or parts "
            "with a type and what belongs to it",
            parameter=field,
        ) from error
