"""What opens a try: drift of the live version, its time, falling scores or ratings, or somebody who asks."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from serve.adapters.adapter import Adapter
from serve.rollout.loop_policy import DRIFT, RATINGS, SCHEDULE, LoopPolicy

# Open alarms are looked at again after so many seconds, though none is new; a history is read again.
LOOK_SECONDS = HISTORY_SECONDS = 60.0
# A version's first ratings, and as many of its last ones; so much less, from 0 to 1, is a fall.
RATINGS_COMPARED, FALL = 50, 0.1
VERSIONS = 1000


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a try is opened: one of the policy's causes or `asked`, and a sentence. `since`: when what moved began to."""

    kind: str
    text: str
    since: float = 0.0

    def described(self) -> dict[str, str]:
        return {"kind": self.kind, "text": self.text}


class Ratings:
    """Whether clients rate a version's answers lower than they did; in memory, so that a restart begins anew.

    `per_key(adapter)` is how many of the first and of the last ratings may have come with one API key.
    """

    def __init__(self, per_key: Callable[[str], int] = lambda adapter: RATINGS_COMPARED) -> None:
        self._per_key = per_key
        self._lock = threading.Lock()
        # The key's id and the rating.
        self._first: OrderedDict[tuple[str, str], list[tuple[str, float]]] = OrderedDict()
        self._last: dict[tuple[str, str], deque[tuple[str, float]]] = {}

    def take(self, adapter: str, version: str, rating: float, key: str = "") -> None:
        """An answer was rated by somebody who has a say, with the API key of this id ("" where there are no keys)."""
        rated, limit = (adapter, version), self._per_key(adapter) if key else RATINGS_COMPARED
        with self._lock:
            first = self._first.setdefault(rated, [])
            self._first.move_to_end(rated)
            if len(first) < RATINGS_COMPARED:
                if _count(first, key) < limit:
                    first.append((key, rating))
            elif limit:
                last = self._last.setdefault(rated, deque(maxlen=RATINGS_COMPARED))
                if _count(last, key) >= limit:
                    last.remove(next(each for each in last if each[0] == key))
                last.append((key, rating))
            while len(self._first) > VERSIONS:
                gone, _ = self._first.popitem(last=False)
                self._last.pop(gone, None)

    def fall(self, adapter: str, version: str) -> str | None:
        """A sentence, if they fell."""
        with self._lock:
            first, last = list(self._first.get((adapter, version), ())), list(self._last.get((adapter, version), ()))
        if len(last) < RATINGS_COMPARED:
            return None
        before, now = (sum(rating for _, rating in ratings) / len(ratings) for ratings in (first, last))
        if before - now <= FALL:
            return None
        return f"the last {len(last)} ratings are {now:.2f} on average, and the first {len(first)} were {before:.2f}"


def _count(ratings: Iterable[tuple[str, float]], key: str) -> int:
    return sum(each == key for each, _ in ratings)


class Drift(Protocol):
    """Who watches versions for drift."""

    def summary(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Each version's open alarms, by adapter."""

    def begin_prompts_anew(self, adapter: str, version: str, id: str) -> None: ...


class Causes:
    """Alarms are those of `drift` as of the last `look`; `history(name)` has every change of a name. It blocks, apart
    from `note_alarm`."""

    def __init__(self, drift: Drift, history: Callable[[str], Sequence[Mapping[str, Any]]], ratings: Ratings) -> None:
        self._drift_monitor = drift
        self._history = history
        self._ratings = ratings
        self._looked = -math.inf
        self._new_alarm = False
        self._rows: Mapping[str, Sequence[Mapping[str, Any]]] = {}
        # Of a live version: when its history was read, and what fell.
        self._read: dict[str, tuple[float, str | None]] = {}

    def note_alarm(self) -> None:
        """There is a new one. For any thread."""
        self._new_alarm = True

    def look(self) -> None:
        """See which alarms are open."""
        self._new_alarm = False
        self._rows = self._drift_monitor.summary()

    def look_if_new(self, now: float) -> None:
        """`look`, if there is a new alarm; and now and then, for those that were acknowledged."""
        if self._new_alarm or now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self.look()

    def answered(self, candidate: Adapter) -> None:
        """A version that was made for what is asked now is live: its own prompts are the reference."""
        self._drift_monitor.begin_prompts_anew(candidate.name, f"v{candidate.version}", candidate.id)

    def find(self, live: Adapter, policy: LoopPolicy, last: float | None, now: float) -> Cause | None:
        """What opens a try for this live version now; `last` is when the last try began, if there was one."""
        if DRIFT in policy.on and (cause := self._drift(live)):
            return cause
        if RATINGS in policy.on and (text := self._rated(live, now)):
            return Cause(RATINGS, text)
        if SCHEDULE in policy.on and now >= max(last or 0.0, live.created) + policy.every:
            return Cause(SCHEDULE, f"the last try or version is {policy.every / 86_400:g} days old")
        return None

    def _drift(self, live: Adapter) -> Cause | None:
        for row in self._rows.get(live.name, ()):
            if row["version"] == f"v{live.version}" and row["drifted"]:
                texts = "; ".join(row["moved"][kind] for kind in row["drifted"] if kind in row["moved"])
                since = [datetime.fromisoformat(when).timestamp() for when in row["since"].values()]
                text = f"{', '.join(row['drifted'])} drifted: {texts or 'see its drift report'}"
                return Cause(DRIFT, text, min(since, default=0.0))
        return None

    def _rated(self, live: Adapter, now: float) -> str | None:
        if text := self._ratings.fall(live.name, f"v{live.version}"):
            return text
        read, fell = self._read.get(live.id, (0.0, None))
        if now - read >= HISTORY_SECONDS:
            fell = self._fell(live)
            self._read = {id: entry for id, entry in self._read.items() if now - entry[0] < HISTORY_SECONDS}
            self._read[live.id] = now, fell
        return fell

    def _fell(self, live: Adapter) -> str | None:
        """What its history says of its golden score, since it is live."""
        for change in reversed(self._history(live.name)):
            if change["what"] == "golden_fell" and change["from_version"] == live.version:
                return f"its golden score fell: {change['why']}"
            if change["what"] == "promote" and change["to_version"] == live.version:
                return None
        return None
