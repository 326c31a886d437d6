"""vLLM's errors under our names, and in a sentence.

The Responses API's models let pass what its code looks into without asking: a tool's output in parts that were answers
of the API before, an answer of the assistant that is empty. That was a 500, and is the client's error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from openai.types.responses import ResponseOutputMessage, ResponseOutputText
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from serve.errors import AdapterRejected, EngineUnavailable

POOLED = re.compile(r"/v1/(embeddings|score|rerank)|/(pooling|score|rerank|v2/rerank)")
_SCORES = re.compile(r"(/v[12])?/(score|rerank)")


@contextmanager
def rejecting() -> Iterator[None]:
    """vLLM's errors while it loads an adapter, as ours."""
    try:
        yield
    except EngineUnavailable:
        raise
    except EngineDeadError as error:
        raise EngineUnavailable("the engine stopped while it loaded an adapter; retry shortly") from error
    except Exception as error:  # vLLM hands the worker's exception through as a bare Exception
        raise AdapterRejected(f"the engine cannot load this adapter: {sentence(error)}") from error


def answer_unknown_paths(app: FastAPI, model: str, tasks: Collection[str]) -> None:
    """Of what this kind of model does not answer: a 404 in OpenAI's shape. vLLM leaves it to its framework.

    `tasks` are vLLM's words for what it does.
    """

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = _remedy(request.url.path, tasks)
        message = f"{model} does not answer {request.method} {request.url.path}: {told}"
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(body, error.status_code, error.headers)

    app.add_exception_handler(HTTPException, answer)
    app.middleware_stack = app.build_middleware_stack()  # vLLM's has been built without it


def _remedy(path: str, tasks: Collection[str]) -> str:
    if "generate" in tasks:
        if not POOLED.fullmatch(path):
            return "what a model answers depends on its kind"
        return (
            "it generates text, and vLLM pools in another engine; serve it with --runner pooling --convert embed on "
            "another port"
        )
    if path == "/classify":
        return (
            "its engine gives embeddings; labels come from a base with a classification head, or from an adapter with "
            "one on a base that generates"
        )
    if _SCORES.fullmatch(path):
        return "its head has several labels; scores come from a head with one, or from embeddings (--convert embed)"
    if POOLED.fullmatch(path):
        return "its engine gives labels or scores; for embeddings serve it with --runner pooling --convert embed"
    return "its engine pools (--runner pooling), and generates no text"


def sentence(error: BaseException) -> str:
    """The first paragraph of a foreign error on one line: the rest is addressed to vLLM's developers."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        lines = lines[1:2] if "Value error" in lines[1] else lines[2:3] or lines[1:2]
    return lines[0].split(" [type=")[0].removeprefix("Value error, ")[:500]


def parse(original: Callable[..., Any], messages: Any, *args: Any, **named: Any) -> Any:
    """vLLM's."""
    with _reading("messages"):
        return original(messages, *args, **named)


async def parse_async(original: Callable[..., Any], messages: Any, *args: Any, **named: Any) -> Any:
    """vLLM's."""
    with _reading("messages"):
        return await original(messages, *args, **named)


def construct(original: Callable[..., Any], **named: Any) -> Any:
    """vLLM's, with parts of messages as dictionaries, which is how all other code reads them, and with all parts of an
    answer: vLLM reads the first, and no refusal."""
    with _reading("input"):
        items = named.get("request_input")
        if isinstance(items, list):
            named["request_input"] = [_in_one_part(item) if _is_answer(item) else item for item in items]
        messages = original(**named)
        for message in messages:
            if isinstance(message, dict) and isinstance(content := message.get("content"), list):
                message["content"] = [
                    part.model_dump(exclude_none=True) if isinstance(part, BaseModel) else part for part in content
                ]
        return messages


def _is_answer(item: Any) -> bool:
    return isinstance(item, ResponseOutputMessage) and bool(item.content)


def _in_one_part(answer: ResponseOutputMessage) -> ResponseOutputMessage:
    said = "".join(part.text if part.type == "output_text" else part.refusal for part in answer.content)
    return answer.model_copy(update={"content": [ResponseOutputText(type="output_text", text=said, annotations=[])]})


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
