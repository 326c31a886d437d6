"""How long a step takes, learned from those before it: what its answers take, and what tokens of prompts add to that.

A token of a prompt takes some time for the weights, and more for each token before it. Beside prompts the answers take
a part of what they take alone, since the weights are read anyway. With tiles (AMX) the first token of a prompt takes
more than those after it: weights are widened for all of them. These four numbers are a Kalman filter's, whose
measurements are the steps: what only some kinds of steps tell apart is remembered while others come.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

# The least that a step takes of prompts: a step reads all weights, whatever it computes.
LEAST = 32
# Before anything was measured.
FIRST = 128
# Steps of answers alone that say what they take: the median, which one disturbed step does not move. So many are
# needed, and one more after some steps with prompts.
SAMPLES = 5
NEEDED = 3
AGAIN = 128
# Up to so many tokens of a prompt cost what as many answers do.
_AS_ANSWERS = 4
# How far a step is from what the true numbers would say, as a part of it, and how many times what was expected it is
# taken for at most.
_NOISE, _DISTURBED = 0.1, 1.5
# How far the four numbers may be from the first guess, and how far they go from step to step: the first as it is, the
# others as parts of what `LEAST` tokens take, and of what a token takes.
_AT_FIRST, _DRIFT = np.array([0.3, 1.0, 0.5, 1.0]), np.array([0.01, 0.03, 0.03, 0.03])
# Tokens before a token that are counted as one, so that both parts of its cost are of a size.
_BEFORE = 1000
# Seconds that a token of a prompt takes at least: a step may take less than those of many answers before it.
QUICKEST = 1e-6
_LEAST, _MOST = np.array([0.0, 0.0, QUICKEST, 0.0]), np.array([1.0, np.inf, np.inf, np.inf])


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a prompt, after so many of it that were computed before."""

    before: int
    tokens: int


@dataclass(slots=True)
class _Alone:
    """Steps of so many answers without prompts."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    since: int = 0  # steps with prompts, after the last one


@dataclass(slots=True)
class StepCosts:
    """In seconds: that there are tokens of prompts at all, one of them, and the `_BEFORE` tokens before it.

    `kept` is the part of their time alone that answers take beside prompts. Without `tiles` nothing is fixed.
    """

    clock: Callable[[], float] = time.monotonic
    tiles: bool = False
    token: float | None = None
    fixed: float = 0.0
    before: float = 0.0
    kept: float = 0.5
    # How far these may be wrong: the covariance of `kept`, `fixed`, `token` and `before`.
    _doubt: Any = None
    # By the number of answers, in powers of two.
    _alone: dict[int, _Alone] = field(default_factory=dict)
    # Of the steps that are computed now: when they began, how many answers and which pieces of prompts are in them.
    _steps: deque[tuple[float, int, list[Piece]]] = field(default_factory=deque)
    _ended: float = 0.0

    def alone(self, answers: int) -> float:
        """A step of so many answers, or of the next fewer that were measured; 0 where none were."""
        measured = [size for size, it in self._alone.items() if it.seconds and size <= answers.bit_length()]
        return median(self._alone[max(measured)].seconds) if measured else 0.0

    def unknown(self, answers: int) -> bool:
        """Whether a step of so many answers alone should be measured now."""
        it = self._alone.get(answers.bit_length())
        return it is None or len(it.seconds) < NEEDED or it.since >= AGAIN

    def prompts(self, pieces: Iterable[Piece]) -> float:
        """What these add to a step."""
        here, there = _weights(pieces)
        return (self.fixed if here else 0.0) + (self.token or 0.0) * here + self.before * there

    def worthwhile(self, seconds: float) -> int:
        """How many tokens a step with any takes at least: `LEAST`, and as long for them as it takes that there are any.

        Twice as long within so many seconds: prompts take three quarters of the time then.
        """
        return max(LEAST, int(max(self.fixed, min(2 * self.fixed, seconds - self.fixed)) / (self.token or math.inf)))

    def tokens(self, seconds: float, prompts: Iterable[Piece]) -> int:
        """How many tokens of these prompts, one after another, and then of others, take so many seconds."""
        if self.token is None:
            return FIRST
        total, seconds = 0.0, seconds - self.fixed
        for piece in prompts:
            deeper = self.before / _BEFORE
            each = self.token + deeper * piece.before
            fit = 2 * seconds / (each + (each * each + 2 * deeper * max(0.0, seconds)) ** 0.5)
            if fit < piece.tokens:
                return max(LEAST, int(total + fit))
            total += piece.tokens
            seconds -= self.prompts([piece]) - self.fixed
        return max(LEAST, int(total + seconds / self.token))

    def tokens_beside(self, answers: int, seconds: float, prompts: Iterable[Piece]) -> int:
        """The same, where the whole step takes so long, with its answers."""
        return self.tokens(seconds - self.kept * self.alone(answers), prompts)

    def began(self, answers: int, pieces: list[Piece]) -> None:
        """A step with these is computed from now on, or after those that began before it."""
        self._steps.append((self.clock(), answers, pieces))
        if answers:
            it = self._alone.setdefault(answers.bit_length(), _Alone())
            it.since = it.since + 1 if pieces else 0

    def ended(self) -> None:
        """The oldest of the steps is over."""
        if not self._steps:
            return
        began, answers, pieces = self._steps.popleft()
        now = self.clock()
        seconds, self._ended = now - max(began, self._ended), now
        tokens = sum(piece.tokens for piece in pieces)
        if answers and tokens <= _AS_ANSWERS:
            self._alone[answers.bit_length()].seconds.append(seconds)
        elif tokens >= LEAST:
            self._learn(seconds, self.alone(answers), pieces)

    def _learn(self, seconds: float, alone: float, pieces: list[Piece]) -> None:
        here, there = _weights(pieces)
        if self.token is None:
            self.token = max(QUICKEST, (seconds - self.kept * alone) / here)
            self._doubt = np.diag((_AT_FIRST * self._scale()) ** 2)
            return
        parts = np.array([alone, 1.0, here, there])
        numbers = np.array([self.kept, self.fixed, self.token, self.before])
        expected = float(parts @ numbers)
        wrong = min(seconds, _DISTURBED * expected) - expected
        # What is not measured becomes less certain with time, but never less than it was at first.
        size, drift = (_AT_FIRST * self._scale()) ** 2, (_DRIFT * self._scale()) ** 2
        doubt = self._doubt + np.diag(np.where(np.diag(self._doubt) < size, drift, 0.0))
        noise = (_NOISE * expected) ** 2
        held = np.zeros(4, dtype=bool)
        for _ in range(2):  # who would leave its bounds stays where it is, and the others take its part
            free = doubt * np.outer(~held, ~held)
            gain = free @ parts / (parts @ free @ parts + noise)
            moved = numbers + gain * wrong
            held = (moved < _LEAST) | (moved > _MOST)
            if not held.any():
                break
        self._doubt = free - np.outer(gain, parts @ free) + np.diag(np.diag(doubt - free))
        self.kept, self.fixed, self.token, self.before = map(float, np.clip(moved, _LEAST, _MOST))

    def _scale(self) -> Any:
        return np.array([1.0, LEAST * (self.token or 0.0) * self.tiles, self.token, self.token])


def _weights(pieces: Iterable[Piece]) -> tuple[float, float]:
    """How many tokens, and how many times `_BEFORE` tokens are before them, all added up."""
    here = there = 0.0
    for piece in pieces:
        here += piece.tokens
        there += piece.tokens * (piece.before + piece.tokens / 2) / _BEFORE
    return here, there
