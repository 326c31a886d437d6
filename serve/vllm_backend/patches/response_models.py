"""Pieces of streamed answers as pydantic makes them by itself.

vLLM's models all look for fields that they do not know, in a validator of Python's: it says so in the log where a
request has some. The pieces of an answer are made by vLLM itself, some of them for every token.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.generate.base import protocol as base
from vllm.entrypoints.openai.chat_completion import protocol as chat
from vllm.entrypoints.openai.completion import protocol as completion

LOOK = "__log_extra_fields__"
# Those that others are made of come first.
MODELS: tuple[type[Any], ...] = (
    base.DeltaMessage,
    chat.ChatCompletionLogProb,
    chat.ChatCompletionLogProbsContent,
    chat.ChatCompletionLogProbs,
    chat.ChatCompletionResponseStreamChoice,
    chat.ChatCompletionStreamResponse,
    completion.CompletionLogProbs,
    completion.CompletionResponseStreamChoice,
    completion.CompletionStreamResponse,
)


def install() -> None:
    """Have the models made without the look, once."""
    for model in MODELS:
        if model.__pydantic_decorators__.model_validators.pop(LOOK, None) is not None:
            model.model_rebuild(force=True)
