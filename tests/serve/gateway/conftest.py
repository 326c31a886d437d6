"""OpenAI's own client of a server."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import openai
import pytest


@pytest.fixture
def sdk() -> Callable[[httpx.AsyncClient], openai.AsyncOpenAI]:
    """OpenAI's client, which speaks with the same server on the same key."""

    def made(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
        key = client.headers.get("authorization", "Bearer none").removeprefix("Bearer ")
        http = httpx.AsyncClient(transport=client._transport)
        return openai.AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)

    return made
