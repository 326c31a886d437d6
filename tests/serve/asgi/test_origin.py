"""A page of another site may change nothing here."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from serve.asgi.origin import origins
from serve.config import keys_hashed
from serve.server.assembly import build_app
from tests.support.backend import FakeBackend

EVIL = "https://evil.example"
MINE = "https://app.example"
CHANGES = [
    ("POST", "/v1/adapters"),
    ("POST", "/v1/adapters/tone/promote"),
    ("DELETE", "/v1/adapters/tone"),
    ("POST", "/v1/engines/base/swap"),
    ("POST", "/v1/keys"),
]


def client(config, **changes):
    allowed = changes.pop("allowed", None)
    if allowed is not None:
        changes["engine"] = {**config.engine, "allowed_origins": allowed}
    app = build_app(replace(config, **changes), FakeBackend(config.model))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000")


async def status(http, method, path, **headers):
    answer = await http.request(method, path, headers=headers, content=b"{}")
    return answer.status_code


@pytest.mark.parametrize("keys", [{}, {"admin_keys": keys_hashed(["an-admin"])}])
@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_another_site_changes_nothing_with_or_without_keys(config, method, path, keys):
    async with client(config, **keys) as http:
        key = {"authorization": "Bearer an-admin"}
        for foreign in (
            {"origin": EVIL},
            {"origin": "null"},
            {"origin": "http://[::1"},
            {"sec-fetch-site": "cross-site"},
        ):
            assert await status(http, method, path, **key, **foreign) == 403, foreign
        for own in ({"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, {}):
            assert await status(http, method, path, **key, **own) != 403, own


async def test_without_keys_only_names_of_this_machine_are_answered_to(config):
    async with client(config) as http:
        for host in ("evil.example", "evil.example:8000", "169.254.169.254", "localhost.evil.example", "[::1"):
            assert await status(http, "GET", "/v1/models", host=host) == 403, host
        for host in ("localhost", "127.0.0.1:9", "[::1]:8000", "a.localhost"):
            assert await status(http, "GET", "/v1/models", host=host) == 200, host
    async with client(config, admin_keys=keys_hashed(["an-admin"])) as http:
        assert await status(http, "GET", "/health", host="models.example") == 200


async def test_a_page_may_ask_for_answers_with_a_key_or_from_this_machine(config):
    async with client(config) as http:
        assert await status(http, "POST", "/v1/chat/completions", origin=EVIL) == 403
        assert await status(http, "POST", "/v1/chat/completions", origin="http://localhost:3000") != 403
        assert await status(http, "POST", "/v1/keys", origin="http://localhost:3000") == 403
    async with client(config, api_keys=keys_hashed(["a-key"])) as http:
        assert await status(http, "POST", "/v1/chat/completions", origin=EVIL) == 401


async def test_a_preflight_is_answered_before_any_key_is_asked(config):
    async with client(config, admin_keys=keys_hashed(["an-admin"]), allowed=f'["{MINE}"]') as http:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        for path in ("/v1/adapters", "/v1/chat/completions"):
            answer = await http.options(path, headers={"origin": MINE, **asked})
            assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == MINE
            assert answer.headers["access-control-allow-headers"] == "authorization"
            foreign = await http.options(path, headers={"origin": EVIL, **asked})
            assert "access-control-allow-origin" not in foreign.headers
        answer = await http.get("/v1/models", headers={"origin": MINE, "authorization": "Bearer an-admin"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == MINE
        assert await status(http, "POST", "/v1/keys", origin=MINE, authorization="Bearer an-admin") != 403


def test_origins_are_read_as_vllm_writes_them_and_as_people_do():
    assert origins('["https://a.example/", "https://B.example"]') == {"https://a.example", "https://b.example"}
    assert origins("https://a.example, https://b.example") == {"https://a.example", "https://b.example"}
    assert origins(["*"]) == {"*"} and origins(None) == frozenset()
