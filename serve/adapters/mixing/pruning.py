"""TIES and DARE: updates are pruned entry by entry before they are summed, as `loradock optimize` combines adapters.

What is left of an update is of no low rank: to be exact it takes the whole rank of its matrix. So there is such a
mixture where the engine takes that rank, and elsewhere a sentence that names it.

TIES: Yadav et al., 2306.01708; DARE: Yu et al., 2311.03099; both as in PEFT's `merge_utils`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.errors import AdapterRejected

CAT = "cat"
METHODS = (CAT, "ties", "dare_linear", "dare_ties")

Floats = Any  # an array of 32 bits


@dataclass(frozen=True, slots=True)
class Pruning:
    """`density` of the entries stay. What DARE drops is drawn by `digests`, one of each part: the same adapters are
    always mixed alike."""

    method: str
    density: float
    digests: tuple[str, ...]
    max_rank: int

    def rank(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Of the mixture of modules of these shapes; AdapterRejected, if the engine takes no such rank."""
        rank = max(map(min, shapes))
        if rank > self.max_rank:
            raise AdapterRejected(
                f"{self.method} leaves updates of rank {rank}, and this engine takes up to {self.max_rank}: a "
                f"max_lora_rank of {rank} would be needed. `loradock optimize` combines adapters by {self.method} to a "
                f"smaller rank, and says how far that is off; {CAT} is the exact sum"
            )
        return rank

    def merged(self, module: str, updates: Sequence[tuple[int, float, Floats]]) -> Floats:
        """The mixture's update of one module, of (part, weight, update) of those that have it."""
        dares = self.method != "ties"
        kept = [self._dropped(module, part, each) if dares else self._largest(each) for part, _, each in updates]
        weighted = [np.float32(weight) * each for (_, weight, _), each in zip(updates, kept, strict=True)]
        if self.method == "dare_linear":
            return sum(weighted)
        sign = np.where(sum(kept) >= 0, 1, -1)
        agrees = [np.sign(each) == sign for each in kept]
        total = sum(each * mask for each, mask in zip(weighted, agrees, strict=True))
        return (total / np.maximum(sum(mask.astype("<f4") for mask in agrees), 1)).astype("<f4")

    def _largest(self, update: Floats) -> Floats:
        flat = update.ravel()
        count = int(self.density * flat.size)
        kept = np.zeros_like(flat)
        places = np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :] if count else []
        kept[places] = flat[places]
        return kept.reshape(update.shape)

    def _dropped(self, module: str, part: int, update: Floats) -> Floats:
        key = hashlib.sha256(f"{self.digests[part]} {self.density!r} {module}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(key, "big")))
        return (update * (rng.random(update.shape) < self.density) / self.density).astype("<f4")


def factors(update: Floats, rank: int) -> tuple[Floats, Floats]:
    """(lora_A, lora_B) of at least the update's full rank whose product it is, to the bit."""
    out, into = update.shape
    a, b = np.zeros((rank, into), "<f4"), np.zeros((out, rank), "<f4")
    if out <= into:
        a[:out], b[:, :out] = update, np.eye(out)
    else:
        a[:into], b[:, :into] = np.eye(into), update
    return a, b
