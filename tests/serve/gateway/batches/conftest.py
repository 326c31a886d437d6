"""A registry with files and batches, and OpenAI's own client of a whole server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.support.app import CHAT


@pytest.fixture
def sdk() -> Callable[[httpx.AsyncClient], openai.AsyncOpenAI]:
    """OpenAI's client, which speaks with the same server on the same key."""

    def made(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
        key = client.headers.get("authorization", "Bearer none").removeprefix("Bearer ")
        http = httpx.AsyncClient(transport=client._transport)
        return openai.AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)

    return made


def request(id: str, model: str | None = "base", url: str = CHAT, **body: Any) -> dict[str, Any]:
    """A line of an input."""
    return {"custom_id": id, "method": "POST", "url": url, "body": {"model": model, "messages": [], **body}}


def lines_of(rows: list[Any]) -> bytes:
    """Rows as JSON lines; a text is a line as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
