"""What a simulated fleet is asked: requests that are drawn, or those of a public trace with adapters laid over it."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Trace:
    """Seconds since the request before, and tokens of prompt and answer, of each request that somebody was asked."""

    gaps: Any
    prompts: Any
    answers: Any

    @classmethod
    def read(cls, path: Path) -> Self:
        """A file of Azure's (AzurePublicDataset, LLM inference): TIMESTAMP, ContextTokens, GeneratedTokens."""
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        times = np.array([np.datetime64(row["TIMESTAMP"].partition("+")[0].replace(" ", "T"), "ns") for row in rows])
        gaps = np.diff(times) / np.timedelta64(1, "s")
        gaps = np.insert(gaps, 0, gaps.mean())  # the first comes after no other
        prompts, answers = (
            np.array([max(int(row[column]), 1) for row in rows]) for column in ("ContextTokens", "GeneratedTokens")
        )
        return cls(gaps, prompts, answers)

    @property
    def prompt(self) -> float:
        return float(self.prompts.mean())

    @property
    def answer(self) -> float:
        return float(self.answers.mean())


@dataclass(frozen=True)
class Load:
    """What is asked: `use` is the part of what the replicas sustain, `burst` the coefficient of variation of the time
    between two requests."""

    replicas: int = 20
    adapters: int = 10_000
    zipf: float = 1.0
    use: float = 0.6
    burst: float = 2.0
    requests: int = 80_000
    # Requests before those, which fill the replicas and are not counted.
    warm: int = 400_000
    events: str = "steady"
    seed: int = 0
    # Of each request in order, `Trace`'s; none: drawn.
    trace: Trace | None = None
    # Mean tokens of those that are drawn.
    prompt = 160
    answer = 60

    @property
    def mean(self) -> tuple[float, float]:
        """Tokens of a prompt and of an answer."""
        return (self.trace.prompt, self.trace.answer) if self.trace else (self.prompt, self.answer)


@dataclass
class Request:
    came: float
    name: str
    prompt: int
    answer: int
    counts: bool = True
    first: float = -1.0
    place: int = -1
    # Counts up when its replica dies under it, so that what was scheduled there is void.
    tries: int = 0


def requests_of(load: Load, sustained: float) -> tuple[list[Request], float, float]:
    """The requests in order of their arrival, when the first comes that counts, and the last. A replica sustains
    `sustained` requests a second."""
    rng = np.random.default_rng(load.seed)
    rate = load.use * load.replicas * sustained
    shape = 1 / load.burst**2
    total = load.warm + load.requests
    gaps = rng.gamma(shape, 1 / (rate * shape), total)
    if load.trace:
        gaps[load.warm :] = load.trace.gaps[: load.requests] / (load.trace.gaps[: load.requests].mean() * rate)
    times = np.cumsum(gaps)
    began, end = float(times[load.warm]), float(times[-1])
    if load.events == "diurnal":  # two days in a run, from 0.4 to 1.6 of the mean
        times = _bent(times, lambda at: 1 + 0.6 * np.sin(4 * np.pi * (at - began) / (end - began)))
        began, end = float(times[load.warm]), float(times[-1])
    ranks = np.arange(1, load.adapters + 1, dtype=np.float64) ** -load.zipf
    picked = np.searchsorted(np.cumsum(ranks) / ranks.sum(), rng.random(total))
    picked = np.minimum(picked, load.adapters - 1)
    if load.events == "flash crowd":  # a name that hardly anybody asked has a third of the requests
        first, last = began + 0.4 * (end - began), began + 0.6 * (end - began)
        crowd = (times > first) & (times < last) & (rng.random(total) < 1 / 3)
        picked[crowd] = load.adapters // 2
    prompts, answers = _tokens(load, rng)
    rows = zip(times.tolist(), picked.tolist(), prompts.tolist(), answers.tolist(), strict=True)
    return (
        [Request(came, f"adapter-{name}", prompt, answer, came >= began) for came, name, prompt, answer in rows],
        began,
        end,
    )


def _tokens(load: Load, rng: np.random.Generator) -> tuple[Any, Any]:
    """Of each request's prompt and answer. Requests before those of a trace are drawn from it."""
    total = load.warm + load.requests
    if load.trace:
        rows = np.concatenate([rng.integers(0, len(load.trace.gaps), load.warm), np.arange(load.requests)])
        return load.trace.prompts[rows], load.trace.answers[rows]
    prompts = np.maximum(rng.lognormal(math.log(load.prompt) - 0.32, 0.8, total), 1).astype(int)
    return prompts, np.maximum(rng.lognormal(math.log(load.answer) - 0.32, 0.8, total), 1).astype(int)


def _bent(times: Any, rate: Any) -> Any:
    """The same arrivals on a clock that runs at `rate`."""
    grid = np.linspace(0, times[-1], 4096)
    passed = np.concatenate([[0], np.cumsum(rate((grid[1:] + grid[:-1]) / 2) * np.diff(grid))])
    return np.interp(times * passed[-1] / times[-1], passed, grid)


def happenings(load: Load, began: float, end: float) -> list[tuple[float, str, int]]:
    """What happens to replicas: when, what, to which."""
    if load.events != "replicas die, join, slow down":
        return []
    parts = ((0.1, "die", 0), (0.3, "slow", 1), (0.5, "well", 1), (0.6, "join", 0), (0.8, "join", load.replicas))
    return [(began + part * (end - began), what, place) for part, what, place in parts]
