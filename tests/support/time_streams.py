"""Streams of rows that time makes unlike: waves, autoregression, topical sessions; synthetic ones and real prompts.

`draw(rng, n)` of each kind gives n rows in order, the first `REFERENCE` of them the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from serve.drift.features import features
from serve.drift.features.features import PROMPT
from serve.drift.signal import Signal

Rows: TypeAlias = NDArray[np.floating]
Draw: TypeAlias = Callable[[np.random.Generator, int], Rows]

REFERENCE = 1000
SCORES = 33
WANDERING = 5
SESSION = 6
NAMES = tuple(f"score_{i}" for i in range(SCORES))


@contextmanager
def of_scores() -> Iterator[None]:
    """A signal of prompts takes rows of SCORES scores here, and nothing else."""
    with patch.dict(features._LEADS, {PROMPT: NAMES}):
        yield


def signal_of_scores(rows: Rows, seed: int = 0) -> Signal:
    """A signal whose reference these are."""
    signal = Signal(PROMPT, needed=len(rows), threshold=1e5, seed=seed, dimensions=0)
    for row in rows:
        signal.update(row)
    return signal


def noise(rng: np.random.Generator, n: int, heavy: bool = False) -> Rows:
    """(n, SCORES) of variance 1; heavy: Student's t with three degrees of freedom."""
    return rng.standard_t(3, (n, SCORES)) / np.sqrt(3) if heavy else rng.standard_normal((n, SCORES))


def wave(rng: np.random.Generator, n: int, strength: float, cycles: float) -> Rows:
    """Sines of `strength` sd in some of the scores, `cycles` of them over the reference."""
    phases = rng.uniform(0, 2 * np.pi, SCORES)
    concerned = np.isin(np.arange(SCORES), rng.permutation(SCORES)[:WANDERING])
    return strength * concerned * np.sin(2 * np.pi * cycles * np.arange(n)[:, None] / REFERENCE + phases)


def autoregression(rng: np.random.Generator, n: int, phi: float, heavy: bool = False) -> Rows:
    """AR(1) of variance 1 in every score."""
    rows = noise(rng, n, heavy)
    innovations = np.sqrt(1 - phi**2) * rows
    for i in range(1, n):
        rows[i] = phi * rows[i - 1] + innovations[i]
    return rows


def sessions(rng: np.random.Generator, n: int, strength: float, heavy: bool = False) -> Rows:
    """Six requests in a row round a mean of their own, which lies `strength` sd from the common one."""
    means = rng.standard_normal((n // SESSION + 1, SCORES)).repeat(SESSION, axis=0)[:n]
    return noise(rng, n, heavy) + strength * means


def synthetic() -> dict[str, Draw]:
    """By the name that a table shows."""
    kinds: dict[str, Draw] = {"i.i.d.": noise, "i.i.d., heavy tails": partial(noise, heavy=True)}
    for strength in (0.3, 0.6, 1.0):
        for cycles in (1.0, 1.5, 3.0):
            kinds[f"wave {strength} sd, {cycles:g} cycles"] = _waved(noise, strength, cycles)
    for phi in (0.1, 0.3, 0.5):
        kinds[f"AR(1) {phi}"] = partial(autoregression, phi=phi)
    for strength in (0.5, 1.0):
        kinds[f"sessions {strength} sd"] = partial(sessions, strength=strength)
    kinds["wave 1.0 sd, 1 cycles, heavy tails"] = _waved(partial(noise, heavy=True), 1.0, 1.0)
    kinds["AR(1) 0.5, heavy tails"] = partial(autoregression, phi=0.5, heavy=True)
    kinds["sessions 1.0 sd, heavy tails"] = partial(sessions, strength=1.0, heavy=True)
    kinds["AR(1) 0.3 and wave 0.6 sd, 1 cycles"] = _waved(partial(autoregression, phi=0.3), 0.6, 1.0)
    kinds["AR(1) 0.5 and wave 1.0 sd, 1.5 cycles"] = _waved(partial(autoregression, phi=0.5), 1.0, 1.5)
    kinds["sessions 1.0 sd and wave 1.0 sd, 1 cycles"] = _waved(partial(sessions, strength=1.0), 1.0, 1.0)
    kinds["sessions 0.5 sd and wave 0.6 sd, 3 cycles"] = _waved(partial(sessions, strength=0.5), 0.6, 3.0)
    return kinds


def mixed(first: Rows, second: Rows) -> dict[str, Draw]:
    """Streams of two kinds of real prompts, given as rows of each: what wanders is the share of the second."""

    def draw(rng: np.random.Generator, n: int, shares: Callable[[np.random.Generator, int], NDArray]) -> Rows:
        is_second = rng.random(n) < shares(rng, n)
        return _picked(rng, first, second, is_second)

    def in_sessions(rng: np.random.Generator, n: int) -> Rows:
        is_second = (rng.random(n // SESSION + 1) < 0.3).repeat(SESSION)[:n]
        return _picked(rng, first, second, is_second)

    kinds: dict[str, Draw] = {"prompts, i.i.d.": partial(draw, shares=lambda rng, n: np.full(n, 0.3))}
    for strength in (0.1, 0.2, 0.3):
        for cycles in (1.0, 3.0):
            kinds[f"prompts, share 0.4 and a wave of {strength}, {cycles:g} cycles"] = partial(
                draw, shares=partial(_shares, middle=0.4, strength=strength, cycles=cycles)
            )
    kinds["prompts, share of an AR(1) 0.5"] = partial(draw, shares=partial(_autoregressive_shares, phi=0.5))
    kinds["prompts, topical sessions"] = in_sessions
    return kinds


def _waved(stationary: Draw, strength: float, cycles: float) -> Draw:
    return lambda rng, n: stationary(rng, n) + wave(rng, n, strength, cycles)


def _shares(rng: np.random.Generator, n: int, middle: float, strength: float, cycles: float) -> NDArray:
    return middle + strength * np.sin(2 * np.pi * (cycles * np.arange(n) / REFERENCE + rng.random()))


def _autoregressive_shares(rng: np.random.Generator, n: int, phi: float) -> NDArray:
    latent = autoregression(rng, n, phi)[:, 0]
    return 1 / (1 + np.exp(1 - 1.5 * latent))


def _picked(rng: np.random.Generator, first: Rows, second: Rows, is_second: NDArray) -> Rows:
    n = len(is_second)
    return np.where(
        is_second[:, None], second[rng.integers(len(second), size=n)], first[rng.integers(len(first), size=n)]
    )
