"""A model's chat template: a program that somebody else wrote.

It is tried before vLLM tries it on the event loop, which waits for as long as that takes. For a request vLLM renders it
in a thread, waits for so long (`VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT`), and leaves the thread to go on; here it is ended.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from jinja2 import TemplateSyntaxError
from vllm import envs
from vllm.exceptions import VLLMServerError, VLLMValidationError

from serve.errors import ConfigError
from serve.vllm_backend import template_bounds

log = logging.getLogger(__name__)


class Renderer(Protocol):
    def render_chat(self, conversations: Any, chat_params: Any) -> Any: ...


async def check_ends(renderer: Renderer, params: Any, name: str, seconds: float | None = None) -> None:
    """ConfigError, if the template is not through with one short message in the time that vLLM gives a request's.

    What else is wrong with it is said to whoever asks a chat: prompts need no template.
    """
    seconds = envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT if seconds is None else seconds
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def render() -> None:
        try:
            renderer.render_chat([[{"role": "user", "content": "hello"}]], params)
        except Exception as error:
            if told := _in_words(error):
                log.warning("%s answers no chats: %s", name, told)
        with suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    # The process does not wait for it, if it cannot be ended.
    thread = threading.Thread(target=render, name="chat-template", daemon=True)
    thread.start()
    try:
        await asyncio.wait_for(ended.wait(), seconds or None)
    except TimeoutError:
        _end([thread])
        raise ConfigError(
            f"the chat template of {name} is not through with one short message after {seconds:g} s: give another one "
            "with --chat-template FILE, or more time with VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT"
        ) from None


def guard(renderer: Any) -> None:
    """What its template raises is a sentence of ours from now on, and a template that does not end is ended."""
    template_bounds.install()
    if hasattr(renderer, "_replace_executor"):  # a template of Jinja's
        renderer._apply_chat_template_async = partial(_said, renderer._apply_chat_template_async)
        renderer._render_with_timeout = partial(_ended, renderer._render_with_timeout, renderer._executor)


async def _said(original: Callable[..., Any], *args: Any, **named: Any) -> Any:
    try:
        return await original(*args, **named)
    except Exception as error:
        if told := _in_words(error):
            raise VLLMValidationError(told) from error
        raise


async def _ended(original: Callable[..., Any], executor: Any, rendering: Coroutine[Any, Any, Any]) -> Any:
    pool = executor._inner
    try:
        return await original(rendering)
    except TimeoutError:
        _end(pool._threads)
        raise VLLMServerError(
            f"the chat template is not through with this chat after {envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT:g} s: give "
            "the server another one with --chat-template FILE, or more time with VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT"
        ) from None


def _in_words(error: BaseException) -> str:
    """Empty for what a working template says of a chat."""
    if type(error).__name__ == "ChatTemplateResolutionError":  # it has moved in vLLM 0.33
        what = "this model has no chat template"
    elif isinstance(wrong := error.__cause__ or error, TemplateSyntaxError):
        what = f"the chat template cannot be read, line {wrong.lineno}: {wrong.message}"
    else:
        return ""
    return f"{what}. Ask it prompts (/v1/completions), or give the server a template with --chat-template FILE"


def _end(threads: Iterable[threading.Thread]) -> None:
    """Have each raise an error where it is. vLLM has taken another pool by then; what waits in theirs goes on."""
    for thread in list(threads):
        if thread.ident is not None and thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(TimeoutError))
