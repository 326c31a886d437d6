"""Files and batches over HTTP, asked by OpenAI's own client: from an upload to the last line of the output."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections import Counter, deque
from dataclasses import replace

import openai
import pytest
from sqlalchemy import update

from serve.adapters.byte_ledger import Kind
from serve.adapters.registry.tables import batches as table
from serve.asgi.exchange import Generation
from serve.config import keys_hashed
from serve.engine.engine import LOW_PRIORITY
from serve.engine.payer import OPERATOR
from serve.errors import EngineUnavailable
from serve.jobs.batches import build
from serve.jobs.batches.upload import LINES
from serve.models import hardware
from tests.serve.jobs.batches.conftest import lines_of, request
from tests.support.app import CHAT, http, issued, upload
from tests.support.backend import FakeBackend
from tests.support.disk import nbytes
from tests.support.waiting import settled

ENDED = ("completed", "failed", "expired", "cancelled")


class HeldBackend(FakeBackend):
    """Answers as long as `gate` is set; `asked` counts what began and `answered` what ended, by custom name."""

    def __init__(self, model=None):
        super().__init__(model)
        self.gate, self.asked, self.answered, self.pass_on = asyncio.Event(), Counter(), Counter(), 0
        self.gate.set()

    def another(self, model=None):
        heir = HeldBackend(model or self.model)
        heir.name, heir.gate, heir.asked, heir.answered = self.name, asyncio.Event(), self.asked, self.answered
        heir.gate.set()
        self.heirs.append(heir)
        return heir

    async def app(self, scope, receive, send):
        body = await receive()
        name = json.loads(body["body"]).get("user")
        self.asked[name] += 1
        if self.pass_on:
            self.pass_on -= 1
        else:
            await self.gate.wait()

        async def replayed():
            return body

        await super().app(scope, replayed, send)
        self.answered[name] += 1


@pytest.fixture
def held(tiny_model):
    return HeldBackend(str(tiny_model))


def parts_of(client):
    return client._transport.app.state.parts


async def sent(ai, *rows, **more):
    """The id of a file with these lines."""
    return (await ai.files.create(file=("in.jsonl", lines_of(list(rows))), purpose="batch", **more)).id


async def begun(ai, *rows, endpoint=CHAT, **more):
    """The id of a batch of these lines."""
    file = await sent(ai, *rows)
    batch = await ai.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h", **more)
    return batch.id


async def ended(ai, id, seconds=60.0):
    """The batch, once it is at its end."""
    async with asyncio.timeout(seconds):
        while (batch := await ai.batches.retrieve(id)).status not in ENDED:
            await asyncio.sleep(0.02)
    return batch


async def read(ai, id):
    """What a file of answers says, by custom_id; no id comes twice."""
    if id is None:
        return {}
    rows = [json.loads(line) for line in (await ai.files.content(id)).text.splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


async def test_a_file_of_requests_is_answered_and_each_answer_says_by_which_version(client, sdk, backend, make_adapter):
    pushed = await client.post("/v1/adapters", **upload(make_adapter()))
    ai = sdk(client)
    rows = [request(f"q{number}", "tone" if number % 2 else "base") for number in range(20)]
    id = await begun(ai, *rows, metadata={"night": "1"})
    batch = await ended(ai, id)
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
    assert batch.metadata == {"night": "1"} and batch.expires_at == batch.created_at + 86_400
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.usage.input_tokens == 60 and batch.usage.output_tokens == 40 and batch.usage.total_tokens == 100
    answers = await read(ai, batch.output_file_id)
    assert set(answers) == {f"q{number}" for number in range(20)}
    for id, row in answers.items():
        assert row["error"] is None and row["id"].startswith("batch_req_")
        assert row["response"]["status_code"] == 200 and row["response"]["request_id"]
        wanted = pushed.json()["id"] if int(id[1:]) % 2 else "base"
        assert row["response"]["body"]["model"] == wanted
    assert all(body["priority"] >= LOW_PRIORITY << 32 for body in backend.bodies)
    output = await ai.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/embeddings"])
async def test_the_other_endpoints_are_asked_too(client, sdk, path):
    ai = sdk(client)
    batch = await ended(ai, await begun(ai, request("a", url=path, input="x", prompt="x"), endpoint=path))
    assert (await read(ai, batch.output_file_id))["a"]["response"]["body"] == {"model": "base"}


async def test_files_are_listed_in_pages_read_and_deleted(client, sdk):
    ai = sdk(client)
    ids = [await sent(ai, request(f"q{number}")) for number in range(5)]
    pages = await ai.files.list(limit=2, order="asc")
    assert [file.id async for file in pages] == ids
    assert [file.id async for file in await ai.files.list(limit=3)] == ids[::-1]
    first = await ai.files.retrieve(ids[0])
    content = lines_of([request("q0")])
    assert (first.bytes, first.filename, first.purpose) == (len(content), "in.jsonl", "batch")
    assert first.expires_at == first.created_at + 30 * 86_400
    assert (await ai.files.content(ids[0])).content == content
    assert (await ai.files.delete(ids[0])).deleted
    for ask in (ai.files.retrieve, ai.files.content, ai.files.delete):
        with pytest.raises(openai.NotFoundError):
            await ask(ids[0])
    raw = (await client.get("/v1/files", params={"limit": 2})).json()
    assert (raw["object"], raw["has_more"], raw["first_id"], raw["last_id"]) == ("list", True, ids[4], ids[3])


async def test_a_files_expiry_can_be_chosen(client, sdk):
    ai = sdk(client)
    id = await sent(ai, request("a"), expires_after={"anchor": "created_at", "seconds": 3600})
    file = await ai.files.retrieve(id)
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="3600"):
        await sent(ai, request("a"), expires_after={"anchor": "created_at", "seconds": 5})


@pytest.mark.parametrize(
    "form, status, says",
    [
        ({"data": {"purpose": "assistants"}, "files": {"file": b"x"}}, 400, "purpose"),
        ({"data": {}, "files": {"file": b"x"}}, 400, "purpose"),
        ({"data": {"purpose": "batch"}, "files": {"other": b"x"}}, 400, "file"),
        ({"data": {"purpose": "batch"}, "files": [("file", b"x"), ("file", b"y")]}, 400, "once"),
        ({"json": {"purpose": "batch"}}, 400, "multipart"),
        ({"data": {"purpose": "batch"}, "files": {"file": b"x" * 3000}}, 413, "2000"),
        ({"data": {"purpose": "batch"}, "files": {"file": b"x" * 200_000}}, 413, "2000"),
        ({"content": b"--b\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "boundary"),
    ],
)
async def test_what_is_no_upload_of_a_batch_is_refused_in_a_sentence(connect, config, form, status, says):
    async with connect(replace(config, batch_file_bytes=2000)) as client:
        refused = await client.post("/v1/files", **form)
        assert refused.status_code == status and says in refused.json()["error"]["message"], refused.text
        assert (await client.get("/v1/files")).json()["data"] == []
        assert not [*(config.data_dir / "files" / "incoming").iterdir()]


async def test_a_tenant_keeps_so_much_and_no_more(connect, config, sdk):
    async with connect(replace(config, batch_tenant_files=2, batch_open=1)) as client:
        ai = sdk(client)
        await sent(ai, request("a"))
        await sent(ai, request("b"))
        with pytest.raises(openai.RateLimitError, match="2 are the most"):
            await sent(ai, request("c"))


async def test_a_batch_that_cannot_be_is_refused_at_once(client, sdk):
    ai = sdk(client)
    file = await sent(ai, request("a"))
    good = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    for wrong, says in (
        ({"input_file_id": "file-1"}, "No such File"),
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "48h"}, "24h"),
        ({"completion_window": "soon"}, "24h"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "16"),
        ({"metadata": {"a": "x" * 600}}, "512"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            await ai.batches.create(**{**good, **wrong})
    with pytest.raises(openai.NotFoundError):
        await ai.batches.retrieve("batch_1")
    batch = await ended(ai, (await ai.batches.create(**good)).id)
    with pytest.raises(openai.BadRequestError, match="batch_output"):
        await ai.batches.create(**{**good, "input_file_id": batch.output_file_id})
    with pytest.raises(openai.ConflictError, match="completed"):
        await ai.batches.cancel(batch.id)


@pytest.mark.parametrize("purpose", ["batch", "fine-tune"])
async def test_a_file_of_nothing_but_lines_is_refused_while_it_arrives(client, sdk, purpose):
    with pytest.raises(openai.APIStatusError, match=f"has more than {LINES} lines") as refused:
        await sdk(client).files.create(file=("in.jsonl", b"\n" * (LINES + 1)), purpose=purpose)
    assert refused.value.status_code == 413


class Forgetful(FakeBackend):
    """Keeps nothing of what it was asked."""

    def __init__(self, model=None):
        super().__init__(model)
        self.bodies, self.paths, self.headers = (deque(maxlen=0) for _ in range(3))


async def test_a_file_at_its_limits_is_answered_to_its_last_line_in_bounded_memory(connect, config, tiny_model):
    """As many bytes and lines as there may be, and answers as long: no part of this server holds them all."""
    count, nbytes = 160, 16 << 20
    backend = Forgetful(str(tiny_model))
    backend.say = lambda body: "y" * len(body["messages"][0]["content"])
    backend.generation = Generation([1] * 7, [2] * 3, "stop")
    limited = replace(
        config, batch_lines=count, batch_file_bytes=nbytes, batch_concurrency=4, admin_keys=keys_hashed(["run"])
    )
    shortest = len(lines_of([request("00000", messages=[{"role": "user", "content": ""}])]))
    content = "x" * (nbytes // count - shortest)

    async def form():
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        for number in range(count):
            yield lines_of([request(f"{number:05}", messages=[{"role": "user", "content": content}])])
        yield b"\r\n--x--\r\n"

    async with connect(limited, backend) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme = await issued(operator, "acme", tokens_per_minute=1_000_000)
        backend.computed = 0
        tracemalloc.start()
        try:
            headers = {"content-type": "multipart/form-data; boundary=x"}
            file = (await acme.post("/v1/files", content=form(), headers=headers)).json()
            assert nbytes - count < file["bytes"] <= nbytes
            asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
            created = await acme.post("/v1/batches", json=asked)
            assert created.status_code == 200, created.text
            async with asyncio.timeout(300):
                while (batch := (await acme.get(f"/v1/batches/{created.json()['id']}")).json())["status"] not in ENDED:
                    await asyncio.sleep(0.1)
            assert batch["request_counts"] == {"total": count, "completed": count, "failed": 0}, batch
            rows = await downloaded(acme, batch["output_file_id"])
            held = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert held < nbytes, f"{held >> 20} MiB: neither the input nor the output is held as a whole"
        assert [name for name, _ in rows] == [f"{number:05}" for number in range(count)]
        assert {size for _, size in rows} == {len(content)}
        assert backend.computed == batch["usage"]["total_tokens"] == 10 * count
        usage = (await operator.get("/v1/usage")).json()["data"]
        (row,) = [row for row in usage if row["tenant"] == "acme"]
        assert list(row["causes"]) == ["batch"] and row["prompt_tokens"] + row["generated_tokens"] == backend.computed
        files = (await acme.get("/v1/files")).json()["data"]
        ledger = parts_of(operator).store.ledger
        assert ledger.totals()["acme"] == {"files": sum(file["bytes"] for file in files)}
        assert {path.stat().st_size for path in (config.data_dir / "files").iterdir() if path.is_file()} == {
            file["bytes"] for file in files
        }


async def downloaded(client, id):
    """The custom_id and the length of the answer of each line of a file, read as it comes."""
    rows, rest = [], b""
    scope, receive, _, _, left = http({}, f"/v1/files/{id}/content", "GET")
    scope["headers"].append((b"authorization", client.headers["authorization"].encode()))

    async def take(message):
        nonlocal rest
        *lines, rest = (rest + message.get("body", b"")).split(b"\n")
        for line in lines:
            row = json.loads(line)
            answer = row["response"]["body"]["choices"][0]["message"]["content"]
            rows.append((row["custom_id"], len(answer)))

    await client._transport.app(scope, receive, take)
    left.set()
    assert rest == b""
    return rows


async def test_results_are_on_their_tenants_account_while_they_are_written_and_after_a_restart(
    connect, config, sdk, monkeypatch
):
    seen = []
    async with connect(config) as client:
        parts, ai = parts_of(client), sdk(client)
        keep, ledger = parts.files.contents.keep, parts.store.ledger

        def kept(id, path):
            written = nbytes(config.data_dir / "files")
            seen.append(sum(ledger.totals()["default"].values()) - written)
            keep(id, path)

        monkeypatch.setattr(parts.files.contents, "keep", kept)
        batch = await ended(ai, await begun(ai, *(request(f"q{number}") for number in range(9)), request("a", "none")))
        assert batch.output_file_id and batch.error_file_id and len(seen) == 3, seen
        assert min(seen) >= 0, "of what is on the disk each byte has an owner"
        files = {file.id: file.bytes for file in (await ai.files.list()).data}
        assert await settled(lambda: ledger.totals() == {"default": {"files": sum(files.values())}})
    async with connect(config) as client:
        assert parts_of(client).store.ledger.totals() == {"default": {"files": sum(files.values())}}


async def test_results_that_the_database_did_not_take_are_on_nobodys_account(connect, config, sdk, monkeypatch):
    async with connect(config) as client:
        parts, ai = parts_of(client), sdk(client)

        def lost(*_):
            raise EngineUnavailable("the registry did not answer")

        monkeypatch.setattr(parts.batches.rows, "finish", lost)
        await begun(ai, request("a"))
        ledger = parts.store.ledger
        assert await settled(lambda: not parts.batches.schedule._working and parts.batches.schedule._paused)
        (file,) = (await ai.files.list()).data
        assert ledger.totals()["default"].keys() == {"files", "answers"}
        assert ledger.nbytes("default", Kind.FILES) == file.bytes, "the input alone"


async def test_an_input_that_is_wrong_fails_with_its_line_numbers_and_asks_nothing(client, sdk, backend):
    ai = sdk(client)
    batch = await ended(ai, await begun(ai, request("a"), "{", request("a"), request("b", url="/v1/completions")))
    assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None
    told = [(error.line, error.code) for error in batch.errors.data]
    assert told == [(2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "url_mismatch")]
    assert backend.bodies == []


async def test_lines_that_fail_are_in_the_error_file_and_the_others_in_the_output(client, sdk, backend):
    ai = sdk(client)
    backend.broken = "base"
    rows = [request("gone", "nobody"), request("stream", stream=True), request("broken", prompt="x")]
    batch = await ended(ai, await begun(ai, *rows))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (0, 3)
    errors = await read(ai, batch.error_file_id)
    gone, stream = errors["gone"]["response"], errors["stream"]["response"]
    assert gone["status_code"] == 404 and gone["body"]["error"]["code"] == "model_not_found"
    assert stream["status_code"] == 400 and "stream" in stream["body"]["error"]["message"]
    assert errors["broken"]["response"] is None and errors["broken"]["error"]["code"] == "internal_error"


@pytest.fixture
async def operated(connect, config, held):
    """A server with keys, its operator's client, and a backend that can be held."""
    async with connect(replace(config, admin_keys=keys_hashed(["run"])), held) as client:
        client.headers["authorization"] = "Bearer run"
        yield client


async def test_files_and_batches_are_their_tenants_alone_also_for_operators(operated, sdk):
    acme, globex = await issued(operated, "acme"), await issued(operated, "globex")
    ai = sdk(acme)
    file = await sent(ai, request("a"))
    batch = await ai.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    await ended(ai, batch.id)
    for other in (sdk(globex), sdk(operated)):
        assert not (await other.files.list()).data and not (await other.batches.list()).data
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                await ask(file)
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(batch.id)
        with pytest.raises(openai.BadRequestError):
            await other.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    assert [found.id for found in (await ai.batches.list()).data] == [batch.id]
    writer = await issued(operated, "acme", "adapters:write")
    for path in ("/v1/files", "/v1/batches"):
        assert (await writer.get(path)).status_code == 403
    assert (await writer.post("/v1/files", data={"purpose": "batch"}, files={"file": b"x"})).status_code == 403


async def test_lines_have_the_rights_of_the_key_and_its_tenant_is_charged(operated, sdk, held, make_adapter):
    held.generation = Generation([1] * 300, [2] * 50, "stop", engine_seconds=0.5)
    acme, globex = await issued(operated, "acme"), await issued(operated, "globex")
    await acme.post("/v1/adapters", **upload(make_adapter()))
    mine = await ended(sdk(acme), await begun(sdk(acme), request("a", "tone"), request("b", "base")))
    theirs = await ended(sdk(globex), await begun(sdk(globex), request("a", "acme/tone"), request("b", "tone")))
    assert mine.request_counts.completed == 2 and theirs.request_counts.failed == 2
    usage = (await operated.get("/v1/usage")).json()["data"]
    usage = [row for row in usage if row["tenant"] != OPERATOR]
    assert sorted((row["tenant"], row["adapter"], row["requests"]) for row in usage) == [
        ("acme", "acme/tone", 1),
        ("acme", "base", 1),
    ]
    assert all((row["prompt_tokens"], row["generated_tokens"]) == (300, 50) for row in usage)


async def test_a_key_that_is_revoked_and_an_adapter_that_is_removed_make_errors_of_the_lines_that_are_left(
    operated, sdk, held, make_adapter
):
    pushed = (await operated.post("/v1/adapters", **upload(make_adapter()))).json()
    held.gate.clear()
    held.pass_on = 2
    acme = await issued(operated, "acme", name="nightly")
    other = await issued(operated, "acme")
    ai = sdk(other)
    own = await begun(sdk(operated), *(request(f"q{number}", "tone", user=f"q{number}") for number in range(8)))
    assert await settled(lambda: held.answered.total() == 2 and held.asked.total() == 6)
    assert (await operated.delete("/v1/adapters/tone")).status_code in (200, 202)
    held.gate.set()
    batch = await ended(sdk(operated), own)
    answers, errors = await read(sdk(operated), batch.output_file_id), await read(sdk(operated), batch.error_file_id)
    assert len(answers) == 6 and len(errors) == 2
    assert {row["response"]["body"]["model"] for row in answers.values()} == {pushed["id"]}
    assert all(row["response"]["body"]["error"]["code"] == "model_not_found" for row in errors.values())

    held.gate.clear()
    theirs = await begun(sdk(acme), *(request(f"r{number}", user=f"r{number}") for number in range(6)))
    assert await settled(lambda: held.asked["r3"] == 1)
    (key,) = [key for key in (await operated.get("/v1/keys")).json()["data"] if key["name"] == "nightly"]
    assert (await operated.delete(f"/v1/keys/{key['id']}")).status_code == 200
    held.gate.set()
    batch = await ended(ai, theirs)
    errors = await read(ai, batch.error_file_id)
    assert set(errors) == {"r4", "r5"} and batch.request_counts.completed == 4
    assert all(row["response"]["body"]["error"]["code"] == "invalid_api_key" for row in errors.values())


async def test_a_keys_own_limits_delay_lines_and_fail_none(operated, sdk):
    acme = await issued(operated, "acme", concurrent=1)
    ai = sdk(acme)
    batch = await ended(ai, await begun(ai, *(request(f"q{number}") for number in range(6))))
    assert (batch.request_counts.completed, batch.request_counts.failed) == (6, 0)


async def test_a_cancelled_batch_keeps_what_was_answered_and_says_what_was_not(connect, config, sdk, held):
    held.gate.clear()
    held.pass_on = 3
    async with connect(config, held) as client:
        ai = sdk(client)
        file = await sent(ai, *(request(f"q{number}", user=f"q{number}") for number in range(20)))
        batch = await ai.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
        assert await settled(lambda: held.asked.total() == 7)
        with pytest.raises(openai.ConflictError, match=batch.id):
            await ai.files.delete(file)
        assert (await ai.batches.cancel(batch.id)).status == "cancelling"
        assert await settled(lambda: all(work.stop.is_set() for work, _ in working(client)))
        held.gate.set()
        batch = await ended(ai, batch.id)
        assert (batch.status, held.asked.total()) == ("cancelled", 7) and batch.cancelling_at <= batch.cancelled_at
        answers, errors = await read(ai, batch.output_file_id), await read(ai, batch.error_file_id)
        assert len(answers) == 7 and len(errors) == 13 and not set(answers) & set(errors)
        assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
        assert (await ai.files.delete(file)).deleted


def working(client):
    return parts_of(client).batches.schedule._working.values()


async def test_a_batch_whose_time_is_over_expires_with_what_it_has(connect, config, sdk, held):
    held.gate.clear()
    held.pass_on = 2
    async with connect(config, held) as client:
        ai = sdk(client)
        id = await begun(ai, *(request(f"q{number}", user=f"q{number}") for number in range(9)))
        assert await settled(lambda: held.asked.total() == 6)
        await asyncio.to_thread(expire, parts_of(client).registry, id)
        parts_of(client).batches.schedule.wake(id)
        assert await settled(lambda: all(work.stop.is_set() for work, _ in working(client)))
        held.gate.set()
        batch = await ended(ai, id)
        assert batch.status == "expired" and batch.expired_at
        answers, errors = await read(ai, batch.output_file_id), await read(ai, batch.error_file_id)
        assert len(answers) == 6 and len(errors) == 3
        assert {row["error"]["code"] for row in errors.values()} == {"batch_expired"}


def expire(registry, id):
    with registry.adding() as connection:
        connection.execute(update(table).where(table.c.id == id).values(expires=1.0))


async def test_a_restart_goes_on_where_the_server_stopped(connect, config, sdk, held, tiny_model):
    rows = [request(f"q{number}", user=f"q{number}") for number in range(30)]
    held.gate.clear()
    held.pass_on = 10
    async with connect(config, held) as client:
        id = await begun(sdk(client), *rows)
        assert await settled(lambda: held.answered.total() == 10 and held.asked.total() == 14)
        assert await settled(lambda: parts_of(client).batches.rows.get("default", id).completed == 10)
        # As after a kill: the claim is still there.
        parts_of(client).batches.rows.release = lambda id=None: None
    again = HeldBackend(str(tiny_model))
    async with connect(config, again) as client:
        batch = await ended(sdk(client), id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 30)
        assert len(await read(sdk(client), batch.output_file_id)) == 30
    assert again.asked.total() == 20, "what was answered is not asked again"
    assert not set(again.asked) & {name for name, count in held.answered.items() if count}


async def test_an_engine_that_dies_loses_no_line_and_none_comes_twice(connect, config, sdk, held):
    held.gate.clear()
    held.pass_on = 5
    async with connect(config, held) as client:
        ai = sdk(client)
        id = await begun(ai, *(request(f"q{number}", user=f"q{number}") for number in range(20)))
        assert await settled(lambda: held.asked.total() == 9)
        held.dead = True
        batch = await ended(ai, id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 0)
        assert len(await read(ai, batch.output_file_id)) == 20
        assert held.heirs, "another engine took over"


async def test_a_name_that_is_unknown_while_the_registry_is_out_of_reach_is_asked_again(client, sdk, monkeypatch):
    lines, calls = parts_of(client).batches.schedule._runner._lines, []

    class Follower:
        async def fresh(self):
            """Nothing new."""

        def check_age(self):
            """It was read a moment ago."""

        def doubted(self, error):
            calls.append(error)
            return EngineUnavailable("the registry cannot be seen", retry_after=0) if len(calls) < 3 else error

    monkeypatch.setattr(lines, "_follower", Follower())
    batch = await ended(sdk(client), await begun(sdk(client), request("a", "nobody")))
    assert batch.request_counts.failed == 1 and len(calls) == 3
    assert (await read(sdk(client), batch.error_file_id))["a"]["response"]["status_code"] == 404


async def test_two_servers_over_one_registry_answer_each_line_once(connect, config, sdk, url, tmp_path, tiny_model):
    shared = replace(config, registry=url, blobs=f"file://{tmp_path}/shared", batch_concurrency=2)
    one, two = HeldBackend(str(tiny_model)), HeldBackend(str(tiny_model))
    other = replace(shared, data_dir=tmp_path / "other")
    async with connect(shared, one) as here, connect(other, two) as there:
        ids = [
            await begun(sdk(here), *(request(f"{name}{number}", user=name) for number in range(12))) for name in "abc"
        ]
        parts_of(there).batches.schedule.wake()
        for id in ids:
            batch = await ended(sdk(there), id)
            assert batch.request_counts.completed == 12
            assert len(await read(sdk(there), batch.output_file_id)) == 12
            assert len(await read(sdk(here), batch.output_file_id)) == 12
    assert one.asked + two.asked == Counter(a=12, b=12, c=12)


async def test_metrics_say_how_batches_do(client, sdk, monkeypatch):
    monkeypatch.setattr("serve.telemetry.metrics.FRESH", -1.0)
    ai = sdk(client)
    await ended(ai, await begun(ai, request("a"), request("b", "nobody")))
    broken = await ai.files.create(file=("in.jsonl", b"no request\n"), purpose="batch")
    batch = await ai.batches.create(input_file_id=broken.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert (await ended(ai, batch.id)).status == "failed"
    await ai.files.delete(broken.id)
    parts_of(client).batches.schedule.wake()
    assert await settled(lambda: parts_of(client).batches.metrics._files[0] == 3)
    text = (await client.get("/metrics")).text
    for line in (
        'loradock_batch_lines_total{result="completed"} 1.0',
        'loradock_batch_lines_total{result="failed"} 1.0',
        'loradock_batches{status="in_progress"} 0.0',
        'loradock_batches_ended_total{status="completed"} 1.0',
        'loradock_batches_ended_total{status="failed"} 1.0',
        "loradock_batch_lines_left 0.0",
        "loradock_batch_oldest_seconds 0.0",
        "loradock_files 3.0",
    ):
        assert line in text, line


async def test_what_was_deleted_or_has_expired_leaves_the_disk(client, sdk, config):
    ai = sdk(client)
    first, second = await sent(ai, request("a")), await sent(ai, request("b"))
    await ai.files.delete(first)
    assert [path.name for path in (config.data_dir / "files").iterdir() if path.is_file()] == [second]
    batches = parts_of(client).batches
    parts_of(client).files.rows._clock = lambda: 1e12
    await asyncio.to_thread(batches.schedule._sweep)
    assert not [path for path in (config.data_dir / "files").iterdir() if path.is_file()]


async def test_changes_are_audited_with_the_id_and_without_the_content(client, sdk, config):
    ai = sdk(client)
    id = await begun(ai, request("a", secret="cabbage"))
    await ended(ai, id)
    log = (config.data_dir / "audit.jsonl").read_text()
    assert '"what": "upload_file"' in log and '"what": "create_batch"' in log and id in log and "cabbage" not in log


async def test_a_batch_ends_at_its_tenants_quota_with_the_lines_that_were_answered(connect, config, sdk, held):
    async with connect(replace(config, batch_tenant_bytes=40_000), held) as client:
        ai = sdk(client)
        batch = await ended(ai, await begun(ai, *(request(f"q{number}", user=f"q{number}") for number in range(150))))
        assert batch.status == "failed" and 0 < batch.request_counts.completed < 150
        assert batch.request_counts.completed + batch.request_counts.failed == 150
        (error,) = batch.errors.data
        assert error.code == "quota_exceeded" and "pass its 40000: delete some" in error.message
        answers = await read(ai, batch.output_file_id)
        assert len(answers) == batch.request_counts.completed
        kept = [file.bytes for file in (await ai.files.list()).data]
        assert sum(kept) <= 40_000
        ledger = parts_of(client).store.ledger
        assert ledger.totals()["default"] == {"files": sum(kept)}, "what was answered is a file, once"


async def test_answers_are_no_rows_of_the_registry_while_a_batch_runs(connect, config, sdk, held):
    held.gate.clear()
    held.pass_on = 10
    async with connect(config, held) as client:
        ai = sdk(client)
        id = await begun(ai, *(request(f"q{number}", user=f"q{number}") for number in range(12)))
        assert await settled(lambda: parts_of(client).batches.rows.get("default", id).completed == 10)
        assert parts_of(client).batches.rows.old_lines(id) == []
        assert parts_of(client).store.ledger.totals()["default"]["answers"] > 1000
        held.gate.set()
        assert (await ended(ai, id)).request_counts.completed == 12
        assert list((config.data_dir / "files/answers").iterdir()) == []


async def test_unfinished_uploads_take_no_more_than_the_tenant_may_keep(connect, config, held):
    sent_bytes, go_on = [0] * 16, asyncio.Event()

    async with connect(replace(config, batch_tenant_bytes=20 << 20), held) as client:

        async def form(number):
            yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
            for _ in range(17):
                yield b" " * (1 << 20)
                sent_bytes[number] += 1 << 20
            await go_on.wait()

        async def unfinished(number):
            headers = {"content-type": "multipart/form-data; boundary=x"}
            return await client.post("/v1/files", content=form(number), headers=headers)

        sending = [asyncio.create_task(unfinished(number)) for number in range(16)]
        place = config.data_dir / "files/incoming"
        assert await settled(lambda: sum(task.done() for task in sending) >= 15 or max(sent_bytes) == 17 << 20)
        assert nbytes(place) <= 20 << 20
        assert parts_of(client).store.ledger.nbytes("default") <= 20 << 20
        go_on.set()
        statuses = [answer.status_code for answer in await asyncio.gather(*sending)]
        assert set(statuses) <= {400, 429} and statuses.count(429) >= 14
        assert parts_of(client).store.ledger.totals() == {}


@pytest.mark.parametrize(("on_cpu", "given", "lines"), [(True, 0, 4), (False, 0, 64), (False, 6, 6), (True, 9, 9)])
def test_how_many_lines_an_idle_engine_gets_is_for_its_device(config, monkeypatch, on_cpu, given, lines):
    monkeypatch.setattr(hardware, "on_cpu", lambda: on_cpu)
    assert build.limits_of(replace(config, batch_concurrency=given)).concurrency == lines
