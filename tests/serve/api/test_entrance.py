"""Who sends a body is known before it is read, and how long it may be."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serve.api.app import build_app
from serve.api.entrance import BODY_BYTES
from serve.config import keys_hashed
from tests.support.backend import FakeBackend

KEYED = {"api_keys": keys_hashed(["a-key"]), "admin_keys": keys_hashed(["an-admin"])}
ROUTES = ["/v1/alerts", "/v1/feedback", "/v1/keys", "/v1/adapters/tone/promote", "/v1/engines/base/swap"]


async def sent(app, path, headers, size, method="POST"):
    """The status, and how many bytes of a body of `size` the app took."""
    taken, status = 0, []
    left = size

    async def receive():
        nonlocal taken, left
        if not left:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"", "more_body": False}
        piece = min(left, 1 << 16)
        left, taken = left - piece, taken + piece
        return {"type": "http.request", "body": b"[" * piece, "more_body": left > 0}

    async def send(message):
        if message["type"] == "http.response.start":
            status.append(message["status"])

    raw = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    raw += [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    await app({**scope, "headers": raw, "http_version": "1.1", "scheme": "http"}, receive, send)
    return status[0], taken


@pytest.fixture
def app(config):
    return build_app(replace(config, **KEYED), FakeBackend(config.model))


@pytest.mark.parametrize("path", ROUTES)
async def test_nobody_without_a_key_has_a_body_read(app, path):
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert await sent(app, path, headers, 64 << 20) == (401, 0)


@pytest.mark.parametrize("path", ROUTES)
async def test_a_body_is_bounded_whether_its_length_is_stated_or_not(app, path):
    admin = {"authorization": "Bearer an-admin"}
    assert await sent(app, path, {**admin, "content-length": str(64 << 20)}, 64 << 20) == (413, 0)
    status, taken = await sent(app, path, admin, 64 << 20)
    assert status == 413 and taken <= BODY_BYTES + (1 << 16)


async def test_deep_nesting_is_a_400(app):
    status, _ = await sent(app, "/v1/alerts", {"authorization": "Bearer an-admin"}, BODY_BYTES - 1)
    assert status == 400


async def test_a_refused_key_is_in_the_audit_log_all_the_same(app, config):
    await sent(app, "/v1/alerts", {"authorization": "Bearer wrong"}, 10)
    assert '"what": "alerts"' in (config.data_dir / "audit.jsonl").read_text()


@pytest.mark.parametrize(("path", "limit"), [("/tokenize", 1 << 20), ("/v1/chat/completions", 4 << 20)])
async def test_a_question_is_bounded_and_read_only_from_those_with_a_key(app, path, limit):
    assert await sent(app, path, {"authorization": "Bearer wrong"}, 64 << 20) == (401, 0)
    key = {"authorization": "Bearer a-key"}
    assert await sent(app, path, {**key, "content-length": str(64 << 20)}, 64 << 20) == (413, 0)
    status, taken = await sent(app, path, key, 64 << 20)
    assert status == 413 and taken <= limit + (1 << 16)
