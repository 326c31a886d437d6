"""The command's file is a batch of the server's, which another run finds again; a server without batches is asked."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import httpx
import pytest

from serve.client import server_batch
from serve.client.batch import answered, failures, read
from serve.client.server_batch import answer
from serve.errors import ConfigError
from tests.support.waiting import settled


def line(id, model="base", url="/v1/chat/completions"):
    return json.dumps({"custom_id": id, "method": "POST", "url": url, "body": {"model": model, "messages": []}})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server_batch, "POLL_SECONDS", 0.02)


@pytest.fixture
def jobs(tmp_path):
    file = tmp_path / "in.jsonl"
    urls = ("/v1/chat/completions", "/v1/completions")
    rows = [line(f"q{number}", url=urls[number % 2]) for number in range(8)]
    file.write_text("\n".join([*rows, line("bad", "nobody"), ""]))
    return read(file)


def asking(client, jobs, out, **more):
    return answer(jobs, out, url="http://localhost/v1", key=None, concurrency=2, transport=client._transport, **more)


async def test_a_file_is_answered_by_the_server_one_batch_for_each_url(client, backend, jobs, tmp_path):
    out, seen = tmp_path / "out.jsonl", []
    assert await asking(client, jobs, out, progress=seen.append) == 1
    assert answered(out) == {f"q{number}" for number in range(8)} and len(seen) == 9
    assert list(failures(out, jobs)) == [
        ("bad", "404 The model `nobody` does not exist: GET /v1/models lists those that do.")
    ]
    batches = (await client.get("/v1/batches")).json()["data"]
    assert sorted(batch["endpoint"] for batch in batches) == ["/v1/chat/completions", "/v1/completions"]
    assert (await client.get("/v1/files")).json()["data"] == [], "what was fetched is deleted"


async def test_what_failed_is_asked_again_by_another_run(client, backend, jobs, tmp_path):
    out = tmp_path / "out.jsonl"
    bad = [job for job in jobs if job.id == "bad"]
    for run in (1, 2):
        assert await asking(client, bad, out) == 1
        assert len((await client.get("/v1/batches")).json()["data"]) == run


async def test_a_run_that_was_broken_off_finds_its_batch_again(client, backend, jobs, tmp_path):
    out, jobs = tmp_path / "out.jsonl", [job for job in jobs if job.url == "/v1/chat/completions"]
    out.write_text('{"custom_id": "torn", "respon')
    first = asyncio.create_task(asking(client, jobs, out))
    schedule = client._transport.app.state.parts.batches
    assert await settled(lambda: schedule.schedule._working)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert await asking(client, jobs, out) == 1
    assert len((await client.get("/v1/batches")).json()["data"]) == 1
    rows = out.read_text().split("\n")
    assert rows[0].startswith('{"custom_id": "torn"') and len([row for row in rows[1:] if row]) == len(jobs)


@pytest.mark.parametrize("outs", [("a.jsonl", "b.jsonl"), ("a.jsonl", "a.jsonl")])
async def test_of_two_runs_at_once_each_gets_every_answer(client, backend, jobs, tmp_path, outs):
    jobs = [job for job in jobs if job.url == "/v1/completions"]
    files = [tmp_path / name for name in outs]

    told = []
    async with httpx.AsyncClient(base_url="http://localhost", transport=client._transport) as http:
        batches = server_batch.ServerBatches(http, lambda well: None, 0.02, told.append)
        first, original = [], batches._batch

        async def batch(part):
            if not first:
                first.append(await original(part))
                assert await asking(client, jobs, files[0]) == 0, "the other run finds this batch"
                return first[0]
            return await original(part)

        batches._batch = batch
        assert await batches.answer(jobs, files[1]) == 0
    assert [len(told), *map(answered, files)] == [1, *[{job.id for job in jobs}] * 2]
    assert len(files[1].read_text().splitlines()) == len(jobs), "none twice"


async def test_a_server_without_batches_is_asked_line_by_line(client, backend, jobs, tmp_path):
    class Without(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            if request.url.path.startswith(("/v1/batches", "/v1/files")):
                return httpx.Response(404, json={"error": {"message": "no"}}, request=request)
            return await client._transport.handle_async_request(request)

    out = tmp_path / "out.jsonl"
    failed = await answer(jobs, out, url="http://localhost", key=None, concurrency=2, transport=Without())
    assert failed == 1 and len(answered(out)) == 8
    assert [id for id, _ in failures(out, jobs)] == ["bad"]


async def test_a_server_that_refuses_says_why(connect, config, backend, jobs, tmp_path):
    async with connect(replace(config, batch_lines=2)) as client:
        with pytest.raises(ConfigError, match=re.escape("the server does not take the requests: the file has more")):
            await asking(client, jobs, tmp_path / "out.jsonl")


async def test_a_wrong_key_is_told_in_the_servers_words(operator, jobs, tmp_path):
    with pytest.raises(ConfigError, match="401"):
        await asking(operator, jobs, tmp_path / "out.jsonl")


def test_a_long_file_becomes_several_batches(jobs, monkeypatch):
    monkeypatch.setattr(server_batch, "MAX_LINES", 3)
    assert [len(part) for part in server_batch._parts(jobs)] == [3, 2, 3, 1]
    monkeypatch.setattr(server_batch, "MAX_BYTES", 10)
    assert [len(part) for part in server_batch._parts(jobs)] == [1] * 9


def test_characters_that_python_takes_for_the_end_of_a_line_are_none(tmp_path):
    file = tmp_path / "in.jsonl"
    text = json.dumps({"custom_id": "a\u2028b", "url": "/v1/completions", "body": {}}, ensure_ascii=False)
    file.write_text(text + "\n")
    (job,) = read(file)
    assert job.id == "a\u2028b"


async def test_a_batch_that_stands_says_what_the_server_lacks(client, backend, jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(server_batch, "STILL_SECONDS", 0.05)
    told, parts = [], client._transport.app.state.parts
    ledger = parts.store.ledger

    def room(nbytes):
        monkeypatch.setattr(ledger, "_free", lambda root: nbytes)

    def tell(words):
        told.append(words)
        room(1 << 40)

    asked = asyncio.create_task(asking(client, jobs[:2], tmp_path / "out.jsonl", tell=tell))
    assert await settled(lambda: parts.batches.schedule._working)
    room(0)
    assert await asked == 0
    assert len(told) == 1, told
    assert told[0].startswith("no request was answered for a while; the server says: disk: the disk has 0 MiB free")
