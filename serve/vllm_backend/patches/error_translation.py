"""vLLM's errors under our names, and in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.v1.engine.exceptions import EngineDeadError

from serve.errors import AdapterRejected, EngineUnavailable


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


def answer_unknown_paths(app: FastAPI, model: str) -> None:
    """Of what this kind of model does not answer: a 404 in OpenAI's shape. vLLM leaves it to its framework."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = (
            f"{model} does not answer {request.method} {request.url.path}: what a model answers depends on its kind"
        )
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(body, error.status_code, error.headers)

    app.add_exception_handler(HTTPException, answer)
    app.middleware_stack = app.build_middleware_stack()  # vLLM's has been built without it


def sentence(error: BaseException) -> str:
    """The first paragraph of a foreign error on one line: the rest is addressed to vLLM's developers."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        lines = lines[1:2] if "Value error" in lines[1] else lines[2:3] or lines[1:2]
    return lines[0].split(" [type=")[0].removeprefix("Value error, ")[:500]
