"""Answers are compared with answers to requests that asked for the same.

How long an answer is, how it ends, how often it repeats itself and how likely its tokens are all follow from
`max_tokens`, the temperature and the like. A change of those is no change of the version. So a signal of answers has a
stratum for each set of parameters, with a reference and evidence of its own (Mondrian conformal prediction, Vovk et
al., Algorithmic Learning in a Random World, 2022): within a stratum requests are exchangeable while the version answers
as before, whatever the mix of strata does.

A stratum looks at the first K tokens of an answer, K a power of two that `max_tokens` has room for. How they are
distributed does not depend on where the answer would have been cut later, so all `max_tokens` from K to 2 K - 1 share
a stratum. While a stratum that was not among the first requests gathers its reference, its requests are also compared,
as far as they go, with the next lower K that has one.

At most STRATA are kept, those that are asked most. Their false alarms add up to one in `threshold` requests, as without
strata: each counts its own requests only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serve.asgi.exchange import Parameters
from serve.drift.signal import Signal

# Of a longer answer the beginning is looked at.
MOST_TOKENS = 1024
STRATA = 4
# Sets of parameters that are counted; more are rare ones.
COUNTED = 32
# Of what is recent, in requests.
HALF_LIFE = 200.0
_FADE = 0.5 ** (1 / HALF_LIFE)


class Stratum(NamedTuple):
    """`tokens` of an answer are looked at, all of them where it is 0: a request whose parameters are not known."""

    tokens: int = 0
    temperature: float = 0.0
    constrained: bool = False
    tools: bool = False
    others: str = ""

    @classmethod
    def of(cls, parameters: Parameters | None) -> Self:
        if parameters is None:
            return cls()
        tokens = 1 << max(min(parameters.max_tokens, MOST_TOKENS).bit_length() - 1, 0)
        temperature = round(parameters.temperature, 1)
        return cls(tokens, temperature, parameters.constrained, parameters.tools, parameters.others)

    @classmethod
    def parse(cls, text: str) -> Self:
        tokens, temperature, constrained, tools, others = text.split("/")
        return cls(int(tokens), float(temperature), constrained == "1", tools == "1", others)

    def __str__(self) -> str:
        return f"{self.tokens}/{self.temperature}/{self.constrained:d}/{self.tools:d}/{self.others}"

    def described(self) -> dict[str, Any]:
        """For people."""
        if not self.tokens:
            return {}
        most = "" if self.tokens == MOST_TOKENS else f" to {2 * self.tokens - 1}"
        max_tokens = f"{self.tokens} and more" if self.tokens == MOST_TOKENS else f"{self.tokens}{most}"
        row: dict[str, Any] = {"max_tokens": max_tokens, "temperature": self.temperature}
        row |= {"structured": True} if self.constrained else {}
        row |= {"tools": True} if self.tools else {}
        return row | ({"other_parameters": self.others} if self.others else {})

    def below(self, other: Stratum) -> bool:
        """It looks at less of an answer to the same sampling."""
        return 0 < self.tokens < other.tokens and self[1:] == other[1:]


# The stratum of requests whose parameters are not known.
LEGACY = Stratum()


def most_common(parameters: Iterable[Parameters | None]) -> Stratum:
    """The stratum of most of these requests."""
    counts = Counter(Stratum.of(each) for each in parameters)
    return counts.most_common(1)[0][0] if counts else LEGACY


class ParameterStrata:
    """The strata of one kind of signal. The one that is asked most is `signals[kind]`, the others are in `others`.

    `made` begins a new one. Not thread-safe.
    """

    def __init__(
        self, kind: str, signals: dict[str, Signal], made: Callable[[], Signal], reference: int = 1000
    ) -> None:
        self._kind = kind
        self._signals = signals
        self._made = made
        self.current: Stratum | None = None
        self.others: dict[Stratum, Signal] = {}
        # Requests of each stratum: recent ones by their weight, and the first `reference` ones.
        self.recent: dict[Stratum, float] = {}
        self.first: dict[Stratum, int] = {}
        # Samples and alarms of strata that are kept no more: counters do not fall.
        self._gone = (0, 0)
        self.reference = reference

    def gather(self, reference: int) -> None:
        """So many requests make a reference from now on."""
        self.reference = reference

    def every(self) -> Iterator[tuple[Stratum, Signal]]:
        """The current stratum, then the others."""
        yield self.current or LEGACY, self._signals[self._kind]
        yield from self.others.items()

    def counts(self) -> tuple[int, int]:
        """Samples and alarms of all strata, also of those that gave their place to others."""
        kept = [signal for _, signal in self.every()]
        samples = self._gone[0] + sum(signal.samples for signal in kept)
        return samples, self._gone[1] + sum(signal.alarms for signal in kept)

    def signal(self, stratum: Stratum) -> Signal | None:
        """What watches this stratum, if it is kept."""
        if self.current in (None, stratum):
            return self._signals[self._kind]
        return self.others.get(stratum)

    def levels(self, stratum: Stratum) -> tuple[Stratum, ...]:
        """The strata that a request of this one has rows for: its own, and a lower one while its own gathers.

        Not where both were among the first requests: those may be the requests of two applications.
        """
        own = self.signal(stratum)
        if own is not None and own.watching:
            return (stratum,)
        lower = [known for known, signal in self.every() if signal.watching and self._stands_in(known, stratum)]
        return (stratum, max(lower)) if lower else (stratum,)

    def _stands_in(self, known: Stratum, stratum: Stratum) -> bool:
        """`known` can be compared with a request of `stratum`; what an earlier release kept, with any."""
        return known == LEGACY or (known.below(stratum) and stratum not in self.first)

    def count(self, stratum: Stratum) -> None:
        """A request of this stratum came: it may get a place of its own, or become the one that is shown."""
        self._remember(stratum)
        if self.current is None:
            self.current = stratum
        elif stratum != self.current and stratum not in self.others:
            self._admit(stratum)
        if stratum in self.others and self.recent[stratum] > 2 * self.recent.get(self.current, 0.0):
            shown, other = self._signals[self._kind], self.others[stratum]
            if other.watching or not shown.watching:
                self.others[self.current] = shown
                self._signals[self._kind] = self.others.pop(stratum)
                self.current = stratum

    def moved(self) -> float:
        """How far the mix of parameters is from that of the first requests: 0 the same, 1 nothing in common."""
        first, recent = sum(self.first.values()), sum(self.recent.values())
        if first < self.reference or not recent:
            return 0.0
        strata = {*self.first, *self.recent}
        gaps = (abs(self.first.get(key, 0) / first - self.recent.get(key, 0.0) / recent) for key in strata)
        return sum(gaps) / 2

    def shares(self) -> list[dict[str, Any]]:
        """Each stratum as people write it, with its share of the first and of the recent requests."""
        first, recent = sum(self.first.values()) or 1, sum(self.recent.values()) or 1.0
        strata = sorted({*self.first, *self.recent}, key=lambda key: -self.recent.get(key, 0.0))
        return [
            {
                **key.described(),
                "share": round(self.recent.get(key, 0.0) / recent, 4),
                "share_of_first": round(self.first.get(key, 0) / first, 4),
            }
            for key in strata
        ]

    def state(self) -> dict[str, NDArray]:
        """Which strata there are, and how often they came; their signals are saved beside it, as `every` lists them."""
        kept = [str(stratum) for stratum, _ in self.every()] if self.current is not None else []
        counted = sorted({*self.first, *self.recent})
        return {
            "kept": np.array(kept, "U80"),
            "counted": np.array([str(stratum) for stratum in counted], "U80"),
            "first": np.array([self.first.get(stratum, 0) for stratum in counted], np.int64),
            "recent": np.array([self.recent.get(stratum, 0.0) for stratum in counted]),
            "gone": np.array(self._gone, np.int64),
        }

    def restore(self, state: Mapping[str, NDArray]) -> list[Signal]:
        """Become the strata whose state this was; the signals of `others`, still empty, in their order."""
        if not state:  # of an earlier release, which kept one reference whatever was asked
            self.current = LEGACY
            return []
        kept = [Stratum.parse(text) for text in state["kept"].tolist()]
        counted = [Stratum.parse(text) for text in state["counted"].tolist()]
        self.first = {key: int(n) for key, n in zip(counted, state["first"], strict=True) if n}
        self.recent = {key: float(n) for key, n in zip(counted, state["recent"], strict=True) if n}
        self._gone = int(state["gone"][0]), int(state["gone"][1])
        self.current = kept[0] if kept else None
        self.others = {stratum: self._made() for stratum in kept[1:]}
        return list(self.others.values())

    def built(self, stratum: Stratum) -> None:
        """`signals[kind]` was made of requests of this stratum alone."""
        self.current, self.first = stratum, {stratum: self.reference}

    def _remember(self, stratum: Stratum) -> None:
        for key in self.recent:
            self.recent[key] *= _FADE
        if stratum not in self.recent and len(self.recent) >= COUNTED:
            del self.recent[min(self.recent, key=self.recent.__getitem__)]
        self.recent[stratum] = self.recent.get(stratum, 0.0) + 1
        if sum(self.first.values()) < self.reference and (stratum in self.first or len(self.first) < COUNTED):
            self.first[stratum] = self.first.get(stratum, 0) + 1

    def _admit(self, stratum: Stratum) -> None:
        """Give it a place, if there is one, or if it is asked twice as often as one that has."""
        if len(self.others) >= STRATA - 1:
            weakest = min(self.others, key=lambda key: self.recent.get(key, 0.0))
            if self.recent.get(stratum, 0.0) <= 2 * self.recent.get(weakest, 0.0):
                return
            gone = self.others.pop(weakest)
            self._gone = self._gone[0] + gone.samples, self._gone[1] + gone.alarms
        self.others[stratum] = self._made()
