"""A model's chat template, tried before vLLM tries it: on the event loop, which waits for as long as that takes."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any, Protocol

from vllm import envs

from serve.errors import ConfigError


class Renderer(Protocol):
    def render_chat(self, conversations: Any, chat_params: Any) -> Any: ...


async def check_ends(renderer: Renderer, params: Any, name: str, seconds: float | None = None) -> None:
    """ConfigError, if the template is not through with one short message in the time that vLLM gives a request's.

    What else is wrong with it is said to whoever asks a chat: prompts need no template.
    """
    seconds = envs.VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT if seconds is None else seconds
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def render() -> None:
        with suppress(Exception):
            renderer.render_chat([[{"role": "user", "content": "hello"}]], params)
        with suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    # Nothing ends a thread: the process does not wait for this one.
    threading.Thread(target=render, name="chat-template", daemon=True).start()
    try:
        await asyncio.wait_for(ended.wait(), seconds or None)
    except TimeoutError:
        raise ConfigError(
            f"the chat template of {name} is not through with one short message after {seconds:g} s: give another one "
            "with --chat-template FILE, or more time with VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT"
        ) from None
