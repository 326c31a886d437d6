"""Has a share of the requests fallen? Of those that thinning accepts, or of those that carry the opening they used to.

    watch = ShareWatch(needed=512, window=512, fall=1 / 3)
    watch.update(True, now)          # the first `needed` are the reference, then it watches
    watch.share, watch.before, watch.alarmed_at

An alarm is a share over the last `window` requests below `fall` times what it was, where two shares explain both a
million times as well as one does (generalized likelihood ratio: Wilks, 1938; for a reference without end Chernoff's
bound). A reference of 100 is an estimate itself: taken for the truth, a share of a half alarmed in 26 of 1,000 streams
of 19,000 requests in which nothing changed, with the ratio in 1 of 2,000. The alarm stays until it is acknowledged;
then the reference is taken anew.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from serve.drift.features.shared_ends import RUN

# ln of the likelihood ratio from which on a fall is no accident.
LEAST_EVIDENCE = math.log(1e6)
# Accepted requests that say which openings there are, and as many that say how many carry them.
OPENING_NEEDED = 100
# The share of the last so many accepted requests that carry a known opening is an alarm below half of what it was.
OPENING_WINDOW, OPENING_FALL = 48, 0.5
# Runs of openings that are known at most.
MOST_RUNS = 8192


class ShareWatch:
    """needed, window: in requests; fall: the part of the old share below which the new one is an alarm."""

    def __init__(self, *, needed: int, window: int, fall: float) -> None:
        self.alarms = 0
        # Seconds, of the request that raised the alarm.
        self.alarmed_at: float | None = None
        self._needed, self._fall = needed, fall
        self._recent: deque[bool] = deque(maxlen=window)
        self._hits = 0  # among the recent
        self._reference, self._reference_hits = 0, 0

    def update(self, outcome: bool, now: float) -> None:
        """Take in whether the next request belongs to the share."""
        if self._reference < self._needed:
            self._reference += 1
            self._reference_hits += outcome
            return
        if len(self._recent) == self._recent.maxlen:
            self._hits -= self._recent[0]
        self._recent.append(outcome)
        self._hits += outcome
        if self.alarmed_at is None and self.fallen:
            self.alarmed_at = now
            self.alarms += 1

    @property
    def before(self) -> float | None:
        """The share in the reference; None until that is complete. Never quite 0 or 1, as Laplace's estimate."""
        return (self._reference_hits + 1) / (self._reference + 2) if self._reference >= self._needed else None

    @property
    def share(self) -> float | None:
        """The share of the recent requests; None before there are any."""
        return self._hits / len(self._recent) if self._recent else None

    @property
    def log_evidence(self) -> float:
        """ln of how much likelier both are with a share each than with one for both; 0 if the share is no lower."""
        before, share = self.before, self.share
        if before is None or share is None or share >= before:
            return 0.0
        recent, reference = len(self._recent), self._reference + 2
        both = (share * recent + before * reference) / (recent + reference)
        return recent * _divergence(share, both) + reference * _divergence(before, both)

    @property
    def fallen(self) -> bool:
        """Whether the share is too low now."""
        before, full = self.before, len(self._recent) == self._recent.maxlen
        if before is None or not full or self._hits >= self._fall * before * len(self._recent):
            return False
        return self.log_evidence >= LEAST_EVIDENCE

    def acknowledge(self) -> None:
        """The alarm has been dealt with: how it is from now on is usual."""
        if self.alarmed_at is not None:
            self.alarmed_at = None
            self._reference = 0
            self._reference_hits = 0
            self._hits = 0
            self._recent.clear()

    def state(self) -> dict[str, NDArray]:
        """All of it as arrays; what a version counted is in `alarms`."""
        at = math.nan if self.alarmed_at is None else self.alarmed_at
        return {
            "recent": np.array(self._recent, np.bool_),
            "reference": np.array([self._reference, self._reference_hits]),
            "alarms": np.array([self.alarms, at]),
        }

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where the one was whose `state()` this is; without "alarms" there were none."""
        self._reference, self._reference_hits = state["reference"].tolist()
        self._recent.extend(state["recent"].tolist())
        self._hits = sum(self._recent)
        if "alarms" in state:
            alarms, at = state["alarms"].tolist()
            self.alarms, self.alarmed_at = int(alarms), None if math.isnan(at) else at


def _divergence(share: float, other: float) -> float:
    """Kullback and Leibler's, of a share from another one that is neither 0 nor 1."""
    hit = share * math.log(share / other) if share else 0.0
    return hit + (1 - share) * math.log((1 - share) / (1 - other))


class OpeningWatch:
    """Do prompts still carry the openings that they shared? `share` is of the accepted requests.

    A request carries a known opening if most of what it shares with others is known, and is as long as usual. Where
    that is told by what others share, a few words of the question may be among it; where the request names it
    (`named`), half of it may be about the day or the user.
    """

    def __init__(self) -> None:
        self.share = ShareWatch(needed=OPENING_NEEDED, window=OPENING_WINDOW, fall=OPENING_FALL)
        self._known = np.zeros(0, np.uint64)
        # How many shared runs each of the first requests had, and their median once they are all there.
        self._lengths: list[int] = []
        self._usual = 0.0
        # The runs that were looked at last, and whether they are a known opening.
        self._held: bytes | None = None
        self._carried = False

    def update(self, runs: NDArray[np.uint64], now: float, *, named: bool = False) -> None:
        """Take in the shared runs of an accepted request."""
        if len(self._lengths) < OPENING_NEEDED:
            if len(self._known) < MOST_RUNS:
                self._known = np.union1d(self._known, runs)
            self._lengths.append(len(runs))
            self._usual = float(np.median(self._lengths)) if len(self._lengths) == OPENING_NEEDED else 0.0
            return
        # As a rule a request shares just what the one before shared.
        if (held := runs.tobytes()) != self._held:
            both = int(np.count_nonzero(self._among(runs)))
            unknown, spilled = (len(runs) / 2, 0) if named else (max(RUN, len(runs) / 10), RUN)
            self._carried = len(runs) - both <= unknown and both >= (self._usual - spilled) / 2
            self._held = held
        self.share.update(self._carried, now)

    def _among(self, runs: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(runs,): which are known."""
        if not len(self._known):
            return np.zeros(len(runs), np.bool_)
        return self._known.take(self._known.searchsorted(runs), mode="clip") == runs

    def acknowledge(self) -> None:
        """The alarm has been dealt with: the openings are learned anew."""
        if self.share.alarmed_at is not None:
            self.share.acknowledge()
            self._known = np.zeros(0, np.uint64)
            self._lengths = []
            self._held = None

    def state(self) -> dict[str, NDArray]:
        """All of it as arrays."""
        return self.share.state() | {"known": self._known.copy(), "lengths": np.array(self._lengths, np.int64)}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where the one was whose `state()` this is."""
        self.share.restore(state)
        self._known = np.array(state["known"])
        self._lengths = state["lengths"].tolist()
        self._held = None
        self._usual = float(np.median(self._lengths)) if len(self._lengths) >= OPENING_NEEDED else 0.0
