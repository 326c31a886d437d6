"""Homes by rendezvous hashing. Pure functions: whoever sees the same replicas names the same homes.

Each replica draws a number for each name, and the highest draws are the name's homes. When a replica leaves, only the
names that it was home to move; one that joins takes its part of each other's. A draw is weighted by the adapters that a
replica holds at a time (Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", 2005), so that a replica with
twice the slots is home to twice the names. One that cannot hold an adapter of that rank draws nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A replica takes requests as a home while it has less to do than so many times the mean, and as one that holds the
# adapter.
CROWDED, FULL = 1.125, 1.5
# A home carries at most this part of what a replica carries in the mean, for one name.
NAME_PORTION = 0.5
# What is above a whole number of homes by less is noise.
SLACK = 0.1
_DRAWN_BITS = 53


@dataclass(frozen=True, slots=True)
class Replica:
    """What does not change while it lives. It holds `slots` adapters, of ranks up to `max_rank` (0: any)."""

    id: str
    slots: int = 1
    max_rank: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """Replicas in the order of their ids, and what each draws with."""

    members: tuple[Replica, ...]
    seeds: NDArray[np.uint64]
    slots: NDArray[np.float64]
    max_ranks: NDArray[np.int64]

    @staticmethod
    def of(members: Iterable[Replica]) -> Replicas:
        ordered = tuple(sorted(members, key=lambda member: member.id))
        return Replicas(
            ordered,
            np.array([number(member.id) for member in ordered], np.uint64),
            np.array([max(member.slots, 0) for member in ordered], np.float64),
            np.array([member.max_rank or np.iinfo(np.int64).max for member in ordered], np.int64),
        )

    def __len__(self) -> int:
        return len(self.members)


def number(text: str) -> int:
    """64 bits that stand for a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def mark(name: str) -> int:
    """A name in 32 bits: of two that share one, a request goes to somebody who has to load it."""
    return number(name) & 0xFFFFFFFF


def order(replicas: Replicas, name: str, rank: int = 0) -> list[int]:
    """Places in `replicas.members`, the first home first; those that cannot hold an adapter of this rank are left out.

    If none can, all of them: a request needs somebody to refuse it.
    """
    draws = _mixed(replicas.seeds ^ np.uint64(number(name)))
    uniform = ((draws >> np.uint64(64 - _DRAWN_BITS)).astype(np.float64) + 0.5) / (1 << _DRAWN_BITS)
    able = (replicas.max_ranks >= rank) & (replicas.slots > 0)
    if not able.any():
        return np.argsort(-np.log(uniform), kind="stable").tolist()
    # The least of -ln(u) / slots is the greatest of the weighted draws.
    scores = np.where(able, -np.log(uniform) / np.maximum(replicas.slots, 1.0), np.inf)
    return np.argsort(scores, kind="stable")[: int(able.sum())].tolist()


def homes_for(share: float, replicas: int, load: float, seats: float) -> int:
    """How many homes a name needs, by its share of all requests.

    `load` are the requests that all replicas together work on; while half of a replica's `seats` are enough for the
    name it has one home.
    """
    by_share = math.ceil(share * replicas / NAME_PORTION - SLACK)
    by_load = math.ceil(share * load / max(seats / 2, 1.0) - SLACK)
    return max(1, min(by_share, by_load, replicas))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Requests that a replica may work on: as a home beside others (`crowded`), and at all before another one loads an
    adapter for it (`full`)."""

    crowded: float
    full: float


def bounds(load: float, replicas: int, seats: float) -> Bounds:
    """By what all replicas together have to do, and the `seats` that one has: while most of those are free, an answer
    more costs the others little."""
    mean = load / max(replicas, 1)
    return Bounds(max(CROWDED * mean, seats / 4), max(FULL * mean, seats / 2))


def ranked(
    homes: Sequence[int], holders: Collection[int], loads: Sequence[float], most: Bounds, everyone: Sequence[int]
) -> list[Sequence[int]]:
    """Whom to send a request to: homes that are not crowded, whoever holds the adapter and is not full, then all."""
    free = [place for place in homes if loads[place] < most.crowded]
    holding = [place for place in {*homes, *holders} if loads[place] < most.full]
    return [rank for rank in (free, holding, everyone) if rank]


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): one bit of input changes half of the output's."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
