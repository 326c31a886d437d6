"""A stop lets answers end; a start, after a stop or a kill, knows everything that was acknowledged."""

from __future__ import annotations

import signal
import time

import httpx
import pytest

from tests.support.crowd import engines
from tests.support.server import SMALL, Answer, Server, alive, descendants, done
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_a_server_stops_gracefully_and_comes_back_with_everything_also_after_a_kill(adapters, tmp_path):
    data, log = tmp_path / "data", tmp_path / "log"
    with Server(data, log, *SMALL, "--grace-period", "120") as first:
        ids = [done(first.upload("tone", adapters[word]))["id"] for word in ("alpha", "bravo")]
        done(first.http.post("/v1/adapters/tone/rollback"))
        done(first.upload("other", adapters["charlie"]))
        before = {name: first.adapter(name) for name in ("tone", "other")}
        it_stops_gracefully(first)

    with Server(data, log, *SMALL) as second:
        assert known(second, before) == known_of(before)
        it_answers(
            second, {"tone": "alpha", "tone@v1": "alpha", "tone@v2": "bravo", ids[1]: "bravo", "other": "charlie"}
        )
        done(second.http.post("/v1/adapters/tone/promote", json={"version": 2}))
        done(second.http.delete("/v1/adapters/other"))
        # A kill at once after the acknowledgement, with an answer under way.
        answer = Answer()
        pieces = second.answering(answer, "tone", "Tell me everything.", tokens=200)
        next(pieces)
        before = {"tone": second.adapter("tone")}
        added = done(second.upload("late", adapters["alpha"]))
        second.process.kill()
        second.process.wait()
        assert eventually(lambda: not alive(second.family)), "the engine outlived its server"
        with pytest.raises(httpx.TransportError):
            for _ in pieces:
                pass

    with Server(data, log, *SMALL, "--grace-period", "1") as third:
        assert known(third, before) == known_of(before)
        it_answers(third, {"tone": "bravo", "tone@v1": "alpha", "late": "alpha", added["id"]: "alpha"})
        assert third.http.get("/v1/adapters/other").status_code == 404
        assert {row["name"] for row in done(third.http.get("/v1/adapters"))["data"]} == {"tone", "late"}
        # The same bytes are still the same version, and a new one gets the next number.
        assert third.upload("tone", adapters["alpha"], promote=False).status_code == 200
        assert done(third.upload("tone", adapters["charlie"], promote=False))["version"] == 3
        it_does_not_wait_longer_than_its_grace_period(third)


def it_stops_gracefully(server: Server) -> None:
    answer = Answer()
    pieces = server.answering(answer, "tone", "Tell me everything.", tokens=80)
    next(pieces)
    server.process.send_signal(signal.SIGTERM)
    assert eventually(lambda: turned_away(server)), "it still takes requests"
    assert not answer.finish, "the answer ended before the stop could be seen"
    for _ in pieces:
        pass
    assert (answer.word, answer.finish, answer.done) == ("alpha", "length", True)
    began = time.monotonic()
    assert server.process.wait(90) == 0
    print(f"ended {time.monotonic() - began:.1f} s after its last answer")
    assert eventually(lambda: not alive(server.family)), "the engine outlived its server"


def it_does_not_wait_longer_than_its_grace_period(server: Server) -> None:
    pieces = server.answering(Answer(), "tone", "Tell me everything.", tokens=3000, ignore_eos=True)
    next(pieces)
    # Its terminal is closed; behind `nohup` that is nothing to it.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    server.process.send_signal(signal.SIGTERM if ignored else signal.SIGHUP)
    assert server.process.wait(60) == 0
    with pytest.raises(httpx.TransportError):
        for _ in pieces:
            pass
    assert eventually(lambda: not alive(server.family)), "the engine outlived its server"


def turned_away(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/v1/models", timeout=5).status_code == 503
    except httpx.TransportError:
        return True


def it_answers(server: Server, wanted: dict[str, str]) -> None:
    assert {model: server.ask(model).word for model in wanted} == wanted


def known(server: Server, names: dict) -> dict:
    return known_of({name: server.adapter(name) for name in names})


def known_of(adapters: dict) -> dict:
    """What must outlive a process: all but where the weights happen to be, and the last half hour's latencies."""
    return {
        name: {
            **shown,
            "versions": [
                {key: one[key] for key in one if key not in ("resident", "recent")} for one in shown["versions"]
            ],
        }
        for name, shown in adapters.items()
    }


def test_a_stop_in_the_middle_of_a_start_waits_for_no_engine(tmp_path):
    server = Server(tmp_path / "data", tmp_path / "log", *SMALL)
    try:
        assert eventually(lambda: engine_is_starting(server), 120), "it never began"
        server.family = descendants(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(90) == 0
        assert eventually(lambda: not alive(server.family)), "the engine outlived its server"
        assert "ready: " not in server.log.read_text(), "it waited for the engine"
    finally:
        server.__exit__()


def engine_is_starting(server: Server) -> bool:
    """There is a process beside the server and those that Python runs for it."""
    assert server.process.poll() is None
    return "listening on" in server.log.read_text() and bool(engines(server))
