"""What a client sends as a message is read, or its own error."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.entrypoints.openai.responses import utils
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers import chat_utils

from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named


@pytest.fixture(autouse=True)
def installed():
    apply(named("message-errors"))


def constructed(*items):
    request = ResponsesRequest(model="base", input=list(items))
    return utils.construct_input_messages(request_input=request.input)


PARTS = [{"type": "input_text", "text": "12 degrees"}]
TOOL = {"type": "function_call_output", "id": "fc_1", "call_id": "c", "status": "completed", "output": PARTS}


@pytest.mark.parametrize("more", [{}, {"created_by": "somebody"}])
def test_a_tool_s_output_in_parts_is_read_also_as_the_api_answers_it(more):
    """With what only the API's own answers have, vLLM makes models of the parts."""
    assert constructed(TOOL | more) == [{"role": "tool", "content": PARTS, "tool_call_id": "c"}]


def test_vllm_alone_leaves_models():
    request = ResponsesRequest(model="base", input=[TOOL | {"created_by": "somebody"}])
    (message,) = utils.construct_input_messages.loradock_original(request_input=request.input)
    assert not isinstance(message["content"][0], dict)


ANSWER = {"type": "message", "id": "m", "status": "completed", "role": "assistant"}


def test_an_answer_that_is_empty_is_the_client_s_error():
    with pytest.raises(VLLMValidationError, match="input holds a message that cannot be read"):
        constructed(ANSWER | {"content": []})


def test_an_answer_is_all_of_its_parts_and_a_refusal_is_what_it_says():
    """vLLM reads the first part, and no refusal."""
    one, two = ({"type": "output_text", "text": text, "annotations": []} for text in ("One.", "Two."))
    refusal = {"type": "refusal", "refusal": "I cannot."}
    for content, said in (([one], "One."), ([one, two], "One.Two."), ([refusal], "I cannot.")):
        assert constructed(ANSWER | {"content": content}) == [{"role": "assistant", "content": said}]


@pytest.mark.parametrize("parse", ["parse_chat_messages", "parse_chat_messages_async"])
async def test_a_part_that_is_none_is_the_client_s_error(parse):
    class Model:
        multimodal_config = None
        enable_prompt_embeds = False

    message = {"role": "user", "content": [3]}
    with pytest.raises(VLLMValidationError, match=r"messages holds a message that cannot be read \(AssertionError\)"):
        said = getattr(chat_utils, parse)([message], Model(), "string")
        if parse.endswith("async"):
            await said
