"""What the messages of a request say, whichever of the APIs it speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXT_PARTS = ("text", "input_text")


def first_message(question: Mapping[str, Any]) -> str | None:
    """What the first message of the user's says; None of a request without one."""
    return next((content for role, content in messages_of(question) if role == "user"), None)


def messages_of(question: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Roles and texts, in order; of other parts than texts nothing. None where there are no messages."""
    if question is None:
        return []
    given = question.get("messages") or question.get("input")
    given = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(given, list):
        return []
    system = question.get("system") or question.get("instructions")
    messages = [("system", _content(system))] if system else []
    for message in given:
        if isinstance(message, Mapping):
            # An item of the responses API that is no message is a call of a tool, or what came of it.
            role, content = str(message.get("role") or "tool"), message.get("content")
            results = isinstance(content, list) and any(
                isinstance(part, Mapping) and part.get("type") == "tool_result" for part in content
            )
            messages.append(("tool" if results else role, _content(content)))
    return messages


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS)
    return "".join(text for text in texts if isinstance(text, str))
