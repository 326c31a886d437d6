"""Chat messages as OpenAI writes them, checked and put as chat templates take them."""

from __future__ import annotations

from typing import Any

import msgspec

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "refusal")


class Problem(ValueError):
    """What is wrong with an example, as the rest of a sentence about its line."""


def messages_of(given: Any, where: str) -> tuple[tuple[dict[str, Any], ...], tuple[bool, ...]]:
    """The messages with text as one string and arguments of calls as objects, and whether each is learned."""
    if not isinstance(given, list) or not given:
        raise Problem(f'"{where}" has to be a list of messages that is not empty')
    messages = []
    learned = []
    calls = set[str]()
    for number, message in enumerate(given, 1):
        try:
            made, learn = _message(message, calls)
        except Problem as problem:
            raise Problem(f"message {number} of {where} {problem}") from None
        messages.append(made)
        learned.append(learn)
    return tuple(messages), tuple(learned)


def tools_of(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    if not isinstance(row.get("parallel_tool_calls"), bool | None):
        raise Problem('"parallel_tool_calls" has to be true or false')
    tools = row.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise Problem('"tools" has to be a list')
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Problem(f'tool {number} has to be {{"type": "function", "function": {{"name": ..., ...}}}}')
    return tuple(tools)


def _message(message: Any, calls: set[str]) -> tuple[dict[str, Any], bool]:
    """One message, and whether it is learned; `calls` holds the tool calls before it."""
    if not isinstance(message, dict):
        raise Problem("is not an object")
    role = message.get("role")
    if "role" not in message:
        raise Problem(f"has no role; a role is {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if role not in ROLES:
        raise Problem(f"has the role {str(role)[:40]!r}; a role is {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if unknown := sorted(set(message) - set(KEYS)):
        raise Problem(f"has the key {unknown[0]!r}; a message has {', '.join(KEYS)}")
    if message.get("content") is None and role != "assistant":
        raise Problem("has no content")
    made: dict[str, Any] = {"role": role, "content": _content(message.get("content"))}
    if "name" in message:
        made["name"] = _text(message["name"], "name")
    if message.get("tool_calls") is not None:
        if role != "assistant":
            raise Problem("has tool_calls, which an assistant's message has")
        made["tool_calls"] = [_call(call, calls) for call in _list(message["tool_calls"])]
    if role == "tool":
        made["tool_call_id"] = _text(message.get("tool_call_id"), "tool_call_id")
        if made["tool_call_id"] not in calls:
            raise Problem("answers a tool call that no message before it makes")
    if role == "assistant" and not made["content"] and not made.get("tool_calls"):
        raise Problem("has no content and no tool_calls")
    return made, _weight(message, role)


def _weight(message: dict[str, Any], role: str) -> bool:
    weight = message.get("weight")
    if weight is None:
        return role == "assistant"
    if role != "assistant":
        raise Problem("has a weight, which an assistant's message has")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Problem(f"has the weight {str(weight)[:40]}; it is 0 or 1")
    return bool(weight)


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Problem("has a content that is neither a string nor a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise Problem(f"has a part of type {str(kind)[:40]!r}; this trains on text alone")
    return "".join(part["text"] for part in content)


def _call(call: Any, calls: set[str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Problem('has a tool call that is not {"id", "type": "function", "function": {"name", "arguments"}}')
    name, arguments = _text(function.get("name"), "name of a function"), function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Problem(f"calls {name[:40]!r} with arguments that are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise Problem(f"calls {name[:40]!r} with arguments that are not an object")
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        made["id"] = _text(call["id"], "id of a call")
        calls.add(made["id"])
    return made


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise Problem(f"has a {what} that is not a string with something in it")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Problem("has tool_calls that are not a list with something in it")
    return value
