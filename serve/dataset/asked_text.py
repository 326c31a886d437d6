"""What a request asks, as text: a prompt, or a chat's messages, whichever of the APIs here it speaks.

chat completions, messages    {"messages": [...], "system"?}
responses                     {"input": text or [...], "instructions"?}
completions                   {"prompt": text}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

Asked = str | list[dict[str, str]]
_ROLES = ("system", "developer", "user", "assistant")
_TEXT_PARTS = ("text", "input_text", "output_text")


class NoText(Enum):
    """Why a request has no text that an answer could be learned for."""

    LONG = "too_long"
    TOOLS = "tools"
    NOT_TEXT = "not_text"
    ELSEWHERE = "context_elsewhere"  # what was said before is stored on the server
    PREFILLED = "prefilled"  # the last message is the assistant's, and the answer goes on with it


def asked_text(question: Mapping[str, Any] | None) -> Asked | NoText:
    """The prompt or the messages, each with its role and content; or why there are none."""
    if question is None:
        return NoText.LONG
    if question.get("tools") or question.get("functions"):
        return NoText.TOOLS
    if question.get("previous_response_id"):
        return NoText.ELSEWHERE
    if (prompt := question.get("prompt")) is not None:
        only = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        return only if isinstance(only, str) and only else NoText.NOT_TEXT
    said = question.get("messages") or question.get("input")
    said = [{"role": "user", "content": said}] if isinstance(said, str) else said
    if not isinstance(said, list):
        return NoText.NOT_TEXT
    system = question.get("system") or question.get("instructions")
    given = [{"role": "system", "content": system}, *said] if system else said
    messages = _messages(given)
    if isinstance(messages, list) and messages[-1]["role"] == "assistant":
        return NoText.PREFILLED
    return messages


def _messages(given: Sequence[Any]) -> list[dict[str, str]] | NoText:
    messages = []
    for message in given:
        if not isinstance(message, Mapping):
            return NoText.NOT_TEXT
        role, content = message.get("role"), _content(message.get("content"))
        if role == "tool" or message.get("tool_calls") or "function" in str(message.get("type", "")):
            return NoText.TOOLS
        if role not in _ROLES or content is None:
            return NoText.NOT_TEXT
        messages.append({"role": str(role), "content": content})
    return messages or NoText.NOT_TEXT


def _content(content: Any) -> str | None:
    """The text of a message's content; None if it holds anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    said = [part for part in content if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS]
    texts = [text for part in said if isinstance(text := part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else None
