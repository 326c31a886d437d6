"""Whole answers with a tool call that was cut."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def extracted():
    apply(named("tool-calls"))
    parser = Hermes2ProToolParser.__new__(Hermes2ProToolParser)
    return lambda text, choice="required": parser.extract_tool_calls(text, SimpleNamespace(tool_choice=choice))


@pytest.mark.parametrize("length", [1, 5, 8, 11, 12, 14, 30, 60, len(CALL) - 14])
def test_a_call_that_was_cut_is_neither_a_call_nor_a_text(extracted, length):
    found = extracted(CALL[:length])
    assert not found.tools_called and not found.content, found


def test_what_is_whole_is_a_call_and_what_stands_before_is_the_text(extracted):
    for text in (CALL, CALL.removesuffix("</tool_call>")):
        (call,) = extracted(text).tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}
    found = extracted(f"Let me look.\n{CALL}\n{CALL[:30]}", "auto")
    assert len(found.tool_calls) == 1 and found.content.startswith("Let me look.") and "<tool" not in found.content
    assert extracted(f"Let me look.\n{CALL[:30]}", "auto").content == "Let me look."


def test_an_answer_that_may_be_text_keeps_its_end(extracted):
    assert extracted("a <", "auto").content == "a <"
    assert extracted("3 <tool", "auto").content == "3 <tool"


def test_the_embedded_models_calls_follow_their_schema():
    """Its server says `tool_strict_level: parameter`; without it vLLM leaves arguments free unless a tool is strict."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
    from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag
    from vllm.tool_parsers.tool_strict_level import ToolStrictLevel

    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    tools = [ChatCompletionToolsParam(type="function", function={"name": "weather", "parameters": schema})]
    levels = {
        level: str(get_model_structural_tag("hermes", tools, "required", False, strict_level=level).model_dump())
        for level in ToolStrictLevel
    }
    assert "'required': ['unit']" in levels[ToolStrictLevel.PARAMETER]
    assert "'required': ['unit']" not in levels[ToolStrictLevel.AUTO]
