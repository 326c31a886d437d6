"""What happens in a server, as typed events on one bus: a part publishes, and knows nobody who listens.

    events = Events()
    events.subscribe("pager", pager.page, DriftAlarm, RollbackAttempted)     # a thread and a queue of its own
    events.at_once("metrics", metrics.count, Promoted, RolledBack)           # in the publisher's thread
    events.publish(Promoted("tone", 2, "anna"))                              # never waits, raises nothing

A subscriber gets the events of its kinds (their subclasses too) in the order in which they were published.

- One that raises is logged and counted; it gets the next event all the same, and the others get all of theirs.
- One that is slow holds up nobody: `QUEUE` events wait for it, and what comes while they do is dropped for this
  subscriber alone, logged and counted.
- `at_once` is for what only counts or wakes somebody: whoever publishes does it, so it may neither wait nor block.
- `stop` lets what waits be taken, for `STOP_SECONDS` at most. What was published before `start` waits for it.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.names import tenant_of

if TYPE_CHECKING:  # numpy is imported there, and begins threads: a process that has any is not forked
    from serve.sequential.sequential_test import Verdict

log = logging.getLogger(__name__)

QUEUE = 1000
STOP_SECONDS = 5.0
MAX_EVIDENCE = 2048
# Who acts by itself, in histories and the audit log: on a bad version, on a canary's verdict, on a drift alarm.
ROLLBACK = "wayback"
REFEREE = "referee"
WATCHER = "watcher"


class Event:
    """Something that has happened. Its fields are plain data."""

    __slots__ = ()


class Notice(Event):
    """An event that webhooks and the collector are told: its kind, and data as JSON."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        raise NotImplementedError

    def data(self) -> dict[str, Any]:
        raise NotImplementedError


class Recorded(Event):
    """An event that is a line of the audit log, beside what people and keys ask for."""

    __slots__ = ()

    def audit_line(self) -> dict[str, Any]:
        raise NotImplementedError


# Versions


@dataclass(frozen=True, slots=True)
class OfVersion(Event):
    """Something has become of a version of the adapter of this full name, by whom."""

    adapter: str
    version: int
    by: str


@dataclass(frozen=True, slots=True)
class VersionAdded(OfVersion):
    """The adapter has this version more."""


@dataclass(frozen=True, slots=True)
class PromotionHeld(OfVersion):
    """This version is to be live once its golden score is good enough."""


@dataclass(frozen=True, slots=True)
class Promoted(OfVersion):
    """This version is live now."""


@dataclass(frozen=True, slots=True)
class RolledBack(OfVersion):
    """This version is live again, which was live before."""


@dataclass(frozen=True, slots=True)
class Unloaded(OfVersion):
    """This version was live, and none of the adapter's is any more."""


@dataclass(frozen=True, slots=True)
class RollbackAttempted(Notice, Recorded):
    """The server was to take the traffic from a version. `done`: it has; `outcome` is one of a few words."""

    adapter: str
    version: int
    reason: str
    outcome: str
    text: str
    evidence: Mapping[str, Any]
    done: bool
    status: int

    kind = "rollback"

    def data(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "version": self.version,
            "tenant": tenant_of(self.adapter),
            "reason": self.reason,
            "outcome": self.outcome,
            "text": self.text,
            "evidence": dict(self.evidence),
        }

    def audit_line(self) -> dict[str, Any]:
        subject = f"{self.adapter}@v{self.version}"
        line = _line(ROLLBACK, self.adapter, self.outcome, subject, self.reason, self.evidence, self.status)
        return {**line, "message": self.text}


# Canaries


@dataclass(frozen=True, slots=True)
class CanaryVerdict(Event):
    """What a canary's analysis or golden set came to; announced once, and again (`repeated`) after a restart."""

    adapter: str
    live: int
    canary: int
    verdict: Verdict
    reason: str
    evidence: Mapping[str, Any]
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class CanaryJudged(Notice):
    """The policy has been followed on a verdict."""

    verdict: CanaryVerdict

    @property
    def kind(self) -> str:
        return f"canary.{self.verdict.verdict.value}"

    def data(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "adapter": verdict.adapter,
            "version": verdict.canary,
            "live": verdict.live,
            "tenant": tenant_of(verdict.adapter),
            "verdict": verdict.verdict.value,
            "text": verdict.reason,
            "evidence": dict(verdict.evidence),
        }


@dataclass(frozen=True, slots=True)
class VerdictActedOn(Recorded):
    """What the server did about a verdict, apart from a rollback; `status` as of a request."""

    verdict: CanaryVerdict
    what: str
    status: int

    def audit_line(self) -> dict[str, Any]:
        verdict = self.verdict
        subject = f"{verdict.adapter}@v{verdict.canary}"
        return _line(REFEREE, verdict.adapter, self.what, subject, verdict.reason, verdict.evidence, self.status)


# Quality


@dataclass(frozen=True, slots=True)
class DriftAlarm(Notice, Recorded):
    """Something moved, by so much that it matters. `moved` says what (`serve.drift.change_description`)."""

    adapter: str
    version: str
    signal: str
    effects: Mapping[str, float]
    log_evidence: float
    moved: Mapping[str, Any] = field(default_factory=dict)

    kind = "drift.alarm"

    @property
    def text(self) -> str:
        return str(self.moved.get("text", ""))

    @property
    def rounded(self) -> dict[str, float]:
        """The effects as people read them."""
        return {name: round(value, 3) for name, value in self.effects.items()}

    @property
    def evidence(self) -> str:
        """For histories and the audit log."""
        return json.dumps({"signal": self.signal, **self.rounded, "text": self.text}, ensure_ascii=False)

    def data(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "version": self.version,
            "tenant": tenant_of(self.adapter),
            "signal": self.signal,
            "text": self.text,
            "effects": self.rounded,
            "log_evidence": round(self.log_evidence, 3) if math.isfinite(self.log_evidence) else None,
            "moved": dict(self.moved),
        }

    def audit_line(self) -> dict[str, Any]:
        line = _line(WATCHER, self.adapter, "drift", f"{self.adapter}@{self.version}", self.signal, {}, 200)
        return {**line, "evidence": self.evidence}


@dataclass(frozen=True, slots=True)
class GoldenScored(Event):
    """A run of a version's golden set has ended; `complete`: every case has a score."""

    adapter: str
    version: int
    score: float | None
    cases: int
    complete: bool


@dataclass(frozen=True, slots=True)
class GoldenScoreFell(Notice):
    """The live version scores less than the version `before` did within a day, or than itself in the run before."""

    adapter: str
    version: int
    score: float
    before: int
    before_score: float
    cases: int
    set_digest: str

    kind = "golden.score_fell"

    @property
    def text(self) -> str:
        who = "it did" if self.before == self.version else f"version {self.before} did"
        return f"{self.score:.3f} on {self.cases} golden cases, {self.before_score - self.score:.3f} less than {who}"

    def data(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "version": self.version,
            "tenant": tenant_of(self.adapter),
            "score": round(self.score, 4),
            "before": {"version": self.before, "score": round(self.before_score, 4)},
            "cases": self.cases,
            "set": self.set_digest,
            "text": f"version {self.version} scores {self.text}",
        }


# Engines, jobs and loops


@dataclass(frozen=True, slots=True)
class BaseSwapped(Event):
    """This model is behind the base from now on."""

    base: str
    model: str
    by: str


@dataclass(frozen=True, slots=True)
class JobEnded(Event):
    """A fine-tuning job is at its end, on this server: `status` is succeeded, failed or cancelled."""

    job: str
    tenant: str
    status: str


@dataclass(frozen=True, slots=True)
class LoopStepped(Notice, Recorded):
    """A step of an adapter's loop; `number` is the try's, `what` is opened, training, gate, ... or an outcome."""

    adapter: str
    number: int
    phase: str
    live: int
    candidate: int
    what: str
    text: str
    evidence: Mapping[str, Any]
    by: str

    @property
    def kind(self) -> str:
        return f"loop.{self.what}"

    def data(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "tenant": tenant_of(self.adapter),
            "try": self.number,
            "phase": self.phase,
            "live": self.live or None,
            "candidate": self.candidate or None,
            "text": self.text,
            "evidence": dict(self.evidence),
        }

    def audit_line(self) -> dict[str, Any]:
        version = self.candidate or self.live
        subject = f"{self.adapter}@v{version}" if version else self.adapter
        return _line(self.by, self.adapter, f"loop_{self.what}", subject, self.text, self.evidence, 200)


def _line(
    who: str, adapter: str, what: str, subject: str, reason: str, evidence: Mapping[str, Any], status: int
) -> dict[str, Any]:
    return {
        "status": status,
        "who": who,
        "tenant": tenant_of(adapter),
        "key": None,
        "what": what,
        "subject": subject,
        "reason": reason,
        "evidence": json.dumps(dict(evidence), default=str)[:MAX_EVIDENCE],
    }


# The bus

E = TypeVar("E", bound=Event)
_END = None


class _Subscriber:
    """One subscriber: its kinds, and what waits for it. Without a queue it is told at once."""

    def __init__(self, name: str, take: Callable[[Any], None], kinds: tuple[type[Event], ...], queued: bool) -> None:
        self.name = name
        self.kinds = kinds
        self._take = take
        self._waiting: queue.Queue[Event | None] | None = queue.Queue(QUEUE) if queued else None
        self._thread: threading.Thread | None = None
        self.failures: Counter[str] = Counter(failed=0, dropped=0)

    def offer(self, event: Event) -> None:
        if self._waiting is None:
            self._told(event)
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            if not self.failures["dropped"]:
                log.error("%s is too slow: events are dropped for it, first %s", self.name, event)
            self.failures["dropped"] += 1

    def start(self) -> None:
        if self._waiting is not None:
            self._thread = threading.Thread(target=self._run, name=f"events-{self.name}", daemon=True)
            self._thread.start()

    def settle(self, until: float) -> None:
        """Return once nothing waits or is being taken, or at that time."""
        while self._waiting is not None and self._waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.002)

    def stop(self, until: float) -> None:
        self.settle(until)
        if self._waiting is None or self._thread is None:
            return
        if lost := self._waiting.qsize():
            log.error("%s is too slow: %d events are lost with the end of the server", self.name, lost)
        try:
            self._waiting.put_nowait(_END)
        except queue.Full:
            return  # a daemon's thread ends with the process
        self._thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        assert self._waiting is not None
        while (event := self._waiting.get()) is not _END:
            self._told(event)
            self._waiting.task_done()

    def _told(self, event: Event) -> None:
        try:
            self._take(event)
        except Exception:  # whatever it is: the others are told, and this one of the next
            self.failures["failed"] += 1
            log.exception("%s failed over %s", self.name, event)


class Events(Collector):
    """The bus. `publish` is for any thread; the rest for whoever assembles the server."""

    def __init__(self) -> None:
        self._subscribers: list[_Subscriber] = []
        self._started = False

    def subscribe(self, name: str, take: Callable[[E], None], *kinds: type[E]) -> None:
        """Have `take` called with each event of these kinds, in a thread of its own."""
        subscriber = _Subscriber(name, take, kinds, queued=True)
        self._subscribers.append(subscriber)
        if self._started:
            subscriber.start()

    def at_once(self, name: str, take: Callable[[E], None], *kinds: type[E]) -> None:
        """Have `take` called by whoever publishes: it only counts or wakes, and is for any thread."""
        self._subscribers.append(_Subscriber(name, take, kinds, queued=False))

    def publish(self, event: Event) -> None:
        """Tell everybody who subscribes to this kind. Never waits and raises nothing."""
        for subscriber in self._subscribers:
            if isinstance(event, subscriber.kinds):
                subscriber.offer(event)

    def start(self) -> None:
        """Start the subscribers' threads."""
        self._started = True
        for subscriber in self._subscribers:
            subscriber.start()

    def settle(self, seconds: float = 60.0) -> None:
        """Return once everything that was published so far has been taken. Blocks."""
        until = time.monotonic() + seconds
        for subscriber in self._subscribers:
            subscriber.settle(until)

    def stop(self) -> None:
        """Let what waits be taken, for a while. Blocks."""
        until = time.monotonic() + STOP_SECONDS
        for subscriber in self._subscribers:
            subscriber.stop(until)

    def collect(self) -> Iterator[Metric]:
        failures = CounterMetricFamily(
            "loradock_event_failures",
            "Events that a part of the server could not take: it failed over them, or they were dropped because too "
            "many waited for it.",
            labels=("subscriber", "result"),
        )
        for subscriber in self._subscribers:
            for result, count in subscriber.failures.items():
                failures.add_metric((subscriber.name, result), count)
        yield failures
