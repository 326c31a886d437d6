"""A file of requests is answered whole, behind everybody, and goes on where it was broken off."""

from __future__ import annotations

import json

import httpx
import pytest

from serve.client.batch import PRIORITY, answered, read, run
from serve.errors import ConfigError


def line(id, url="/v1/chat/completions", **more):
    return json.dumps(
        {"custom_id": id, "method": "POST", "url": url, "body": {"model": "base", "messages": []}, **more}
    )


@pytest.fixture
def jobs(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(line(f"q{number}") for number in range(10)) + "\n")
    return read(file)


async def test_a_real_server_answers_them_at_low_priority(client, backend, jobs, tmp_path):
    out = tmp_path / "out.jsonl"
    assert await run(jobs, out, url="http://localhost", key=None, concurrency=3, transport=client._transport) == 0
    told = [json.loads(one) for one in out.read_text().splitlines()]
    assert {one["custom_id"] for one in told} == {job.id for job in jobs}
    assert all(one["response"]["body"] == {"model": "base"} and one["error"] is None for one in told)
    assert all(body["priority"] >= PRIORITY for body in backend.bodies)


async def test_a_run_that_was_broken_off_asks_only_what_is_missing(client, backend, jobs, tmp_path):
    out = tmp_path / "out.jsonl"
    await run(jobs[:4], out, url="http://localhost", key=None, concurrency=2, transport=client._transport)
    out.write_text(out.read_text() + '{"custom_id": "q5", "respon')
    assert answered(out) == {"q0", "q1", "q2", "q3"}
    left = [job for job in jobs if job.id not in answered(out)]
    count = len(backend.bodies)
    await run(left, out, url="http://localhost", key=None, concurrency=2, transport=client._transport)
    assert len(backend.bodies) - count == 6
    assert answered(out) == {job.id for job in jobs}


async def test_a_server_that_is_busy_or_away_is_waited_for(jobs, tmp_path):
    calls = 0

    def answer(request):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise httpx.ConnectError("refused")
        if calls in (2, 3):
            return httpx.Response(429 if calls == 2 else 503, headers={"retry-after": "0"}, json={"error": {}})
        return httpx.Response(200, json={"ok": True})

    out = tmp_path / "out.jsonl"
    failed = await run(jobs[:1], out, url="http://x", key=None, concurrency=1, transport=httpx.MockTransport(answer))
    assert (failed, calls) == (0, 4)
    assert json.loads(out.read_text())["response"]["body"] == {"ok": True}


async def test_an_error_of_one_is_its_line_and_nobody_elses(client, backend, jobs, tmp_path):
    out = tmp_path / "out.jsonl"
    wrong = [*jobs[:2], *read_lines(tmp_path, line("bad", body={"model": "nobody"}))]
    assert await run(wrong, out, url="http://localhost", key=None, concurrency=2, transport=client._transport) == 1
    told = {one["custom_id"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert told["bad"]["response"]["status_code"] == 404
    assert told["bad"]["response"]["body"]["error"]["code"] == "model_not_found"


def read_lines(folder, *lines):
    file = folder / "more.jsonl"
    file.write_text("\n".join(lines))
    return read(file)


@pytest.mark.parametrize(
    "lines, says",
    [
        (["{"], "line 1"),
        ([line("a"), line("a")], "line 2"),
        ([line("a", url="/v1/keys")], "/v1/keys"),
        ([line("a", method="GET")], "GET"),
        ([json.dumps({"custom_id": 3, "body": {}})], "custom_id"),
        ([line("a", body={"stream": True})], "stream"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_is_asked(tmp_path, lines, says):
    with pytest.raises(ConfigError, match=says):
        read_lines(tmp_path, *lines)
