"""`make fleet`: servers over PostgreSQL and an S3 server, and what becomes of traffic when each of them fails.

The database and the bucket stand behind proxies, one for each server, so that one is cut off as well as all. Clients
ask the servers in turn all the while, and hold each answer against what is live. A scene ends when promotes through
each server hold on all again. Over FakeBackend, or with `--engine` over the real one and the embedded model. With
`--ray` the servers are replicas on Ray, which share one way to the database and one to the bucket, and clients ask
Ray's proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import httpx
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import save_file

from serve.client.bench.swap import Plan, prove
from serve.client.bench.wire import Address
from tests.support import postgres, tiny
from tests.support.app import upload
from tests.support.balancer import balancer
from tests.support.counted_server import HEADERS, Counted, Reached
from tests.support.fleet_traffic import Traffic
from tests.support.lora import trained, variant
from tests.support.proxy import Mode, Proxy, tcp, unix
from tests.support.server import BASE, SMALL, descendants, listens

NAME, LOOPED = "tone", "looped"
# How long a fault lasts, and within what time a rollback holds on the server that was asked for it.
FAULT_SECONDS, ROLLBACK_SECONDS = 15.0, 3.0
# A row that has not changed for so long is of no server that lives; a beat more, and some for a busy machine.
GONE_SECONDS, CONVERGED_SECONDS = 15.0, 60.0
# Ratings after which a canary that gets bad ones alone must have ended.
MOST_RATINGS = 800
# By then what one server deleted is deleted on all.
DELETED_SECONDS = 60.0
# By then a loop has taken its next step.
LOOP_SECONDS = 90.0
# By then usage is in the registry.
LEDGER_SECONDS = 17.0
# By then Ray has replaced a replica, or has started one more. Their own ports follow the proxy's.
REPLACED_SECONDS, MOST_REPLICAS = 400.0, 9


@dataclass
class Place:
    """What a server has of the database and the bucket: its own way to each."""

    server: Reached
    database: Proxy
    store: Proxy


@dataclass
class Stage:
    """The servers, what they share, and the clients."""

    work: Path
    sql: postgres.PostgreSQL
    s3: int
    model: str
    flags: tuple[str, ...]
    stack: ExitStack
    places: list[Place] = field(default_factory=list)
    traffic: Traffic | None = None
    started: int = 0

    @property
    def clients(self) -> Traffic:
        assert self.traffic is not None
        return self.traffic

    @property
    def servers(self) -> list[Reached]:
        return [place.server for place in self.places]

    @property
    def door(self) -> AbstractContextManager[Any]:
        """Its `port` leads to any of the servers."""
        return balancer([server.port for server in self.servers])

    def asked(self, server: Reached) -> str:
        """Who the clients ask, where this server answers."""
        return server.name

    def ask(self, servers: Sequence[Reached]) -> None:
        """Clients ask these in turn."""
        self.clients.servers = servers

    def begin(self, count: int) -> None:
        """The first servers."""
        for _ in range(count):
            self.join()

    def join(self) -> None:
        """One server more."""
        ways = self._ways()
        self.started += 1
        server = self._start(f"server-{self.started}", *ways)
        self.places.append(Place(server, *ways))
        self._wait_until_listed(server)

    def leave(self) -> None:
        """The last server gets no more requests, answers those that it has, and stops."""
        server = self.places.pop().server
        assert isinstance(server, Counted)
        self.ask_all()
        time.sleep(1.0)
        server.stop()

    def again(self, place: Place) -> None:
        """The server of this place, which was killed, starts again."""
        place.server = server = self._start(place.server.name, place.database, place.store, place.server.port)
        self._wait_until_listed(server)

    def _ways(self) -> tuple[Proxy, Proxy]:
        """To the database and to the bucket."""
        return self.stack.enter_context(Proxy(unix(self.sql.socket))), self.stack.enter_context(Proxy(tcp(self.s3)))

    def _wait_until_listed(self, server: Counted) -> None:
        """It serves, and every server says that all live."""
        server.wait_until_ready()
        until(lambda: all(len(replicas(server)) == len(self.places) for server in self.servers), GONE_SECONDS)

    def _start(self, name: str, database: Proxy, store: Proxy, port: int = 0, **more: str) -> Counted:
        registry = f"postgresql+psycopg://loradock@127.0.0.1:{database.port}/postgres"
        server = Counted(
            self.work, name, registry, "s3://models/adapters", *self.flags, port=port, model=self.model,
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{store.port}", **S3, **more,
        )  # fmt: skip
        self.stack.callback(server.kill)
        return server

    def fresh(self, name: str) -> Path:
        """An adapter that nobody has pushed."""
        seed = 10 + len([*self.work.glob("fresh-*")])
        if self.model:
            return variant(trained("alpha")["alpha"], self.work / f"fresh-{name}", scale=1 + seed / 100)
        return tiny.adapter(self.work / f"fresh-{name}", seed)

    def ask_all(self) -> None:
        self.ask(self.servers)

    def converge(self) -> float:
        """Promotes through each server hold on all; seconds that it took until they did. What went wrong is told."""
        began = time.monotonic()
        for server in self.servers:
            while True:
                try:
                    promote(self, server)
                    break
                except httpx.HTTPError as error:
                    if time.monotonic() - began > CONVERGED_SECONDS:
                        raise AssertionError(f"{server.name} takes no change: {error}") from error
                    time.sleep(0.2)
            self.clients.more(4 * len(self.servers))
        return round(time.monotonic() - began, 1)


class Replica(Reached):
    """One of Ray's, by the number of its folder: it also answers on a port of its own."""

    def __init__(self, head: Counted, number: int) -> None:
        port = head.port + 1 + number
        socket.create_connection(("127.0.0.1", port), 1).close()  # OSError where there is none
        super().__init__(f"replica-{number}", port, 0)
        self.id = own_id(self)
        self.pid = next(pid for pid in descendants(head.pid) if listens(pid, port))


@dataclass
class RayStage(Stage):
    """The servers are replicas on Ray. Clients ask its proxy."""

    head: Counted = field(init=False)

    @property
    def door(self) -> AbstractContextManager[Any]:
        return nullcontext(self.head)

    def asked(self, server: Reached) -> str:
        return self.head.name

    def ask(self, servers: Sequence[Reached]) -> None:
        self.clients.servers = [self.head] if servers else []

    def begin(self, count: int) -> None:
        self._configure(count)
        ways = self._ways()
        # There is room for all of them, and what else runs on this machine takes none its memory.
        environ = {"RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1"}
        environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": MOST_REPLICAS})
        self.head = self._start("ray", *ways, fake="tests.support.ray_replica", **environ)
        self.stack.callback(self.head.stop)
        self.head.wait_until_ready()
        self._meet(count, ways)

    def join(self) -> None:
        self._resize(len(self.places) + 1)

    def leave(self) -> None:
        self._resize(len(self.places) - 1)

    def again(self, place: Place) -> None:
        """Ray starts another one in its place."""
        self._meet(len(self.places), self.ways)

    @property
    def ways(self) -> tuple[Proxy, Proxy]:
        return self.places[0].database, self.places[0].store

    def _resize(self, count: int) -> None:
        """By SIGHUP; those that there are stay, or as many of them as there are to be."""
        before = {replica.id for replica in self.servers if isinstance(replica, Replica)}
        self._configure(count)
        self.head.process.send_signal(signal.SIGHUP)
        self._meet(count, self.ways)
        now = {replica.id for replica in self.servers if isinstance(replica, Replica)}
        assert len(now & before) == min(len(now), len(before)), (before, now)

    def _configure(self, count: int) -> None:
        file = self.work / "loradock.yaml"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"replicas": count}))

    def _meet(self, count: int, ways: tuple[Proxy, Proxy]) -> None:
        """Once so many replicas answer, which all list as many."""
        found: list[tuple[Replica, set[str]]] = []

        def have_met() -> bool:
            found[:] = []
            for number in range(MOST_REPLICAS):
                with suppress(OSError, httpx.HTTPError, StopIteration):  # one that leaves answers no more
                    replica = Replica(self.head, number)
                    found.append((replica, {row["id"] for row in replicas(replica) if row["phase"] == "ready"}))
            ids = {replica.id for replica, _ in found}
            return len(ids) == count and all(listed == ids for _, listed in found)

        until(have_met, REPLACED_SECONDS)
        self.places[:] = [Place(replica, *ways) for replica, _ in found]


POLICY = {"train_on_traffic": True, "verdicts": {"ratings_per_key": 1000}}
# Tries come when they are asked for, and wait for a yes.
LOOP = {
    "on": ["schedule"], "every": "300d", "min_examples": 40, "held_out": 0.5, "budget": 4, "wait": "1s", "canary": 0,
    "promote": "ask", "gate": {"tolerance": 0.3, "alpha": 0.4, "golden": 0.3},
}  # fmt: skip
S3 = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "mine", "AWS_DEFAULT_REGION": "us-east-1"}


def promote(stage: Stage, server: Reached) -> float:
    """The other one of the two versions is live; seconds until that was acknowledged."""
    began = time.monotonic()
    version = 2 if stage.clients.live == 1 else 1
    if stage.clients.live is None:  # nobody knows which: make sure that it is a change
        server.promote(NAME, 2)
    stage.clients.change(version, partial(server.promote, NAME, version))
    return time.monotonic() - began


# Scenes. Each says what was seen, and what of it must not be.

Scene = Callable[[Stage], dict[str, Any]]


def swaps(stage: Stage) -> dict[str, Any]:
    """Forty promotes, through each server in turn."""
    seconds = []
    for turn in range(40):
        seconds.append(promote(stage, stage.servers[turn % len(stage.servers)]))
        stage.clients.more(2)
    return {"changes": len(seconds), "slowest change s": round(max(seconds), 2)}


def proof(stage: Stage) -> dict[str, Any]:
    """`loradock bench --swap` behind a balancer, with streams (the real engine alone says who answered)."""
    stage.ask([])
    with stage.door as door:
        plan = Plan(NAME, (1, 2), streams=8, swaps=40, every=1.0, max_tokens=24)
        seen = asyncio.run(prove(Address(f"http://127.0.0.1:{door.port}", "run"), plan))
    assert seen.holds, seen
    stage.ask_all()
    wanted = ("swaps", "answers", "failed", "mixed", "wrong", "stale", "across_a_swap", "promote_ms_max")
    return {key: seen.as_dict()[key] for key in wanted}


def feedback(stage: Stage) -> dict[str, Any]:
    """What one server answered is rated through the next one, once, and through no other after that."""
    seconds = []
    for turn in range(20):
        one, other = stage.servers[turn % len(stage.servers)], stage.servers[(turn + 1) % len(stage.servers)]
        id = said(one, f"rated-{turn}")
        began = time.monotonic()
        statuses = [rated(server, id, 1.0).status_code for server in (other, other, one)]
        assert statuses == [200, 404, 404], statuses
        seconds.append(time.monotonic() - began)
    return {"rated": len(seconds), "slowest s, with two that are refused": round(max(seconds), 2)}


def conversation_deleted(stage: Stage) -> dict[str, Any]:
    """A conversation that each server knows a part of is deleted through one that did not give its first answer."""
    ids = [said(server, "deleted") for server in stage.servers]
    path = f"/v1/adapters/{NAME}/data/conversations"
    gone = stage.servers[-1].http.delete(f"{path}/{ids[0]}")
    assert gone.status_code == 200, gone.text
    until(lambda: not any(kept(server, ids) for server in stage.servers), DELETED_SECONDS)
    refused = stage.servers[-1].http.delete(f"{path}/{ids[0]}").status_code
    assert refused == 404, refused
    return {"requests": gone.json()["requests"]}


def canary_judged(stage: Stage) -> dict[str, Any]:
    """A canary whose answers are rated badly, each through a server that did not give it, ends on all servers."""
    name, count = "judged", len(stage.servers)
    ids = []
    for number, promoted in enumerate(("true", "false")):
        pushed = stage.servers[0].http.post(
            "/v1/adapters", timeout=120, **upload(stage.fresh(f"judged-{number}"), name, promote=promoted)
        )
        ids.append(pushed.raise_for_status().json()["id"])
    stage.servers[0].http.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0.5}).raise_for_status()

    def rate(number: int) -> None:
        one, other = stage.servers[number % count], stage.servers[(number + 1) % count]
        body = {"model": name, "messages": MESSAGES, "max_tokens": 4, "user": f"u{number}"}
        answer = one.http.post("/v1/chat/completions", json=body).raise_for_status()
        rating = 0.1 if answer.json()["model"] == ids[1] else 0.9
        rated(other, answer.headers["x-request-id"], rating).raise_for_status()

    def has_ended(server: Reached) -> bool:
        return server.http.get(f"/v1/adapters/{name}").raise_for_status().json()["canary"] is None

    with ThreadPoolExecutor(8) as pool:
        for first in range(0, MOST_RATINGS, 40):
            list(pool.map(rate, range(first, first + 40)))
            time.sleep(1.0)  # answers are compared in groups
            if has_ended(stage.servers[0]):
                break
    until(lambda: all(has_ended(server) for server in stage.servers), 10.0)
    return {"ratings": first + 40}


def loop_step(stage: Stage) -> dict[str, Any]:
    """A loop is run through one server and answered through another, with no and with yes, whoever takes its steps."""
    stage.servers[0].http.post("/v1/adapters", timeout=120, **upload(stage.fresh(LOOPED), LOOPED)).raise_for_status()
    stage.ask([])  # a job waits while clients ask much
    tries = {}
    for turn, (word, outcome) in enumerate((("reject", "rejected"), ("approve", "promoted"))):
        began = time.monotonic()
        one, other = (stage.servers[(turn + place) % len(stage.servers)] for place in (0, 1))
        one.http.post(f"/v1/adapters/{LOOPED}/loop/run").raise_for_status()
        until_loops(stage.servers, lambda loop: loop["phase"] == "asking")
        other.http.post(f"/v1/adapters/{LOOPED}/loop/{word}").raise_for_status()
        until_loops(stage.servers, lambda loop, outcome=outcome: outcome in [each["outcome"] for each in loop["tries"]])
        tries[f"{outcome} after s"] = round(time.monotonic() - began, 1)
    stage.ask_all()
    loop = stage.servers[0].http.get(f"/v1/adapters/{LOOPED}/loop").raise_for_status().json()
    (promoted,) = [each["candidate"] for each in loop["tries"] if each["outcome"] == "promoted"]
    row = stage.servers[0].http.get(f"/v1/adapters/{LOOPED}").raise_for_status().json()
    candidate = next(version["id"] for version in row["versions"] if version["version"] == promoted)
    models = {said_by(server, LOOPED) for server in stage.servers}
    assert models == {candidate}, (models, candidate)
    return tries


def server_killed(stage: Stage) -> dict[str, Any]:
    """SIGKILL; the balancer sends nobody there any more, after a second."""
    place, *others = stage.places[::-1]
    id = own_id(place.server)
    place.server.kill()
    time.sleep(1.0)
    stage.ask([other.server for other in others])
    seconds = promote(stage, others[0].server)
    gone = until(lambda: not lists(others[0].server, id), GONE_SECONDS)
    may_fail = stage.asked(place.server)
    stage.again(place)
    stage.ask_all()
    return {"change meanwhile s": round(seconds, 2), "listed for s": gone, "may fail": may_fail}


def server_frozen(stage: Stage) -> dict[str, Any]:
    """SIGSTOP while changes go through it; afterwards its first answers are by what is live."""
    place, *others = stage.places[::-1]
    id = own_id(place.server)
    stage.ask([other.server for other in others])
    with place.server.frozen():
        seconds = promote(stage, others[0].server)
        gone = until(lambda: not lists(others[0].server, id), GONE_SECONDS)
        promote(stage, others[0].server)
    stage.ask_all()
    return {"change meanwhile s": round(seconds, 2), "listed for s": gone}


def server_slow(stage: Stage) -> dict[str, Any]:
    """It runs for a fifth of the time."""
    end = time.monotonic() + FAULT_SECONDS
    seconds = []
    while time.monotonic() < end:
        with stage.servers[-1].frozen():
            time.sleep(0.4)
            if len(seconds) < 5:
                seconds.append(promote(stage, stage.servers[0]))
        time.sleep(0.1)
    return {"slowest change elsewhere s": round(max(seconds), 2)}


def server_cut(stage: Stage) -> dict[str, Any]:
    """One server cannot reach the database, and the others can: it answers from what it read last, and says so."""
    place, *others = stage.places[::-1]
    with fault([place.database], "refusing"):
        until(lambda: "registry" in degraded(place.server), GONE_SECONDS)
        stage.ask([other.server for other in others])
        promote(stage, others[0].server)
        refused = place.server.http.post(f"/v1/adapters/{NAME}/promote", json={"version": 1}).status_code
        time.sleep(FAULT_SECONDS / 3)
        body = {"model": NAME, "messages": MESSAGES, "max_tokens": 4}
        answer = place.server.http.post("/v1/chat/completions", json=body)
        alone, age = answer.status_code, answer.headers.get("x-loradock-registry-age", "")
    # With homes another server may have answered, which reads the registry.
    says_so = age.isdecimal() or "--fleet-address" in stage.flags
    assert (refused, alone) == (503, 200) and says_so, (refused, alone, age)
    seconds = until(lambda: "registry" not in degraded(place.server), CONVERGED_SECONDS)
    stage.ask_all()
    return {"a change there": refused, "an answer there": alone, "well again after s": seconds}


def of_the_database(mode: Mode, stage: Stage) -> dict[str, Any]:
    """No server reaches the database: answers go on, and a rollback holds where it was asked for."""
    ways = [place.database for place in stage.places]
    with fault(ways, mode):
        until(lambda: all("registry" in degraded(server) for server in stage.servers), GONE_SECONDS)
        report = rolled_back_meanwhile(stage)
        stage.clients.more(20)
        time.sleep(FAULT_SECONDS)
    return report | {"well again after s": settled(stage)}


def database_slow(stage: Stage) -> dict[str, Any]:
    """Every answer of the database comes five seconds late."""
    with fault([place.database for place in stage.places], "slow"):
        time.sleep(FAULT_SECONDS)
        stage.clients.more(20)
    return {"well again after s": settled(stage)}


def database_killed(stage: Stage) -> dict[str, Any]:
    """It loses all connections and repairs itself when it starts again."""
    stage.sql.stop()
    try:
        stage.clients.more(20)
        time.sleep(FAULT_SECONDS / 3)
    finally:
        stage.sql.start()
    return {"well again after s": settled(stage)}


def of_the_store(mode: Mode, stage: Stage) -> dict[str, Any]:
    """No server reaches the bucket: what is loaded answers and changes; a push is refused, or waits."""
    folder = stage.fresh(mode)

    def push(server: Reached) -> int:
        return server.http.post("/v1/adapters", timeout=400, **upload(folder, f"other-{mode}")).status_code

    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        with fault([place.store for place in stage.places], mode):
            pushing = pool.submit(push, stage.servers[0])
            promote(stage, stage.servers[-1])
            stage.clients.more(20)
            time.sleep(FAULT_SECONDS)
            if mode == "refusing":
                pushing.result()
        pushed, seconds = pushing.result(), time.monotonic() - began
    again = push(stage.servers[-1])
    assert (pushed == 503 or mode != "refusing") and pushed in (201, 503), pushed
    assert again == 201 if pushed == 503 else again == 200, (pushed, again)
    return {"a push meanwhile": pushed, "after s": round(seconds, 1), "and then": again}


def scaled(stage: Stage) -> dict[str, Any]:
    """One server becomes three and one again; its usage is what was answered, no more and no less."""
    while len(stage.places) > 1:
        stage.leave()
    stage.ask([])
    time.sleep(LEDGER_SECONDS)  # what was answered before is counted
    before, began = stage.clients.counts["answered"], used(stage)
    stage.ask_all()
    for _ in range(2):
        stage.join()
        stage.ask_all()
        stage.clients.more(30)
        promote(stage, stage.servers[-1])
    while len(stage.places) > 1:
        stage.leave()
        stage.clients.more(30)
    stage.ask([])
    time.sleep(2.0)  # what was asked is answered
    answered = stage.clients.counts["answered"] - before
    counted = until_same(lambda: used(stage) - began, answered, 40.0)
    stage.ask_all()
    while len(stage.places) < 2:
        stage.join()
    stage.ask_all()
    assert counted == answered, (counted, answered)
    return {"answered": answered, "counted": counted}


SCENES: dict[str, Scene] = {
    "swaps": swaps,
    "proof": proof,
    "feedback": feedback,
    "conversation deleted": conversation_deleted,
    "canary judged": canary_judged,
    "loop step": loop_step,
    "server killed": server_killed,
    "server frozen": server_frozen,
    "server slow": server_slow,
    "server cut off the database": server_cut,
    "database cut": partial(of_the_database, "refusing"),
    "database frozen": partial(of_the_database, "frozen"),
    "database slow": database_slow,
    "database killed": database_killed,
    "store cut": partial(of_the_store, "refusing"),
    "store frozen": partial(of_the_store, "frozen"),
    "store slow": partial(of_the_store, "slow"),
    "scaled": scaled,
}
MESSAGES = [{"role": "user", "content": "Hello!"}]


# What scenes do and ask


def said(server: Reached, user: str) -> str:
    """The id of an answer to this user."""
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 4, "user": user}
    return str(server.http.post("/v1/chat/completions", json=body).raise_for_status().headers["x-request-id"])


def rated(server: Reached, id: str, rating: float) -> httpx.Response:
    """The answer to a rating, which is sent again as long as it says so: on a busy machine not all look in time."""
    end = time.monotonic() + CONVERGED_SECONDS
    while True:
        answer = server.http.post("/v1/feedback", json={"request_id": id, "rating": rating})
        if answer.status_code != 503 or time.monotonic() > end:
            return answer
        print(json.dumps({server.name: answer.text}), flush=True)
        time.sleep(1.0)


def until_loops(servers: list[Reached], condition: Callable[[dict[str, Any]], bool]) -> None:
    """Every server says so of the loop."""
    for server in servers:
        end = time.monotonic() + LOOP_SECONDS
        while not condition(loop := server.http.get(f"/v1/adapters/{LOOPED}/loop").raise_for_status().json()):
            assert time.monotonic() < end, (server.name, loop["phase"], loop["note"], loop["asked"])
            time.sleep(0.2)


def said_by(server: Reached, name: str) -> str:
    """The version that answers for this name."""
    body = {"model": name, "messages": MESSAGES, "max_tokens": 4}
    return str(server.http.post("/v1/chat/completions", json=body).raise_for_status().json()["model"])


def kept(server: Reached, ids: list[str]) -> bool:
    """Whether the server lists a captured conversation that has one of these answers."""
    path = f"/v1/adapters/{NAME}/data/conversations"
    rows = server.http.get(path, params={"limit": 1000}).raise_for_status().json()["data"]
    return any(id in row["request_ids"] for row in rows for id in ids)


@contextmanager
def fault(ways: list[Proxy], mode: Mode) -> Iterator[None]:
    for way in ways:
        way.become(mode)
    try:
        yield
    finally:
        for way in ways:
            way.become("pass")


def rolled_back_meanwhile(stage: Stage) -> dict[str, Any]:
    """A rollback while the database answers nobody: it holds on the server that was asked, within seconds."""
    server, began = stage.servers[0], time.monotonic()
    target = 2 if stage.clients.live == 1 else 1
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 4}
    stage.clients.forget()  # on the other servers the old one goes on
    told = server.http.post(f"/v1/adapters/{NAME}/rollback")
    seconds = time.monotonic() - began
    answer = server.http.post("/v1/chat/completions", json=body)
    assert told.status_code < 300, (told.status_code, told.text)
    assert answer.json()["model"] == stage.clients.ids[target], answer.text
    return {"rollback": told.status_code, "rollback s": round(seconds, 2), "holds": seconds < ROLLBACK_SECONDS}


def settled(stage: Stage) -> float | None:
    return until(lambda: not any("registry" in degraded(server) for server in stage.servers), CONVERGED_SECONDS)


def degraded(server: Reached) -> dict[str, str]:
    try:
        return dict(server.http.get("/ready", timeout=10).json().get("degraded") or {})
    except (httpx.HTTPError, ValueError):
        return {}


def replicas(server: Reached) -> list[dict[str, Any]]:
    return list(server.http.get("/v1/replicas").raise_for_status().json()["data"])


def used(stage: Stage) -> int:
    """Requests of clients for the adapter, by the registry's ledger."""
    month = datetime.now(UTC).strftime("%Y-%m")
    rows = stage.servers[0].http.get("/v1/usage", params={"month": month}).raise_for_status().json()["data"]
    return sum(row["requests"] for row in rows if row["adapter"] == NAME and row["tenant"] == "default")


def own_id(server: Reached) -> str:
    return str(next(row["id"] for row in replicas(server) if row["me"]))


def lists(server: Reached, id: str) -> bool:
    return id in [row["id"] for row in replicas(server)]


def until(condition: Callable[[], object], seconds: float) -> float:
    """Seconds until it was so; AssertionError, if it never was."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"it was not so within {seconds} s"
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def until_same(read: Callable[[], int], target: int, seconds: float) -> int:
    """What it is at last."""
    end = time.monotonic() + seconds
    while (value := read()) != target and time.monotonic() < end:
        time.sleep(0.5)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--engine", action="store_true", help="the real engine over the embedded model")
    parser.add_argument("--homes", action="store_true", help="the servers send requests on to homes")
    parser.add_argument("--ray", action="store_true", help="the servers are replicas on Ray")
    parser.add_argument("--only", help="scenes by name, with commas between them")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [*SCENES]
    # The engine alone says who answered, and it has no trainer that trains nothing.
    names = [name for name in names if name != ("loop step" if options.engine else "proof")]
    if options.ray:  # nothing cuts off one replica alone
        names = [name for name in names if name != "server cut off the database"]
    with ExitStack() as stack:
        stage = prepared(stack, options)
        reports = {}
        with stage.clients.running():
            for name in names:
                reports[name] = played(stage, name)
                print(json.dumps({name: reports[name]}), flush=True)
        bad = {name: report["wrong"] for name, report in reports.items() if report["wrong"]}
        counts = {
            "answered": stage.clients.counts["answered"],
            "held against what was live": stage.clients.counts["held"],
        }
        print(json.dumps({"scenes": len(reports), **counts, "with failures": bad}, indent=1))
    if bad:
        raise SystemExit(1)


def prepared(stack: ExitStack, options: argparse.Namespace) -> Stage:
    """The servers, an adapter of two versions, and clients that do not ask yet."""
    work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (work / "model").mkdir()
    tiny.model(work / "model")
    # Without a table of embeddings nothing is watched, and no canary compared.
    save_file({"model.embed_tokens.weight": torch.randn(32, tiny.HIDDEN)}, work / "model" / "model.safetensors")
    programs = postgres.programs()
    assert programs, "PostgreSQL is not installed"
    sql = stack.enter_context(postgres.started(programs))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    stack.callback(s3.stop)
    host, port = s3.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", aws_access_key_id="me",
                          aws_secret_access_key="mine", region_name="us-east-1")  # fmt: skip
    client.create_bucket(Bucket="models")
    (work / "loradock.yaml").write_text(
        json.dumps({"policies": {"*": POLICY, LOOPED: {"loop": LOOP}} if not options.engine else {"*": POLICY}})
    )
    flags = ("--config", str(work / "loradock.yaml"))
    flags = (*flags, *SMALL, "--restart-wait", "60") if options.engine else flags
    if options.ray:
        flags = (*flags, "--ray", "--fleet", "homes" if options.homes else "off")
    elif options.homes:
        flags = (*flags, "--fleet-address", "{url}")
    of = RayStage if options.ray else Stage
    stage = of(work, sql, port, BASE if options.engine else "", flags, stack)
    stage.begin(options.servers)
    for seed, folder in enumerate(adapters(work, options.engine)):
        pushed = stage.servers[seed % options.servers].http.post("/v1/adapters", timeout=120, **upload(folder, NAME))
        pushed.raise_for_status()
    rows = stage.servers[0].http.get(f"/v1/adapters/{NAME}").json()["versions"]
    stage.traffic = Traffic(NAME, {row["version"]: row["id"] for row in rows}, 2, 4, HEADERS)
    stage.ask_all()
    return stage


def adapters(work: Path, engine: bool) -> list[Path]:
    """Two folders; of the real model, two that answer with a word each."""
    if engine:
        return [*trained("alpha", "bravo").values()]
    return [tiny.adapter(work / f"adapter-{seed}", seed) for seed in (0, 1)]


def played(stage: Stage, name: str) -> dict[str, Any]:
    """What a scene saw, and what went wrong in it."""
    began, slowest = time.monotonic(), stage.clients.slowest
    stage.clients.slowest = 0.0
    try:
        report = SCENES[name](stage)
        report["converged after s"] = stage.converge()
    except (AssertionError, httpx.HTTPError) as error:
        report = {"error": f"{type(error).__name__}: {error}"}
    may_fail = report.pop("may fail", None)
    wrong = [each for each in stage.clients.since(began) if each.server != may_fail or each.kind != "failed"]
    counts = {kind: sum(each.kind == kind for each in wrong) for kind in ("failed", "stale")}
    broken = sum(each.server == may_fail for each in stage.clients.since(began))
    said = [f"{each.server}: {each.kind}: {each.text[:200]}" for each in wrong[:3]]
    report |= {**counts, "broke off": broken, "slowest answer s": round(stage.clients.slowest, 1)}
    stage.clients.slowest = max(slowest, stage.clients.slowest)
    return report | {"wrong": said + ([report["error"]] if "error" in report else [])}


if __name__ == "__main__":
    main()
