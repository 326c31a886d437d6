"""vLLM's errors under our names, and in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def sentence(error: BaseException) -> str:
    """The first paragraph of a foreign error on one line: the rest is addressed to vLLM's developers."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        lines = lines[1:2] if "Value error" in lines[1] else lines[2:3] or lines[1:2]
    return lines[0].split(" [type=")[0].removeprefix("Value error, ")[:500]
