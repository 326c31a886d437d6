"""An item is compared with what it says it is, and with the same result as if it were compared with everything."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from pydantic import TypeAdapter, ValidationError

from serve.asgi.wrong_field import CHOICE, refused
from serve.vllm_backend.first_error import validator
from serve.vllm_backend.request_schemas import request_type

RESPONSES, CHAT, MESSAGES = "/v1/responses", "/v1/chat/completions", "/v1/messages"
TEXT, IMAGE = {"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "http://x/y.png"}
OUTPUT = {"type": "output_text", "text": "x", "annotations": []}
REFUSAL = {"type": "refusal", "refusal": "x"}
ITEMS = [
    {"role": "user", "content": "x"},
    {"role": "developer", "content": [TEXT]},
    {"type": "message", "role": "user", "content": [TEXT, IMAGE, {"type": "input_file", "file_id": "f"}]},
    {"type": "message", "role": "system", "content": "x"},
    {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [OUTPUT]},
    {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [REFUSAL]},
    {"type": "file_search_call", "id": "f", "queries": ["x"], "status": "completed"},
    {"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search", "query": "x"}},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "i", "status": "completed"},
    {"type": "function_call_output", "call_id": "c", "output": "x"},
    {"type": "function_call_output", "call_id": "c", "output": [TEXT]},
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}]},
    {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
    {"type": "image_generation_call", "id": "i", "result": "x", "status": "completed"},
    {"type": "code_interpreter_call", "id": "c", "code": "1", "container_id": "x", "outputs": [], "status": "failed"},
    {"type": "local_shell_call_output", "id": "l", "output": "x"},
    {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": [{"name": "t", "input_schema": {}}]},
    {"type": "mcp_approval_request", "id": "m", "arguments": "{}", "name": "n", "server_label": "s"},
    {"type": "mcp_approval_response", "approval_request_id": "m", "approve": True},
    {"type": "mcp_call", "id": "m", "arguments": "{}", "name": "n", "server_label": "s"},
    {"type": "custom_tool_call", "call_id": "c", "name": "n", "input": "x"},
    {"type": "custom_tool_call_output", "call_id": "c", "output": "x"},
    {"type": "item_reference", "id": "i"},
    {"id": "i"},
]  # fmt: skip
TOOLS = [
    {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True},
    {"type": "file_search", "vector_store_ids": ["v"]},
    {"type": "web_search"},
    {"type": "mcp", "server_label": "s", "server_url": "http://x"},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "code_interpreter", "container": "x"},
    {"type": "image_generation"},
    {"type": "local_shell"},
    {"type": "custom", "name": "n", "format": {"type": "text"}},
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAID = [
    {"role": "system", "content": "x"},
    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]},
    {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "x", "tool_call_id": "c"},
    {"role": "developer", "content": "x"},
    {"role": "somebody", "content": "x"},
]
TURNS = [
    {"role": "user", "content": "x"},
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]},
]
BODIES = [
    *((RESPONSES, "input", {"request_id": "r", "input": [item]}) for item in ITEMS),
    (RESPONSES, "input", {"request_id": "r", "input": ITEMS}),
    *((RESPONSES, "tools", {"request_id": "r", "input": "x", "tools": [tool]}) for tool in TOOLS),
    *((CHAT, "messages", {"request_id": "r", "messages": [message]}) for message in SAID),
    *((MESSAGES, "messages", {"model": "m", "max_tokens": 4, "messages": [turn]}) for turn in TURNS),
]
WRONG = (3, "message", None, [], [{"type": "nonsense"}], [TEXT])


@pytest.fixture(scope="module")
def both():
    """By path: vLLM's own validator, and ours."""
    adapters = {path: TypeAdapter(request_type(path)) for path in (RESPONSES, CHAT, MESSAGES)}
    return {path: (adapter.validator, validator(adapter.core_schema)) for path, adapter in adapters.items()}


def outcome(validator, body):
    try:
        return realized(dict(validator.validate_python(copy.deepcopy(body))))
    except ValidationError:
        return ValidationError
    except Exception as error:  # vLLM's own checks
        return type(error), str(error)


def realized(value):
    """With what is looked at only when it is read."""
    if isinstance(value, dict):
        return {name: realized(part) for name, part in value.items()}
    if isinstance(value, list):
        return [realized(part) for part in value]
    if type(value).__name__ != "ValidatorIterator":
        return value
    try:
        return [realized(part) for part in value]
    except ValidationError:
        return "an item of it is wrong"


def twisted(value):
    """The value with one thing changed, for each thing and change."""
    if isinstance(value, dict):
        for key, held in value.items():
            rest = {name: part for name, part in value.items() if name != key}
            yield rest
            yield from ({**value, key: wrong} for wrong in WRONG)
            yield from ({**value, key: other} for other in twisted(held))
        yield {**value, "more": 1}
    elif isinstance(value, list) and len(value) < 4:
        yield from ([*value[:at], other, *value[at + 1 :]] for at, part in enumerate(value) for other in twisted(part))


@pytest.fixture(autouse=True)
def same_ids(monkeypatch):
    """vLLM gives an item without an id one."""
    monkeypatch.setattr("vllm.entrypoints.openai.responses.protocol.random_uuid", lambda: "drawn")


UNTYPED_ANSWERS = [
    {"role": "assistant", "id": "m", "status": "completed", "content": [part]} for part in (OUTPUT, REFUSAL)
]


@pytest.mark.parametrize(("path", "field", "body"), BODIES)
def test_what_is_valid_is_the_same_and_what_is_not_is_refused(path, field, body, both):
    theirs, ours = both[path]
    assert outcome(theirs, body) is not ValidationError, "a valid one"
    assert outcome(ours, body) == outcome(theirs, body)
    if len(body[field]) > 4:
        return
    for other in twisted(body[field][0]):
        wrong = {**body, field: [other]}
        # An answer that leaves its type out is an answer, as OpenAI has it.
        same = body if other in UNTYPED_ANSWERS else wrong
        assert outcome(ours, wrong) == outcome(theirs, same), other


@pytest.mark.parametrize(
    ("item", "where", "what"),
    [
        ({"type": "message", "role": "user", "content": 3}, "input.0.content", "a text or a list, not 3"),
        ({"role": "user", "content": [TEXT, {"type": "input_text"}]}, "input.0.content.1.text", "required"),
        ({"role": "user", "content": [{"type": "nonsense"}]}, "input.0.content.0.type", "'input_text'"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input.0.call_id", "required"),
        ({"type": "nonsense"}, "input.0.type", "'function_call'"),
        ({}, "input.0.content", "required"),
        (3, "input.0", "takes an object, not 3"),
    ],
)
def test_an_error_is_about_what_the_item_says_it_is(item, where, what, both):
    with pytest.raises(ValidationError) as caught:
        both[RESPONSES][1].validate_python({"input": [item]})
    refusal = refused(caught.value.errors(include_url=False))
    assert refusal.param == where and what in refusal.message
    assert CHOICE not in refusal.message and "Param" not in refusal.message


@pytest.mark.parametrize(
    ("path", "fields", "sentence"),
    [
        (RESPONSES, {"input": 3}, "input takes a text or a list, not 3"),
        (RESPONSES, {"input": None}, "input takes a text or a list, not null"),
        (RESPONSES, {"input": "x", "tools": [3]}, "tools.0 takes an object, not 3"),
        (RESPONSES, {"input": "x", "reasoning": "high"}, "reasoning takes an object, not 'high'"),
        (RESPONSES, {"input": "x", "temperature": "warm"}, "temperature takes a number, not 'warm'"),
        (RESPONSES, {}, "input is required, and is not there"),
        (CHAT, {"messages": ["x"]}, "messages.0 takes an object, not 'x'"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content takes a text or a list, not 3"),
        (CHAT, {"messages": SAID[:1], "logit_bias": [1]}, "logit_bias takes an object, not a list of 1"),
        (CHAT, {"messages": SAID[:1], "response_format": {"type": "x"}}, "response_format.type takes 'text'"),
        (
            MESSAGES,
            {"model": "m", "messages": TURNS[:1], "max_tokens": "x"},
            "max_tokens takes a whole number, not 'x'",
        ),
        (
            MESSAGES,
            {"model": "m", "messages": [{"role": "x", "content": ""}], "max_tokens": 1},
            "messages.0.role takes",
        ),
    ],
)
def test_a_sentence_says_what_came_and_what_is_taken_and_names_no_class(path, fields, sentence, both):
    with pytest.raises(ValidationError) as caught:
        both[path][1].validate_python({"request_id": "r", **fields})
    message = refused(caught.value.errors(include_url=False)).message
    assert message.startswith(sentence), message
    assert "instance" not in message and "Param" not in message and "Input should" not in message
