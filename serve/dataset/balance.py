"""Which examples are taken where some days, topics or askers have many more than others."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from serve.dataset.examples import Example

# Strata, one after the other: no topic, no day and no asker keeps more than `balance` times its even share of what the
# ones before left.
STRATA: tuple[Callable[[Example], Hashable], ...] = (
    lambda example: example.topic,
    lambda example: example.day,
    lambda example: example.asker,
)


def lot(seed: int, name: str) -> float:
    """A number from 0 to 1, by chance, and always the same one."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def balanced(examples: Sequence[Example], balance: float, seed: int) -> list[Example]:
    """Those that are taken, by lot where a stratum has too many."""
    taken = list(examples)
    for stratum in STRATA:
        taken = _capped(taken, stratum, balance, seed)
    return taken


def most(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """So many of them by lot, topics in turn: a rare topic loses none before the others have no more than it."""
    topics: dict[str, list[Example]] = defaultdict(list)
    for example in _drawn(examples, seed):
        topics[example.topic].append(example)
    ranked = sorted(
        (rank, lot(seed, topic), example.id) for topic, some in topics.items() for rank, example in enumerate(some)
    )
    chosen = {id for _, _, id in ranked[:count]}
    return [example for example in examples if example.id in chosen]


def _capped(
    examples: Sequence[Example], stratum: Callable[[Example], Hashable], balance: float, seed: int
) -> list[Example]:
    strata: dict[Hashable, list[Example]] = defaultdict(list)
    for example in _drawn(examples, seed):
        strata[stratum(example)].append(example)
    cap = max(1, int(balance * len(examples) / max(1, len(strata))))
    chosen = {example.id for some in strata.values() for example in some[:cap]}
    return [example for example in examples if example.id in chosen]


def _drawn(examples: Sequence[Example], seed: int) -> list[Example]:
    return sorted(examples, key=lambda example: (lot(seed, example.id), example.id))
