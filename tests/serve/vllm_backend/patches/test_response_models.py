"""Pieces of an answer have the same JSON without the search for unknown fields, and refuse the same."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall
from vllm.entrypoints.openai.chat_completion import protocol as chat
from vllm.entrypoints.openai.completion import protocol as completion

from serve.vllm_backend.patches import response_models


def said():
    token = chat.ChatCompletionLogProb(token="a", logprob=-0.1, bytes=[97])
    top = chat.ChatCompletionLogProbsContent(token="a", logprob=-0.1, bytes=None, top_logprobs=[token])
    logprobs = chat.ChatCompletionLogProbs(content=[top])
    call = DeltaToolCall(index=0, id="c", type="function", function=DeltaFunctionCall(name="f"))
    deltas = [DeltaMessage(content="x"), DeltaMessage(role="assistant", content=""), DeltaMessage(tool_calls=[call])]
    deltas += [DeltaMessage(), DeltaMessage(reasoning="r", odd=1)]
    for delta in deltas:
        choice = chat.ChatCompletionResponseStreamChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=None)
        chunk = chat.ChatCompletionStreamResponse(id="i", created=1, model="m", choices=[choice])
        yield chunk.model_dump_json(exclude_unset=True)
    words = completion.CompletionLogProbs(tokens=["a"], text_offset=[0], token_logprobs=[None])
    choice = completion.CompletionResponseStreamChoice(index=0, text="x", logprobs=words)
    yield completion.CompletionStreamResponse(id="i", created=1, model="m", choices=[choice]).model_dump_json()


def looks():
    return [response_models.LOOK in model.__pydantic_decorators__.model_validators for model in response_models.MODELS]


def test_a_chunk_is_the_same():
    before = [*said()]
    response_models.install()
    response_models.install()
    assert not any(looks()), "the search is gone from each of them"
    assert [*said()] == before
    with pytest.raises(ValidationError):
        DeltaMessage(content=1)
    with pytest.raises(ValidationError):
        chat.ChatCompletionStreamResponse(choices=[])
