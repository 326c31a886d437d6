"""Long streams are written by another process: to the last byte the same, and who is slow or dies hurts no other."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from serve.asgi.cancellation import CancellableCall
from serve.asgi.exchange import Generation
from serve.asgi.fast_stream import FastStream
from serve.config import keys_hashed
from serve.errors import LoradockError
from serve.models import hardware
from serve.server import front_ends as module
from serve.server.front_end_process import FORGET, GIVE_BACK, OPEN, STUCK, Messages, Streams, framed, packed
from serve.server.front_ends import how_many
from tests.support.app import upload
from tests.support.speaking import Speaking, chunk, served, with_front_ends
from tests.support.waiting import settled

PATH = "/v1/chat/completions"


class Story:
    """An app that tells as many pieces as the query says, `word` each, and waits for `go` before the piece `waits`."""

    def __init__(self, word=" word", waits=None):
        self.word = word
        self.waits = waits
        self.go = asyncio.Event()
        self.errors = []
        self.left = 0

    async def __call__(self, scope, receive, send):
        call = CancellableCall(receive, send, lambda: None)
        stream = FastStream.of(scope, {"stream": True}, call.send, call)
        try:
            await call.run(self._talk(int(scope["query_string"]), stream), scope, stream.send)
        except LoradockError as error:
            self.errors.append(error)
            body = b'data: {"error":"it broke off"}\n\n'
            await send({"type": "http.response.body", "body": body, "more_body": False})

    def _talk(self, pieces, stream):
        async def talk(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-story", b"1")]})
            await send({"type": "http.response.body", "body": chunk("m", "first"), "more_body": True})
            for number in range(pieces):
                if number == self.waits:
                    await self.go.wait()
                if stream.blocked:
                    body = chunk("m", f"{number}{self.word}")
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                else:
                    stream.write(f"{number}{self.word}")
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

        async def until_left(scope, receive, send):
            talking = asyncio.create_task(talk(scope, receive, send))
            leaving = asyncio.create_task(left(receive))
            await asyncio.wait({talking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            self.left += not talking.done()
            for task in (talking, leaving):
                task.cancel()

        async def left(receive):
            while (await receive())["type"] != "http.disconnect":
                continue

        return until_left


def request(pieces, connection="keep-alive"):
    return f"POST {PATH}?{pieces} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\nContent-Length: 0\r\n\r\n".encode()


def told(pieces, word=" word"):
    return ["first", *(f"{number}{word}" for number in range(pieces))]


def words(stream):
    """What is said in a body, or in a body with its chunks' lengths."""
    lines = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: {")]
    return [line["choices"][0]["delta"]["content"] for line in lines if "choices" in line]


async def connected(url):
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port), limit=1 << 26)


async def answer(reader):
    return re.sub(rb"date: [^\r]*", b"date: ", await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 60))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_stream_is_the_same_to_the_last_byte_and_its_connection_answers_on(loop):
    async def exchanged(beside):
        async with with_front_ends(Story(' wörd "\n'), beside, lifespan="off") as (url, front_ends):
            reader, writer = await connected(url)
            bodies = []
            for pieces in (100, 3, 1000):
                writer.write(request(pieces))
                bodies.append(await answer(reader))
            writer.write(request(200, "close"))
            bodies.append(await reader.read())  # to the connection's end
            writer.close()
            return [re.sub(rb"date: [^\r]*", b"date: ", body) for body in bodies], front_ends.handed

    async def both():
        (alone, none), (beside, handed) = await exchanged(0), await exchanged(1)
        assert alone == beside
        # A connection that is still on its way back when the next answer is over stays where it is.
        assert none == 0 and 1 <= handed <= 3, "a short one stays in the server"
        assert words(beside[2]) == told(1000, ' wörd "\n')

    import uvloop

    factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[loop]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(both())


async def test_a_next_request_that_comes_meanwhile_is_answered_after_the_stream():
    story = Story(waits=50)
    async with with_front_ends(story, 1, lifespan="off") as (url, front_ends):
        reader, writer = await connected(url)
        writer.write(request(100))
        await reader.readuntil(b"49 word")
        assert front_ends.handed == 1
        writer.write(request(2) + request(40))
        await asyncio.sleep(0.05)
        story.go.set()
        assert words(await answer(reader)) == told(100)[51:]
        assert words(await answer(reader)) == told(2)
        assert words(await answer(reader)) == told(40)
        writer.close()


async def test_a_client_that_reads_slowly_gets_every_piece_and_holds_up_nobody():
    story = Story(word="x" * 2000)
    async with with_front_ends(story, 1, lifespan="off") as (url, front_ends):
        host, port = url.removeprefix("http://").split(":")
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(slow, (host, int(port)))
        slow_reader, slow_writer = await asyncio.open_connection(sock=slow, limit=1 << 26)
        slow_writer.transport.pause_reading()
        slow_writer.write(request(6000))
        assert await settled(lambda: front_ends.handed == 1)
        reader, writer = await connected(url)
        for _ in range(3):
            writer.write(request(300))
            assert words(await answer(reader)) == told(300, story.word)
        slow_writer.transport.resume_reading()
        assert words(await answer(slow_reader)) == told(6000, story.word)
        for each in (writer, slow_writer):
            each.close()


async def test_a_client_that_leaves_ends_its_answer_and_leaves_nothing_open():
    story = Story(waits=50)
    async with with_front_ends(story, 1, lifespan="off") as (url, front_ends):
        (pid,) = front_ends.pids
        story.waits = None
        reader, writer = await connected(url)
        writer.write(request(100, "close"))
        await reader.read()
        writer.close()
        story.waits, files = 50, len(os.listdir(f"/proc/{pid}/fd"))
        for leave in ("close", "abort"):
            reader, writer = await connected(url)
            writer.write(request(100))
            await reader.readuntil(b"49 word")
            assert len(os.listdir(f"/proc/{pid}/fd")) == files + 1
            writer.close() if leave == "close" else writer.transport.abort()
            assert await settled(lambda: len(os.listdir(f"/proc/{pid}/fd")) == files)
        assert story.left == 2 and not story.errors


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_process_that_dies_or_hangs_ends_its_streams_with_an_error_and_has_a_follower(end, monkeypatch):
    story = Story(word="x" * 2000, waits=50)
    async with with_front_ends(story, 1, lifespan="off") as (url, front_ends):
        (pid,) = front_ends.pids
        reader, writer = await connected(url)
        writer.write(request(100_000))
        await reader.readuntil(b'"49x')
        monkeypatch.setattr(module, "HANG_SECONDS", 0.2)
        os.kill(pid, end)
        story.go.set()
        last = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 60)
        monkeypatch.undo()
        assert b'data: {"error"' in last and b"[DONE]" not in last
        assert "has died" in story.errors[0].message and story.errors[0].status == 503
        writer.write(request(10))  # its connection lives
        assert words(await answer(reader)) == told(10, story.word)
        assert await settled(lambda: front_ends.pids not in ([], [pid]))
        assert front_ends.deaths == 1
        writer.write(request(100))
        assert words(await answer(reader)) == told(100, story.word)
        assert front_ends.handed == 2
        writer.close()
    assert not Path(f"/proc/{pid}").exists()


async def test_what_is_under_way_when_the_server_stops_is_told_to_its_end():
    story = Story(waits=50)
    async with with_front_ends(story, 2, lifespan="off") as (url, front_ends):
        pids = front_ends.pids
        streams = [await connected(url) for _ in range(4)]
        for reader, writer in streams:
            writer.write(request(100))
            await reader.readuntil(b"49 word")
        assert front_ends.handed == 4
        asyncio.get_running_loop().call_later(0.2, story.go.set)
        reading = [asyncio.create_task(answer(reader)) for reader, _ in streams]
        await asyncio.sleep(0)
    assert [words(await each) for each in reading] == [told(100)[51:]] * 4
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_pieces_of_a_stream_that_is_stuck_wait_for_it_to_be_given_back():
    """Without a process around it: what it does with what it is told."""
    ours, its = socket.socketpair()
    reading, writing = socket.socketpair()
    with ours, its, reading:
        writing.setblocking(False)
        streams, messages = Streams(its), Messages()

        def tell(*pairs):
            message = packed(list(pairs))
            streams.take(messages.take(message[:3]))  # it may come in pieces
            streams.take(messages.take(message[3:]))
            answers, streams.answers = streams.answers, []
            return answers

        with writing:
            socket.send_fds(ours, [b"."], [writing.fileno()])
        large = bytes(8 << 20)
        said = b'10\r\ndata: "\xc3\xb6\\"\\n"\n\n\r\n'
        assert framed(b"data: ", 'ö"\n', b"\n\n") == said
        form = [b"data: ", b"\n\n"]
        assert tell(7, OPEN, 7, form, 7, b"a", 7, 'ö"\n', 7, b"b", 7, large) == [7, STUCK]
        assert tell(7, b"more", 7, 'ö"\n', 8, b"nobody's") == []
        number, rest = tell(7, GIVE_BACK)
        assert number == 7 and rest.endswith(b"\0more" + said)
        got = b""
        while piece := reading.recv(1 << 20):  # ends: no descriptor of it is left
            got += piece
        assert got + rest == b"a" + said + b"b" + large + b"more" + said
        assert tell(7, b"late", 7, FORGET) == []


@pytest.mark.parametrize(
    ("setting", "gpu", "secure", "cores", "count"),
    [
        ("1", True, False, 64, 1),
        ("3", False, False, 2, 3),
        ("auto", False, False, 64, 1),
        ("auto", True, False, 64, 2),
        ("auto", True, False, 2, 1),
        ("auto", True, True, 64, 1),
    ],
)
def test_auto_takes_a_second_core_where_a_gpu_computes(monkeypatch, setting, gpu, secure, cores, count):
    monkeypatch.setattr(hardware, "on_cpu", lambda: not gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert how_many(setting, secure=secure) == count


@pytest.fixture
def speaking(tiny_model):
    return Speaking(str(tiny_model))


async def streamed(client, model="base", **fields):
    """The bytes of an answer's body."""
    body = {"model": model, "messages": [], "stream": True, **fields}
    async with client.stream("POST", PATH, json=body) as answer:
        assert answer.status_code == 200
        return b"".join([piece async for piece in answer.aiter_bytes()])


async def test_bodies_counts_and_what_a_tenant_pays_are_the_same(config, tiny_model, tmp_path):
    keyed, limit = replace(config, admin_keys=keys_hashed(["run"])), 2000
    seen = []
    for beside in (0, 1):
        where, backend = replace(keyed, data_dir=tmp_path / f"data-{beside}"), Speaking(str(tiny_model))
        backend.generation = Generation(range(300), range(50), "length")
        async with (
            served(where, backend, beside) as (url, front_ends, parts),
            httpx.AsyncClient(base_url=url, timeout=60) as client,
        ):
            client.headers["authorization"] = "Bearer run"
            limits = {"tokens_per_minute": limit}
            key = {"tenant": "acme", "name": "key", "scopes": ["inference"], "limits": limits}
            secret = (await client.post("/v1/keys", json=key)).json()["secret"]
            client.headers["authorization"] = f"Bearer {secret}"
            fields = ({}, {"stream_options": {"include_usage": True}}, {"n": 2}, {"tools": []})
            bodies = [await streamed(client, **each) for each in fields]
            plain = await client.post(PATH, json={"model": "base", "messages": []})
            await asyncio.to_thread(parts.exchange_worker.settle)
            client.headers["authorization"] = "Bearer run"
            metrics = (await client.get("/metrics")).text
        spent = limit - int(plain.headers["x-ratelimit-remaining-tokens"])
        counted = "requests|generation_tokens|prompt_tokens|usage_tokens"
        counts = sorted(re.findall(rf"^loradock_(?:{counted})_total\S* \d.*", metrics, re.M))
        seen.append((bodies, round(spent / 350), counts))
        assert beside <= front_ends.handed <= 2 * beside, "what is not plain stays in the server"
    assert seen[0] == seen[1]
    assert len(seen[0][2]) > 3 and b"total_tokens" in seen[0][0][1]


async def test_streams_of_a_process_that_is_killed_are_failures_and_others_are_none(config, speaking):
    speaking.flow.clear()
    async with (
        served(config, speaking, 1) as (url, front_ends, parts),
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        asked = [asyncio.create_task(streamed(client)) for _ in range(3)]
        assert await settled(lambda: front_ends.handed == 3)
        os.kill(front_ends.pids[0], signal.SIGKILL)
        for each in asked:
            last = (await each).rstrip().rpartition(b"\n\n")[2]
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert error["code"] == 503 and "send the request again" in error["message"]
        speaking.flow.set()
        assert await settled(lambda: speaking.running == 0), "the engine works for nobody"
        assert (await streamed(client)).endswith(b"data: [DONE]\n\n")
        assert await settled(lambda: front_ends.pids)
        await asyncio.to_thread(parts.exchange_worker.settle)
        metrics = (await client.get("/metrics")).text
    assert re.search(r'^loradock_requests_failed_total\{[^}]*reason="error"[^}]*\} 3', metrics, re.M)


async def test_a_promote_under_streams_loses_nothing_and_mixes_nothing(config, speaking, make_adapter):
    async with (
        served(config, speaking, 2) as (url, front_ends, _),
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        ids = []
        for seed in (0, 1):
            pushed = await client.post("/v1/adapters", **upload(make_adapter(seed), promote=str(not seed).lower()))
            ids.append(pushed.json()["id"])
        stop, bodies = asyncio.Event(), []

        async def keep_asking():
            while not stop.is_set():
                bodies.append(await streamed(client, "tone"))

        asking = [asyncio.create_task(keep_asking()) for _ in range(8)]
        for swap in range(6):
            count = len(bodies)
            assert await settled(lambda count=count: len(bodies) > count + 8)
            promoted = await client.post("/v1/adapters/tone/promote", json={"version": 1 + (swap + 1) % 2})
            assert promoted.status_code == 200
        stop.set()
        await asyncio.gather(*asking)
    models = []
    for body in bodies:
        assert body.endswith(b"data: [DONE]\n\n") and len(words(body)) == Speaking.words + 1
        (model,) = {json.loads(line[6:])["model"] for line in body.splitlines() if line.startswith(b"data: {")}
        assert all(word == f" {model}\n" for word in words(body)[:-1])
        models.append(model)
    assert set(models) == set(ids)
    assert front_ends.handed >= 8
