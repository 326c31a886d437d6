"""The last event of a streamed response says whether it is whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import warnings

from openai.types.responses import ResponseIncompleteEvent
from vllm.entrypoints.openai.responses.protocol import ResponseCompletedEvent, ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.sampling_params import SamplingParams

from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named


class Serving(OpenAIServingResponses):
    """vLLM's, whose engine has answered already."""

    def __init__(self, status):
        self.use_harmony, self.status = False, status

    async def _process_simple_streaming_events(self, *args):
        return
        yield

    async def responses_full_generator(self, request, params, results, context, model, *args, **named):
        return ResponsesResponse.from_request(request, params, model, 1, [], self.status)


@pytest.mark.parametrize(
    ("status", "last"), [("incomplete", "response.incomplete"), ("completed", "response.completed")]
)
async def test_a_stream_that_ends_at_its_length_closes_as_openai_s_does(status, last):
    apply(named("response-events"))
    request = ResponsesRequest(model="base", input="x", stream=True)
    stream = Serving(status).responses_stream_generator(
        request, SamplingParams(max_tokens=3), None, SimpleNamespace(), "base", None, None
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == ["response.created", "response.in_progress", f"response.{status}"]
    assert [event.sequence_number for event in events] == [0, 1, 2]
    with warnings.catch_warnings(action="error"):
        sent = events[-1].model_dump_json(by_alias=True)
    if status == "incomplete":
        assert (
            ResponseIncompleteEvent.model_validate_json(sent).response.incomplete_details.reason == "max_output_tokens"
        )
    else:
        assert isinstance(events[-1], ResponseCompletedEvent)
