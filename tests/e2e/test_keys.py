"""Keys: who may ask, who may change, and who may neither."""

from __future__ import annotations

import time

import openai
import pytest

from tests.support.server import ADMIN, BASE, KEY, bearer, done, refused

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
ASKING = [
    ("GET", "/v1/models", None),
    ("GET", f"/v1/models/{BASE}", None),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/completions", {"model": BASE, "prompt": "Hello", "max_tokens": 1}),
    ("POST", "/v1/responses", {"model": BASE, "input": "Hello", "max_output_tokens": 1, "store": False}),
    ("POST", "/tokenize", {"model": BASE, "prompt": "Hello"}),
]
CHANGING = [
    ("GET", "/v1/adapters", None),
    ("GET", "/v1/adapters/voice", None),
    ("POST", "/v1/adapters", {"name": "x"}),
    ("POST", "/v1/adapters/voice/promote", {"version": 1}),
    ("POST", "/v1/adapters/voice/rollback", None),
    ("DELETE", "/v1/adapters/voice", None),
    ("DELETE", "/v1/adapters/voice/versions/1", None),
    ("GET", "/v1/engines", None),
]


@pytest.fixture
def ask(server):
    def ask(key, method, path, body=None, **headers):
        # The server fixture's own client carries the admin key.
        return server.http.request(method, path, json=body, headers={"Authorization": "", **bearer(key), **headers})

    return ask


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x", "", "sha256:" + "0" * 64])
def test_without_a_key_of_this_server_nothing_can_be_asked_or_changed(ask, voice, key):
    for method, path, body in ASKING + CHANGING:
        refused(ask(key, method, path, body), 401)


def test_an_inference_key_asks_and_changes_nothing(ask, server, voice):
    before = done(server.http.get("/v1/adapters"))
    for method, path, body in ASKING:
        assert ask(KEY, method, path, body).status_code == 200, path
    for method, path, body in CHANGING:
        refused(ask(KEY, method, path, body), 403)
    assert done(server.http.get("/v1/adapters")) == before


def test_each_of_several_inference_keys_asks(ask):
    assert ask("another-key", "GET", "/v1/models").status_code == 200
    refused(ask(f"another-key,{KEY}", "GET", "/v1/models"), 401)


def test_an_admin_key_does_both(ask, voice):
    for method, path, body in ASKING:
        assert ask(ADMIN, method, path, body).status_code == 200, path
    for method, path, body in CHANGING:
        if method == "GET":
            assert ask(ADMIN, method, path, body).status_code == 200, path


def test_the_client_is_told_in_its_own_exceptions(server):
    for key, error in (("wrong", openai.AuthenticationError),):
        with pytest.raises(error):
            server.client(key).chat.completions.create(**CHAT)
        with pytest.raises(error):
            server.client(key).chat.completions.create(**CHAT, stream=True)


def test_a_key_pays_for_what_the_engine_did_however_the_answer_is_told(ask):
    limits = {"tokens_per_minute": 1000}
    created = ask(ADMIN, "POST", "/v1/keys", {"name": "metered", "limits": limits}).json()
    body = {"model": BASE, "prompt": "Once upon a time", "max_tokens": 64, "ignore_eos": True}
    cost = done(ask(ADMIN, "POST", "/v1/completions", body))["usage"]["total_tokens"]

    def left() -> int:
        answer = ask(created["secret"], "POST", "/tokenize", {"model": BASE, "prompt": "x"})
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    before = left()
    for told in ({"stream": True, "stream_interval": 32}, {"n": 2}):
        assert ask(created["secret"], "POST", "/v1/completions", {**body, **told}).status_code == 200
        paid = cost if "n" not in told else cost + 64
        # The bucket fills meanwhile: 1000 in a minute.
        assert before - paid <= left() <= min(1000, before - paid + 250), told
        before = left()
    began = time.monotonic()
    cut = ask(created["secret"], "POST", "/v1/completions", {**body, "max_tokens": 1000}, **{"X-Request-Timeout": "2"})
    remaining = left()
    # A slow engine makes fewer tokens in two seconds than the bucket takes in.
    filled = before + (time.monotonic() - began) * limits["tokens_per_minute"] / 60
    assert cut.status_code == 504 and remaining + 2 < min(limits["tokens_per_minute"], filled)
    ask(ADMIN, "DELETE", f"/v1/keys/{created['id']}")


def test_whether_the_server_lives_needs_no_key(ask):
    for path in ("/health", "/ready", "/version"):
        assert ask(None, "GET", path).status_code == 200


def test_a_key_is_never_told(ask, server, voice):
    told = server.log.read_text() + server.full_log.read_text()
    told += ask(ADMIN, "GET", "/v1/adapters/voice").text + ask(KEY, "GET", "/v1/adapters").text
    told += ask(ADMIN, "GET", "/metrics").text
    assert ADMIN not in told
    assert KEY not in told
