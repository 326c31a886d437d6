"""Traffic of every kind against a server over the known engine, and a record of all that was sent.

What a request was is read from its answer, as its client sees it; so nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serve.rollout.loop_policy import LoopPolicy
from serve.rollout.policy import FLAG, REFUSE, Guard, Policy
from tests.support.app import CHAT, upload
from tests.support.known_backend import ANSWER_SECONDS, PROMPT_TOKENS, TEXT, VERDICTS, KnownBackend
from tests.support.served import Served
from tests.support.server import done
from tests.support.waiting import eventually

OTHER = ("other", "")
ALL_AT_ONCE = 3
# Three of the four cases are passed; every answer of the shadow is graded.
GOLDEN = {
    "cases": [
        *({"prompt": f"The capital of France, {number}", "equals": TEXT, "max_tokens": 4} for number in range(3)),
        {"prompt": "The capital of Spain", "equals": "Madrid", "max_tokens": 4},
    ],
    "shadow": {"judge": {"model": "base", "template": "Grade {answer}"}, "share": 1.0},
}
GOLDEN_SCORE, GOLDEN_RESULTS = 0.75, {"pass": 3, "fail": 1}
FORBIDDEN, OBSCURE = VERDICTS
# The base looks at what `kept` is asked and answers, and at what `strict` is asked. `kept` has a loop, too, which never
# has enough examples.
GUARDS = (
    Policy(
        "kept",
        guard=Guard(prompt="base", answer="base", action=FLAG),
        loop=LoopPolicy(on=("schedule",), min_examples=1000),
        train_on_traffic=True,
    ),
    Policy("strict", guard=Guard(prompt="base", action=REFUSE)),
)
# Lines of a batch; the last one asks a model that is not there.
LINES = ("base", "base", "base", "nobody")
# Lines that wait while the queue stands.
HELD = ("base", "base")
MESSAGES = [{"role": "user", "content": "The capital of France"}]


@dataclass(frozen=True, slots=True)
class Sent:
    """One request, as its client saw it. `reached`: the engine worked on it; `background`: behind every client."""

    adapter: str
    version: str
    tenant: str
    status: int
    seconds: float
    finish: str = ""
    failure: str = ""
    reached: bool = False
    generated: int = 0
    background: bool = False

    @property
    def labels(self) -> tuple[str, str]:
        return (self.adapter, self.version)

    @property
    def prompt(self) -> int:
        return PROMPT_TOKENS if self.reached else 0


class MixedTraffic:
    """Pushes the adapters at once; `play` sends everything once, and may be called again."""

    def __init__(self, served: Served, backend: KnownBackend, folder: Callable[[int], Path]) -> None:
        self._served, self._backend = served, backend
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(100)
        self._recording = threading.Lock()
        self.sent: list[Sent] = []
        # What the server asked in somebody's name: no client waited for this very answer.
        self.inside: list[Sent] = []
        # How many of both were sent before the first pause.
        self.early = self.early_inside = 0
        # By adapter, side and result; and how many of them came before the first pause.
        self.guarded: Counter[tuple[str, str, str]] = Counter()
        self.early_guarded: Counter[tuple[str, str, str]] = Counter()
        self.lines: Counter[str] = Counter()
        self.batches = 0
        self.swaps: Counter[tuple[str, str]] = Counter()
        self.rollbacks: Counter[str] = Counter()
        self.ratings: Counter[tuple[str, str, str]] = Counter()
        self.restarts = self.tries = 0
        # The labels of every version, by the id under which the engine knows it.
        self.versions: dict[str, tuple[str, str]] = {"base": ("base", "base")}
        self.admin = served.http
        self.acme = served.issue("acme", "inference", "adapters:write")
        self.zeta = served.issue("zeta", "inference", "adapters:write")
        self.limited = served.issue("default", "inference", requests_per_minute=2)
        self._seeds = folder
        for seed, (client, name, version, promote) in enumerate(
            [
                (self.admin, "tone", 1, True), (self.admin, "tone", 2, False), (self.admin, "calm", 1, True),
                (self.admin, "calm", 2, False), (self.admin, "broken", 1, True), (self.acme, "flood", 1, True),
                (self.zeta, "slow", 1, True), (self.admin, "echo", 1, True), (self.admin, "echo", 2, False),
                (self.admin, "kept", 1, True), (self.admin, "strict", 1, True),
            ]
        ):  # fmt: skip
            self._push(client, name, version, folder(seed), promote)
        done(self.admin.post("/v1/adapters/calm/canary", json={"version": 2, "weight": 0.5}))
        done(self.admin.post("/v1/adapters/echo/shadow", json={"version": 2, "weight": 1.0}))
        done(self.admin.put("/v1/adapters/echo/golden", json=GOLDEN))
        assert eventually(lambda: self.golden["missing"] == 0)

    def close(self) -> None:
        self._pool.shutdown()
        for client in (self.acme, self.zeta, self.limited):
            client.close()

    @property
    def golden(self) -> dict[str, Any]:
        """How the version with a golden set did."""
        versions: list[dict[str, Any]] = done(self.admin.get("/v1/adapters/echo/golden/results"))["versions"]
        return versions[0] if versions else {"missing": len(GOLDEN["cases"])}

    def restart_engine(self) -> None:
        """The engine dies, and another takes its place."""
        self.restarts += 1
        self._served.app.state.parts.fleet.first.backend.dead = True

        def is_back() -> bool:
            (engine,) = done(self.admin.get("/v1/engines"))["data"]
            return bool(engine["restarts"] == self.restarts and engine["phase"] == "ready")

        assert eventually(is_back)

    def play(self, pause: Callable[[], object]) -> None:
        """Answers, mistakes, failures of each kind, ratings, a batch, and two changes of a live version.

        `pause` lets the server be scraped after the first few answers: from then on, drift has its series too.
        """
        self._answers(3)
        if not self.early:
            self.early, self.early_inside = len(self.sent), len(self.inside)
            self.early_guarded = self.guarded.copy()
        pause()
        self._answers(10)
        self._refusals()
        self._failures()
        self._rate()
        self._end(self._batch(LINES), LINES)
        self._swap()
        if not self.tries:  # a month has few of them
            self._try()

    def hold_up(self, look: Callable[[dict[tuple[str, str], int]], None]) -> None:
        """More comes than the engine has seats: `look` is called while the queue stands, and a batch's lines with it.

        It gets how many requests wait by adapter and tenant. All seats but one are acme's.
        """
        self._backend.standstill.set()
        flood = [self._later(self.acme, "flood", ("acme/flood", "v1"), "acme") for _ in range(40)]
        polite = [self._later(self.zeta, "slow", ("zeta/slow", "v1"), "zeta") for _ in range(2)]
        assert eventually(lambda: self._standing(flood) and self._standing(polite))
        for _ in range(2):  # they have no seat yet when their time is over
            self._ask(self.zeta, "slow", ("zeta/slow", "v1"), "zeta", timeout=0.3, failure="queue_deadline")
        batch = self._batch(HELD)
        assert eventually(lambda: f"loradock_batch_lines_left {len(HELD)}.0" in self.admin.get("/metrics").text)
        seats = self._backend.seats
        waiting = {
            ("acme/flood", "acme"): sum(not answer.done() for answer in flood) - (seats - 1),
            ("zeta/slow", "zeta"): sum(not answer.done() for answer in polite) - 1,
        }
        look(waiting)
        self._backend.standstill.clear()
        for answer in flood + polite:
            answer.result()
        self._end(batch, HELD)

    def _batch(self, models: Sequence[str]) -> str:
        """The id of a batch that asks each of these models one line."""
        rows = [
            {"custom_id": str(number), "method": "POST", "url": CHAT, "body": {"model": model, "messages": MESSAGES}}
            for number, model in enumerate(models)
        ]
        data = "\n".join(map(json.dumps, rows)).encode()
        file = done(self.admin.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"}))
        body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        return str(done(self.admin.post("/v1/batches", json=body))["id"])

    def _end(self, batch: str, models: Sequence[str]) -> None:
        """Wait for its end: lines of a model that is there are answered behind every client."""
        path = f"/v1/batches/{batch}"
        assert eventually(lambda: done(self.admin.get(path))["status"] == "completed")
        self.batches += 1
        for model in models:
            self.lines["completed" if model == "base" else "failed"] += 1
            if model == "base":
                self._ask_inside(background=True)

    def _ask_inside(self, **more: Any) -> None:
        """The server has asked the base itself, in the name of the tenant `default`."""
        self.inside.append(Sent("base", "base", "default", 200, 0.0, "stop", reached=True, generated=5, **more))

    def _guard(self, adapter: str, side: str, result: str) -> None:
        """A guard was asked."""
        with self._recording:
            self.guarded[adapter, side, result] += 1
            self._ask_inside()

    def _standing(self, answers: Iterable[Future[None]]) -> bool:
        """All of them have come to the server: they wait, are answered, or were refused."""
        queue = self._served.app.state.parts.fleet.first.engine.queue
        under_way = sum(not answer.done() for answer in answers)
        return under_way > 0 and queue.busy == self._backend.seats and queue.waiting > 0 and self._is_steady()

    def _is_steady(self) -> bool:
        base = self._served.app.state.parts.fleet.first
        before = base.leases
        time.sleep(0.5)
        return bool(base.leases == before)

    def _answers(self, count: int) -> None:
        self._many(2 * count, self.admin, "tone@v1", ("tone", "v1"))
        self._many(count, self.admin, "tone@v1", ("tone", "v1"), finish="length", tokens=9)
        self._many(count, self.admin, "tone@v2", ("tone", "v2"), tokens=7)
        self._many(4 * count, self.admin, "base", ("base", "base"))
        self._many(6 * count, self.admin, "calm", None)
        for version in (1, 2):
            self._many(count, self.admin, f"calm@v{version}", ("calm", f"v{version}"), finish="length", tokens=8)
        self._many(count, self.admin, "echo", None)
        self._many(count, self.acme, "flood", ("acme/flood", "v1"), "acme")
        self._many(count, self.zeta, "slow", ("zeta/slow", "v1"), "zeta")
        for _ in range(count):
            self._ask_kept()
            self._ask(self.admin, "strict", ("strict", "v1"))
            self._guard("strict", "prompt", "passed")

    def _ask_kept(self, says: str = "", result: str = "passed") -> None:
        """The guard looks at the prompt, and at the answer."""
        self._ask(self.admin, "kept", ("kept", "v1"), says=says)
        self._guard("kept", "prompt", result)
        self._guard("kept", "answer", "passed")

    def _refusals(self) -> None:
        """What a guard flags, refuses, and has no verdict on."""
        self._ask_kept(FORBIDDEN, "flagged")
        self._ask_kept(OBSCURE, "error")
        self._ask(self.admin, "strict", OTHER, says=FORBIDDEN)
        self._guard("strict", "prompt", "refused")

    def _failures(self) -> None:
        for _ in range(4):
            self._ask(self.admin, "nobody", OTHER)
        for _ in range(5):  # two of them at most are within its limit
            self._ask(self.limited, "calm@v1", ("calm", "v1"))
        self._many(5, self.admin, "broken", ("broken", "v1"), status=500)
        self._many(2, self.admin, "calm@v2", ("calm", "v2"), status=500)
        for _ in range(3):
            self._ask(self.admin, "tone@v1", ("tone", "v1"), timeout=0.5, seconds=5.0, finish="", failure="deadline")

    def _rate(self) -> None:
        """Three good answers and a bad one of each side."""
        for version, rating in itertools.product(("v1", "v2"), (1.0, 1.0, 1.0, 0.0)):
            answer = self._ask(self.admin, f"calm@{version}", ("calm", version))
            body = {"request_id": answer.headers["x-request-id"], "rating": rating}
            done(self.admin.post("/v1/feedback", json=body))
            self.ratings["calm", version, "good" if rating else "bad"] += 1

    def _swap(self) -> None:
        """A version is promoted by hand, and an alert rolls it back; of a new adapter each time: once an hour each."""
        number = next(self._numbers)
        name = "tone" if not self.rollbacks else f"tone-{number}"
        if name != "tone":
            for version in (1, 2):
                self._push(self.admin, name, version, self._seeds(100 + 2 * number + version), version == 1)
        done(self.admin.post(f"/v1/adapters/{name}/promote", json={"version": 2}))
        self.swaps[name, "promoted"] += 1
        labels = {"alertname": "LoradockNewVersionFails", "action": "rollback", "adapter": name, "version": "v2"}
        alert = {"status": "firing", "labels": labels, "startsAt": "2026-11-25T10:00:00Z", "fingerprint": f"{number:x}"}
        (row,) = done(self.admin.post("/v1/alerts", json={"alerts": [alert]}))["data"]
        assert row["outcome"] == "rolled_back", row
        self.rollbacks[name] += 1
        self.swaps[name, "rolled_back"] += 1

    def _try(self) -> None:
        """A person opens a try of a loop, and ends it."""
        done(self.admin.post("/v1/adapters/kept/loop/run"))
        assert eventually(lambda: self._phase() == "gathering")
        done(self.admin.post("/v1/adapters/kept/loop/reject"))
        assert eventually(lambda: self._phase() == "waiting")
        self.tries += 1

    def _phase(self) -> str:
        return str(done(self.admin.get("/v1/adapters/kept/loop"))["phase"])

    def _push(self, client: httpx.Client, name: str, version: int, folder: Path, promote: bool) -> None:
        pushed = done(client.post("/v1/adapters", **upload(folder, name, promote=str(promote).lower())))
        full = pushed["id"].partition("@")[0]
        self.versions[pushed["id"]] = (full, f"v{version}")
        self.swaps[full, "promoted"] += promote

    def _many(self, count: int, *asked: Any, **more: Any) -> None:
        """So many requests, a few at a time."""
        with ThreadPoolExecutor(ALL_AT_ONCE) as pool:
            for answer in [pool.submit(self._ask, *asked, **more) for _ in range(count)]:
                answer.result()

    def _later(self, *asked: Any) -> Future[Any]:
        return self._pool.submit(self._ask, *asked)

    def _ask(
        self,
        client: httpx.Client,
        model: str,
        labels: tuple[str, str] | None,
        tenant: str = "default",
        *,
        tokens: int = 5,
        finish: str = "stop",
        status: int = 200,
        seconds: float = ANSWER_SECONDS,
        timeout: float | None = None,
        failure: str = "",
        says: str = "",
    ) -> httpx.Response:
        """One request; `failure` is what becomes of it if its time is over, `says` stands in its message too."""
        known = {"tokens": tokens, "finish": finish, "status": status, "seconds": seconds}
        text = f"What is the capital of France, and how many people live there in the summer? ({next(self._numbers)})"
        text += f" And {says}?" if says else ""
        message = {"role": "user", "content": text + (" Write to ada@example.com." if tenant == "zeta" else "")}
        headers = {} if timeout is None else {"x-request-timeout": str(timeout)}
        began = time.perf_counter()
        body = {"model": model, "messages": [message], "known": known}
        answer = client.post(CHAT, json=body, headers=headers)
        took = time.perf_counter() - began
        if answer.status_code == 200:
            labels = self.versions[answer.json()["model"]]
        error = {} if answer.status_code == 200 else answer.json()["error"]
        if answer.status_code == 429:
            failure = "overloaded" if error["code"] == "overloaded" else ""
            labels = labels if failure else OTHER
        elif answer.status_code != 504:
            failure = "error" if answer.status_code >= 500 else ""
        assert labels is not None, answer.text
        reached = answer.status_code == 200 or failure == "deadline"
        record = Sent(
            *labels, tenant, answer.status_code, took, finish if reached else "", failure, reached,
            tokens if reached else 0,
        )  # fmt: skip
        with self._recording:
            self.sent.append(record)
        return answer
