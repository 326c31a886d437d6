"""Who sends a body is known before it is read, and how long it may be."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from serve.adapters.fair_threads import TENANT
from serve.api.entrance import BASELINE_BYTES, BODY_BYTES
from serve.config import keys_hashed
from serve.server.assembly import build_app
from tests.support.app import http
from tests.support.backend import FakeBackend
from tests.support.waiting import settled

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
    status, _ = await sent(app, "/v1/alerts", {"authorization": "Bearer an-admin"}, 20_000)
    assert status == 400


FLOOD = b'{"model": "base", "name": "x", "a": [' + b"{}," * (1 << 15) + b"0]}"
DOORS = [
    *(("POST", path) for path in ROUTES),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/adapters"),
    ("POST", "/v1/batches"),
    ("POST", "/v1/moderations"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/adapters/tone/baseline"),
    ("PUT", "/v1/adapters/tone/golden"),
]


@pytest.mark.parametrize(("method", "path"), DOORS)
async def test_a_flood_of_small_values_is_refused_at_every_door(operator, backend, method, path):
    headers = {"content-type": "application/json"}
    answer = await operator.request(method, path, content=FLOOD, headers=headers)
    assert answer.status_code == 413 and "lists and objects" in answer.json()["error"]["message"]
    assert not backend.bodies


async def test_so_is_a_line_of_a_file_to_train_on(operator):
    files = {"file": ("train.jsonl", b'{"messages": []}\n' + FLOOD, "application/jsonl")}
    answer = await operator.post("/v1/files", files=files, data={"purpose": "fine-tune"})
    assert answer.status_code == 400 and "Line 2" in answer.json()["error"]["message"]
    assert "lists and objects" in answer.json()["error"]["message"]


async def test_so_is_a_line_of_a_batch(operator, backend):
    line = b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": ' + FLOOD + b"}\n"
    file = await operator.post("/v1/files", files={"file": ("b.jsonl", line)}, data={"purpose": "batch"})
    body = {"input_file_id": file.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = (await operator.post("/v1/batches", json=body)).json()

    async def refused():
        return (await operator.get(f"/v1/batches/{batch['id']}")).json()["error_file_id"]

    errors = await operator.get(f"/v1/files/{await settled(refused)}/content")
    assert "lists and objects" in errors.text and not backend.bodies


async def test_a_baselines_file_is_read_in_pieces_up_to_its_own_limit(operator):
    read = await operator.put("/v1/adapters/tone/baseline", content=b"[" * (BODY_BYTES + 1))
    assert read.status_code == 404  # there is no such adapter
    assert (await operator.put("/v1/adapters/tone/baseline", content=b"[" * (BASELINE_BYTES + 1))).status_code == 413


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


async def test_changes_and_reads_of_a_key_have_budgets_of_their_own_and_refused_ones_count(operator, issue, config):
    client = await issue("acme", "inference", "adapters:write", changes_per_minute=3, reads_per_minute=5)
    changed = [(await client.delete("/v1/adapters/none")).status_code for _ in range(6)]
    assert changed == [404, 404, 404, 429, 429, 429]
    refused = await client.delete("/v1/adapters/none")
    assert int(refused.headers["retry-after"]) > 1 and "3 changes a minute" in refused.json()["error"]["message"]
    assert [(await client.get("/v1/models")).status_code for _ in range(7)] == [200] * 5 + [429] * 2
    # Nobody pays for it but that key: neither what the audit log holds nor another key's budget.
    assert (config.data_dir / "audit.jsonl").read_text().count('"tenant": "acme"') == 3
    assert (await operator.delete("/v1/adapters/none")).status_code == 404
    other = await issue("acme", "inference", "adapters:write")
    assert {(await other.get("/v1/models")).status_code for _ in range(200)} == {200}, "whoever polls is not refused"


async def test_a_route_that_blocks_works_in_the_name_of_its_keys_tenant(issue, app, operator, monkeypatch):
    client, seen = await issue("acme", "inference", "adapters:write"), []
    rows = operator._transport.app.state.parts.fine_tuning.rows
    page = rows.page
    monkeypatch.setattr(rows, "page", lambda *args, **named: seen.append(TENANT.get()) or page(*args, **named))
    assert (await client.get("/v1/fine_tuning/jobs?metadata[a]=b&limit=1")).status_code == 200
    assert seen == ["acme"] and TENANT.get() is None


async def test_what_a_client_waits_for_in_vain_is_not_begun_once_it_has_left(operator, monkeypatch):
    begun, held, left = [], threading.Event(), asyncio.Event()
    rows = operator._transport.app.state.parts.fine_tuning.rows
    monkeypatch.setattr(rows, "page", lambda *_, **__: begun.append(1))
    busy = [asyncio.create_task(asyncio.to_thread(held.wait)) for _ in range(64)]
    await asyncio.sleep(0.05)

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    scope, _, send, sent, _ = http({}, "/v1/fine_tuning/jobs", "GET")
    scope["headers"] = [*scope["headers"], (b"authorization", operator.headers["authorization"].encode())]
    asking = asyncio.create_task(operator._transport.app(scope, receive, send))
    await asyncio.sleep(0.05)
    left.set()
    await asyncio.wait_for(asking, 60)
    held.set()
    await asyncio.gather(*busy)
    assert not begun and not sent
