"""Connections that cannot be held for nothing: each phase of a request has an end, and newcomers find room."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import httpx

from serve.asgi.connection import recognise
from serve.server.connection import HEAD_BYTES, URL_BYTES, ConnectionLimits, guarded
from tests.support.listening import listening
from tests.support.waiting import settled

TIMEOUT = 0.3
# Of tests in which nobody is let go for being silent.
PATIENT = 60.0
ROOM = ConnectionLimits(total=1000, anonymous=500, per_address=500)


# The paths of all requests that the app below has begun.
begun: list[str] = []


async def echo(scope, receive, send):
    """Answers with the length of the body; `/slow` after longer than a silent connection has, `/big` with much."""
    if scope["path"] == "/known":
        recognise(scope)
    begun.append(scope["path"])
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * TIMEOUT)
    body = bytes(64 << 20) if scope["path"] == "/big" else str(size).encode()
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(limits=ROOM, timeout=TIMEOUT):
    kind = guarded(timeout, limits)
    async with listening(echo, force_exit=True, http=kind, lifespan="off") as url:
        yield httpx.URL(url).port, kind.peers


def client_of(port):
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)


async def exchanged(port, *pieces, gap=0.0, sent=None):
    """What comes back for these pieces until the server closes, which it must; those that went go into `sent`."""
    client = socket.create_connection(("127.0.0.1", port))
    # The first is there when the server takes the connection, whatever this process waits for between.
    for piece in pieces[:1]:
        client.sendall(piece)
    reader, writer = await asyncio.open_connection(sock=client)
    answer = asyncio.create_task(reader.read())
    try:
        for number, piece in enumerate(pieces):
            if number:
                writer.write(piece)
                await writer.drain()
            if sent is not None:
                sent.append(piece)
            await asyncio.sleep(gap)
            if answer.done():
                break
    except ConnectionError:
        pass
    try:
        return await asyncio.wait_for(answer, 60)
    except ConnectionError:
        return b""
    finally:
        writer.close()


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"


async def test_a_connection_that_never_asks_is_closed():
    async with serving() as (port, _):
        assert await exchanged(port) == b""


async def test_half_a_head_is_a_408_whether_it_stops_or_drips():
    async with serving() as (port, _):
        assert (await exchanged(port, b"GET / HTTP/1.1\r\nHost:")).startswith(b"HTTP/1.1 408")
        dripping = [b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * 100]
        sent = []
        assert b" 200 " not in await exchanged(port, *dripping, gap=0.05, sent=sent)
        assert len(sent) < len(dripping), "it was let drip on"


async def test_the_second_request_of_a_connection_has_the_same_deadline():
    async with serving() as (port, _):
        for half in (b"GET / HT", b"\r\n", b"GET / HTTP/1.1\r\nHost:"):
            answer = await exchanged(port, GET, half, gap=0.1)
            assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") <= 2


async def test_half_a_body_is_a_408_whether_it_stops_or_drips():
    async with serving() as (port, _):
        stopped = await exchanged(port, POST + b"half")
        assert stopped.startswith(b"HTTP/1.1 408")
        assert "body" in json.loads(stopped.partition(b"\r\n\r\n")[2])["error"]["message"]
        sent = []
        assert b" 200 " not in await exchanged(port, POST, *[b"x"] * 99, gap=0.05, sent=sent)
        assert len(sent) < 90, "it was let drip on"


async def test_a_slow_but_steady_body_arrives():
    async with serving(timeout=4.0) as (port, _):
        head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 6000\r\n\r\n"
        answer = await exchanged(port, head, *[bytes(300)] * 20, gap=0.25)
        assert answer.endswith(b"6000")


async def test_an_answer_that_takes_longer_than_a_silent_client_may_comes():
    async with serving() as (port, _), client_of(port) as client:
        for _ in range(2):
            assert (await client.get("/slow")).text == "0"


async def test_half_a_request_behind_one_that_is_answered_does_not_cut_the_answer():
    async with serving() as (port, _):
        slow = GET.replace(b"GET /", b"GET /slow")
        answer = await exchanged(port, slow + b"GET / HT")
        assert answer.startswith(b"HTTP/1.1 200") and b"\r\n\r\n0" in answer


async def test_a_client_that_reads_nothing_is_let_go():
    async with serving() as (port, peers):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.transport.pause_reading()
        writer.write(GET.replace(b"GET /", b"GET /big"))
        assert await settled(lambda: len(peers) == 1)
        assert await settled(lambda: not len(peers))
        writer.transport.abort()


async def test_heads_and_urls_are_bounded():
    async with serving(timeout=PATIENT) as (port, _):
        many = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (HEAD_BYTES // 5) + b"\r\n"
        assert (await exchanged(port, many)).startswith(b"HTTP/1.1 431")
        endless = [b"GET / HTTP/1.1\r\na: ", *[b"b" * 65536] * 8]
        assert b" 200 " not in await exchanged(port, *endless, gap=0.01)
        long = b"GET /" + b"a" * URL_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        assert (await exchanged(port, long)).startswith(b"HTTP/1.1 414")
        fits = b"GET /" + b"a" * (URL_BYTES - 100) + b" HTTP/1.1\r\nConnection: close\r\n\r\n"
        assert (await exchanged(port, fits)).startswith(b"HTTP/1.1 200")


async def test_a_crowd_without_keys_does_not_keep_others_out_nor_close_those_who_are_known():
    limits = ConnectionLimits(total=30, anonymous=10, per_address=10)
    async with serving(limits, PATIENT) as (port, peers):
        async with client_of(port) as known:
            assert (await known.get("/known")).text == "0"
            crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
            assert len(peers) <= 11
            assert (await exchanged(port, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))).endswith(b"0")
            assert (await known.get("/known")).text == "0"
            assert peers.closed_for_room >= 30
        for _, writer in crowd:
            writer.close()


async def test_a_full_server_says_so():
    limits = ConnectionLimits(total=-31, anonymous=10, per_address=10)  # 32 more from this machine
    async with serving(limits, PATIENT) as (port, _), client_of(port) as client:
        assert (await client.get("/known")).status_code == 200
        assert (await exchanged(port)).startswith(b"HTTP/1.1 503")


async def test_a_request_whose_client_has_left_by_its_turn_is_not_begun():
    async with serving(timeout=PATIENT) as (port, peers):
        # Nothing is awaited here: the event loop hears of the request and of the end of its connection at once.
        for path in (b"/left", b"/left", b"/stays"):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            if path == b"/left":
                client.close()
        client.setblocking(False)
        answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1000), 60)
        client.close()
        assert answer.startswith(b"HTTP/1.1 200")
        assert "/stays" in begun and "/left" not in begun
        assert await settled(lambda: not len(peers))
