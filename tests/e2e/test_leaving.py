"""A client that leaves frees its request in the engine and its lease."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.support.lora import STORY
from tests.support.server import ADMIN, Answer, Server, done
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

# Minutes of work for a request that nobody stops.
ENDLESS = {"tokens": 2000, "ignore_eos": True}
SOON = 30  # the engine hears of it after its step, and a long prefill is one step


@pytest.fixture(autouse=True)
def idle(server: Server) -> None:
    assert eventually(lambda: is_idle(server)), "an earlier test left requests in the engine"


def is_idle(server: Server) -> bool:
    engine = server.engine()
    return engine["leases"] == 0 and engine["running"] == 0


def test_a_client_that_leaves_mid_stream_frees_its_request_and_its_lease(server, adapters, name):
    id = done(server.upload(name, adapters["alpha"]))["id"]
    left = [server.answering(Answer(), name, "Tell me everything.", **ENDLESS) for _ in range(4)]
    try:
        for pieces in left:
            next(pieces)
        engine = server.engine()
        assert engine["leases"] == engine["running"] == 4, engine
        assert id in engine["resident"]
    finally:
        for pieces in left:
            pieces.close()
    assert eventually(lambda: is_idle(server), SOON), server.engine()
    # With the leases free, the version can leave as well.
    done(server.http.delete(f"/v1/adapters/{name}"))
    assert eventually(lambda: not server.resident(name))


def test_clients_that_leave_before_the_first_word_free_theirs_too(server, voice):
    asked = [ask(server, voice, stream=True, prompt=f"{number} {STORY * 10}") for number in range(2)]
    assert eventually(lambda: server.engine()["leases"] == len(asked), SOON)
    asked[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        asked[-1].recv(1)
    for one in asked:
        one.close()
    assert eventually(lambda: is_idle(server), SOON), server.engine()
    assert server.ask(voice).word == "alpha"


def test_a_client_that_does_not_wait_for_a_whole_answer_frees_it(server, voice):
    waiting = ask(server, voice, stream=False, prompt="Tell me everything.")
    assert eventually(lambda: server.engine()["running"] == 1, SOON)
    waiting.close()
    assert eventually(lambda: is_idle(server), SOON), server.engine()


def test_a_client_that_leaves_within_its_request_leaves_nothing(server, voice):
    half = socket.create_connection(("127.0.0.1", server.port))
    half.sendall(request(voice, True, "Hello")[:-20])
    time.sleep(0.3)
    half.close()
    assert eventually(lambda: is_idle(server), SOON), server.engine()


def test_an_upload_that_breaks_off_leaves_nothing(server, adapters, name):
    before = server.stored()
    told = server.full_log.read_text().count("Traceback")
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        f'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n{name}\r\n'
        '--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
    )
    half = socket.create_connection(("127.0.0.1", server.port))
    half.sendall(head.encode() + b"\0" * 300_000)
    time.sleep(0.5)
    half.close()
    assert eventually(lambda: server.stored() == before)
    assert server.http.get(f"/v1/adapters/{name}").status_code == 404
    assert server.full_log.read_text().count("Traceback") == told, "a client's leaving is no error of the server"


def ask(server: Server, model: str, *, stream: bool, prompt: str) -> socket.socket:
    """A request on its way, over a socket that can be closed at any moment."""
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.sendall(request(model, stream, prompt))
    return sock


def request(model: str, stream: bool, prompt: str) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": stream}
    content = json.dumps({**body, "max_tokens": ENDLESS["tokens"], "ignore_eos": True}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {ADMIN}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
