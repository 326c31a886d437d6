"""A chat template that does not end is found before the event loop waits for it."""

import threading

import pytest

from serve.errors import ConfigError
from serve.vllm_backend.chat_template import check_ends


class Rendering:
    """A renderer whose template waits, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_end = threading.Event()
        self.error = error

    def render_chat(self, conversations: object, chat_params: object) -> None:
        self.may_end.wait()
        if self.error:
            raise self.error


async def test_a_template_that_does_not_end_is_refused_with_what_would_do():
    renderer = Rendering()
    try:
        with pytest.raises(ConfigError, match="template of odd is not through .* give another one"):
            await check_ends(renderer, None, "odd", 0.01)
    finally:
        renderer.may_end.set()


@pytest.mark.parametrize("error", [None, ValueError("roles must alternate")])
async def test_one_that_ends_or_refuses_the_message_is_taken(error):
    renderer = Rendering(error)
    renderer.may_end.set()
    await check_ends(renderer, None, "fine")
