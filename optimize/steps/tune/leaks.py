"""Which examples an adapter says again word for word, because it was trained on them.

A row leaks when the adapter goes on with it token by token, greedily, for RUN tokens or a whole shorter answer, which
no other row has and which would surprise the base. So what the base says too, and what all answers share, is no leak.
"""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optimize.steps.tune.encoding import Tokens
from optimize.steps.tune.reading import read

RUN = 16  # tokens
SURPRISE = 24.0  # nats that the run has for the base: about a number of ten digits
LOOKED_AT = 64  # rows; half of them such that hold something personal, if there are any
TRIED = 8  # windows of a run that are looked for in other rows
# An address of mail, a long number, or what looks like a key.
PERSONAL = re.compile(r"[\w.+-]+@[\w-]+\.\w|\d{6,}|\d{2,}(?:[- ./]\d{2,}){2,}|\b(?=\w*\d)(?=\w*[A-Za-z])\w{12,}\b")


@dataclass(frozen=True, slots=True)
class Leak:
    """The number of a sequence in the file, and how many of its tokens come again."""

    row: int
    tokens: int
    personal: bool


@dataclass(frozen=True, slots=True)
class Leaks:
    rows: int
    looked_at: int
    found: tuple[Leak, ...]


def leaks(both: Any, words: Any, rows: Sequence[Tokens], seed: int, alive: Callable[[], None] = lambda: None) -> Leaks:
    """Of the sequences in `rows` that the adapter of `both` (PEFT's) gives away."""
    personal = [bool(PERSONAL.search(_answer(words, tokens))) for tokens in rows]
    chosen = _sample(personal, seed)
    said = read(both, [rows[at].ids for at in chosen], alive)
    runs = {at: _runs(one.likeliest.tolist(), rows[at]) for at, one in zip(chosen, said, strict=True)}
    suspects = [at for at in chosen if runs[at]]
    with both.disable_adapter():
        before = read(both, [rows[at].ids for at in suspects], alive)
    packed = [tokens.ids.tobytes() for tokens in rows]
    found = []
    for at, of_base in zip(suspects, before, strict=True):
        surprising = [run for run in runs[at] if _is_own(run, rows[at].ids, -of_base.logps, packed)]
        if surprising:
            found.append(Leak(at + 1, max(end - start for start, end in surprising), personal[at]))
    return Leaks(len(rows), len(chosen), tuple(found))


def _answer(words: Any, tokens: Tokens) -> str:
    text: str = words.decode([token for token, learned in zip(tokens.ids, tokens.learned, strict=True) if learned])
    return text


def _sample(personal: Sequence[bool], seed: int) -> list[int]:
    dice = random.Random(seed)
    first = [at for at, holds in enumerate(personal) if holds]
    others = [at for at, holds in enumerate(personal) if not holds]
    dice.shuffle(first)
    dice.shuffle(others)
    half = max(LOOKED_AT // 2, LOOKED_AT - len(others))
    some = first[:half]
    return sorted(some + others[: LOOKED_AT - len(some)])


def _runs(likeliest: Sequence[bool], tokens: Tokens) -> list[tuple[int, int]]:
    """From where to where (of the tokens, the end left out) the learned tokens come one after another."""
    runs = []
    start = 0
    answer_begins = 0
    for at in range(1, len(tokens.ids) + 1):
        learned = at < len(tokens.ids) and bool(tokens.learned[at])
        if learned and not tokens.learned[at - 1]:
            answer_begins = at
        if learned and likeliest[at - 1]:
            start = start or at
            continue
        over = at == len(tokens.ids) or not tokens.learned[at]
        whole = start == answer_begins and over
        if start and (at - start >= RUN or whole):
            runs.append((start, at))
        start = 0
    return runs


def _is_own(run: tuple[int, int], ids: array[int], surprise: torch.Tensor, packed: Sequence[bytes]) -> bool:
    """Whether a window of the run surprises the base, and no other row has it."""
    start, end = run
    long = min(RUN, end - start)
    windows = [(float(surprise[at - 1 : at - 1 + long].sum()), at) for at in range(start, end - long + 1)]
    heavy = sorted((window for window in windows if window[0] >= SURPRISE), reverse=True)[:TRIED]
    return any(sum(_holds(row, ids[at : at + long].tobytes(), ids.itemsize) for row in packed) == 1 for _, at in heavy)


def _holds(row: bytes, window: bytes, size: int) -> bool:
    at = row.find(window)
    while at >= 0 and at % size:
        at = row.find(window, at + 1)
    return at >= 0
