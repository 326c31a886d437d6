"""How far a shadow's answers agree with those that clients got: token by token, without a text being kept.

Requests at temperature 0 are counted apart (`greedy`) from those that draw their tokens (`sampled`): of the latter, two
answers of one and the same version differ too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.asgi.exchange import Generation

# Of longer answers the beginnings are compared, where the number of edits grows with the product of the lengths.
EDIT_TOKENS = 512
# Pairs of versions that are remembered.
PAIRS = 200
GREEDY, SAMPLED = "greedy", "sampled"
_LABELS = ("adapter", "version", "sampling")


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two answers: `exact` 1 or 0; `prefix`, the part of the longer one up to the first other token; `edit`, the
    part of the longer one that needs no edit (Levenshtein); `length`, tokens of the shadow's over those of the live
    one."""

    exact: float
    prefix: float
    edit: float
    length: float


MEASURES = Agreement.__slots__


def agreement(live: Sequence[int], shadow: Sequence[int]) -> Agreement:
    """Of two answers as tokens; an empty one counts as one token long where it divides."""
    ours, theirs = np.asarray(live, np.int64), np.asarray(shadow, np.int64)
    longest = max(len(ours), len(theirs), 1)
    shorter = min(len(ours), len(theirs))
    differs = np.flatnonzero(ours[:shorter] != theirs[:shorter])
    same = int(differs[0]) if len(differs) else shorter
    exact = float(same == len(ours) == len(theirs))
    prefix = 1.0 if exact else same / longest
    beginning = max(min(longest, EDIT_TOKENS), 1)
    edits = _edits(ours[:EDIT_TOKENS], theirs[:EDIT_TOKENS])
    return Agreement(exact, prefix, 1 - edits / beginning, len(theirs) / max(len(ours), 1))


def _edits(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens to insert, delete or replace (Levenshtein), a row of the table at a time."""
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for number, token in enumerate(first, 1):
        replaced = row[:-1] + (second != token)
        best = np.concatenate(([number], np.minimum(row[1:] + 1, replaced)))
        # Insertions: the least of best[k] + (j - k) over k up to j.
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


@dataclass(slots=True)
class _Sums:
    count: int = 0
    exact: float = 0.0
    prefix: float = 0.0
    edit: float = 0.0
    length: float = 0.0
    judged: int = 0
    live_grade: float = 0.0
    shadow_grade: float = 0.0

    def add(self, agreement: Agreement) -> None:
        self.count += 1
        for name in MEASURES:
            setattr(self, name, getattr(self, name) + getattr(agreement, name))

    @property
    def means(self) -> dict[str, float]:
        return {name: getattr(self, name) / self.count for name in MEASURES}

    @property
    def grades(self) -> dict[str, float]:
        """Mean grades of the client's answers and of the shadow's."""
        return {"live": self.live_grade / self.judged, "shadow": self.shadow_grade / self.judged} if self.judged else {}


class ShadowAgreement(Collector):
    """Means over what was compared since the server started, by pair of versions. For any thread but the event loop's.

    `label` gives a version's metric labels.
    """

    def __init__(
        self, label: Callable[[str, str], tuple[str, str]] = lambda adapter, version: (adapter, version)
    ) -> None:
        self._label = label
        self._lock = threading.Lock()
        # By adapter, live and shadow version, and sampling; the latest last.
        self._sums: OrderedDict[tuple[str, int, int, str], _Sums] = OrderedDict()

    def compare(
        self,
        adapter: str,
        versions: tuple[int, int],
        fields: Mapping[str, Any],
        live: Generation,
        shadow: Generation,
        grades: tuple[float, float] | None = None,
    ) -> None:
        """Count two answers to one request, with their grades if somebody judged them.

        `versions` are the live one and the shadow.
        """
        if "abort" in (live.finish_reason, shadow.finish_reason):
            return
        compared = agreement(live.output, shadow.output)
        key = (adapter, *versions, GREEDY if fields.get("temperature") == 0 else SAMPLED)
        with self._lock:
            sums = self._sums.setdefault(key, _Sums())
            sums.add(compared)
            if grades:
                sums.judged += 1
                sums.live_grade += grades[0]
                sums.shadow_grade += grades[1]
            self._sums.move_to_end(key)
            if len(self._sums) > PAIRS:
                self._sums.popitem(last=False)

    def report(self, adapter: str) -> list[dict[str, Any]]:
        """What was compared of an adapter, the latest pair of versions first."""
        with self._lock:
            rows = [_described(key, sums) for key, sums in self._sums.items() if key[0] == adapter]
        return rows[::-1]

    def collect(self) -> Iterator[Metric]:
        agrees = GaugeMetricFamily(
            "loradock_shadow_agreement",
            "Mean agreement of a shadow's answers with those that clients got, 0 to 1: exact, common prefix, or edits.",
            labels=(*_LABELS, "measure"),
        )
        length = GaugeMetricFamily(
            "loradock_shadow_length_ratio", "Mean of tokens of a shadow's answer over the client's.", labels=_LABELS
        )
        compared = CounterMetricFamily(
            "loradock_shadow_compared", "Answers of a shadow that were compared with what clients got.", labels=_LABELS
        )
        graded = GaugeMetricFamily(
            "loradock_shadow_grade",
            "Mean grade by the golden set's judge, 0 to 1, of a sample: of the client's answers and of the shadow's.",
            labels=(*_LABELS, "answer"),
        )
        with self._lock:
            # Of several live versions that a shadow stood beside, the latest one counts.
            latest = {
                (key[0], f"v{key[2]}", key[3]): (sums.count, sums.means, sums.grades)
                for key, sums in self._sums.items()
            }
        for (adapter, version, sampling), (count, means, grades) in latest.items():
            if self._label(adapter, version) != (adapter, version):
                continue
            labels = (adapter, version, sampling)
            compared.add_metric(labels, count)
            length.add_metric(labels, means["length"])
            for name in ("exact", "prefix", "edit"):
                agrees.add_metric((*labels, name), means[name])
            for answer, value in grades.items():
                graded.add_metric((*labels, answer), value)
        yield from (agrees, length, compared, graded)


def _described(key: tuple[str, int, int, str], sums: _Sums) -> dict[str, Any]:
    described: dict[str, Any] = {"live": key[1], "shadow": key[2], "sampling": key[3], "requests": sums.count}
    for name, value in sums.means.items():
        described["length_ratio" if name == "length" else f"{name}_agreement"] = round(value, 4)
    described["judged"] = sums.judged
    return described | {f"{answer}_grade": round(value, 4) for answer, value in sums.grades.items()}
