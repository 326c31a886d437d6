"""What a model and its adapters take of GPUs, whether it fits, and how it is started: from its dimensions alone.

vLLM's own arithmetic, but for what it measures on the card when it starts: of activations, graphs and CUDA's context
these are estimates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from serve.errors import ConfigError
from serve.models import engine_memory
from serve.models.dimensions import Dimensions
from serve.models.gpu_share import WHOLE
from serve.models.gpus import Card
from serve.models.hardware import GIB
from serve.models.lora_modules import EMBEDDINGS

# As CUDA reports their memory, rounded down; compute capability.
CARDS: Mapping[str, Card] = MappingProxyType(
    {
        name: Card(title, int(size * GIB), int(size * GIB), capability)
        for name, title, size, capability in (
            ("t4", "NVIDIA T4", 14.5, (7, 5)),
            ("a10", "NVIDIA A10", 22.0, (8, 6)),
            ("l4", "NVIDIA L4", 22.0, (8, 9)),
            ("l40s", "NVIDIA L40S", 44.3, (8, 9)),
            ("a100-40", "NVIDIA A100 40GB", 39.3, (8, 0)),
            ("a100-80", "NVIDIA A100 80GB", 79.1, (8, 0)),
            ("h100", "NVIDIA H100 80GB", 79.1, (9, 0)),
            ("h200", "NVIDIA H200", 139.8, (9, 0)),
            ("b200", "NVIDIA B200", 178.3, (10, 0)),
        )
    }
)
MOST_GPUS = 8
# Without room for that much context nobody wants to serve.
LEAST_CONTEXT = 4096
# The context of the streams that are counted.
STREAM = 8192
BLOCK = 16  # tokens of context that vLLM gives out at a time
# Beside tensors: CUDA's context, NCCL's buffers where there are several, graphs.
CONTEXT = int(0.6 * GIB)
NCCL = int(0.5 * GIB)
GRAPHS = int(0.5 * GIB)
# A part of what the weights leave free that slots may take by default, and how many there are then.
SLOTS_PART = 1 / 6
SLOTS = (32, 16)
FEW_SLOTS = 8


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """Bytes on each of `gpus` cards; `adapter` and `host` are of the host's memory."""

    card: Card
    gpus: int
    weights: int
    slots: int
    max_loras: int
    activations: int
    kv_token: int
    kv_cache: int
    adapter: int
    host: int
    context: int

    @property
    def tokens(self) -> int:
        """Of context that the KV cache holds, all requests together."""
        return max(self.kv_cache, 0) // (BLOCK * self.kv_token) * BLOCK

    @property
    def fits(self) -> bool:
        return self.tokens >= min(LEAST_CONTEXT, self.context)

    @property
    def streams(self) -> int:
        """Of 8,192 tokens each, at once."""
        return self.tokens // STREAM

    @property
    def total(self) -> int:
        return self.weights + self.slots + self.activations + max(self.kv_cache, 0)

    @property
    def max_model_len(self) -> int | None:
        """What a request's context is to be bounded by, if the KV cache holds none of the model's own length."""
        return self.tokens // 1024 * 1024 if self.tokens < self.context else None

    @property
    def swaps_beside(self) -> bool:
        """A second engine fits beside it, each with half of the card."""
        half = int(WHOLE / 2 * self.card.total) - self.weights - self.slots - self.activations
        return half >= LEAST_CONTEXT * self.kv_token


def parse(named: str) -> tuple[Card, int]:
    """`h100`, `2xh100`: the card, and how many."""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9-]+)", named.strip().lower())
    name = match[2] if match else ""
    if match is None or name not in CARDS or not 0 < int(match[1] or 1) <= MOST_GPUS:
        raise ConfigError(f"--gpu takes one of {', '.join(CARDS)}, or up to {MOST_GPUS} as 2xh100, not {named!r}")
    return CARDS[name], int(match[1] or 1)


def plan(
    model: str,
    dimensions: Dimensions,
    card: Card,
    gpus: int,
    *,
    rank: int,
    max_loras: int | None = None,
    max_cpu_loras: int = 32,
    kv_cache: int | None = None,
    part: float = WHOLE,
) -> GpuPlan:
    """The sizes on each of `gpus` cards; a checkpoint's files are counted as they are, where `model` is a directory."""
    if dimensions.heads % gpus:
        raise ConfigError(f"{model} has {dimensions.heads} heads of attention, which {gpus} GPUs do not divide")
    weights = -(-engine_memory.weights(Path(model)) // gpus) or dimensions.weights(gpus)
    activations = activation_bytes(dimensions, card, gpus)
    slot = dimensions.slot(rank, gpus, tables=dimensions.architecture in EMBEDDINGS)
    budget = int(part * card.total)
    loras = max_loras or default_slots(budget - weights - activations, slot)
    return GpuPlan(
        card=card,
        gpus=gpus,
        weights=weights,
        slots=loras * slot,
        max_loras=loras,
        activations=activations,
        kv_token=dimensions.kv_token(gpus),
        kv_cache=budget - weights - activations - loras * slot if kv_cache is None else kv_cache,
        adapter=dimensions.adapter(rank),
        host=max(max_cpu_loras, loras) * dimensions.adapter(rank),
        context=dimensions.context,
    )


def default_slots(left: int, slot: int) -> int:
    """How many adapters a batch may have by default: more where memory allows, since one that waits for a slot costs a
    copy of all its matrices and a step of everybody's."""
    return next((count for count in SLOTS if count * slot <= SLOTS_PART * left), FEW_SLOTS)


def activation_bytes(dimensions: Dimensions, card: Card, gpus: int) -> int:
    """An estimate of what a full batch needs beside weights: hidden states, an MLP's, the logits of each sequence."""
    tokens, sequences = batch(card)
    inner = dimensions.intermediate // gpus * (2 if dimensions.experts else 1)
    states = tokens * (4 * dimensions.hidden + 3 * inner) * dimensions.width
    logits = sequences * dimensions.vocabulary_padded * 4 * 2
    return states + logits + CONTEXT + GRAPHS + (NCCL if gpus > 1 else 0)


def batch(card: Card) -> tuple[int, int]:
    """(tokens, sequences) of a step at most, as vLLM chooses them for a server on such a card."""
    if card.total >= 160 * GIB:
        return 16_384, 1024
    return (8192, 1024) if card.total >= 70 * GIB and "a100" not in card.name.lower() else (2048, 256)


def smallest(model: str, dimensions: Dimensions, card: Card, **options: int | None) -> int | None:
    """The least number of such cards that it fits on; None where eight are too few."""
    for gpus in (1, 2, 4, MOST_GPUS):
        if dimensions.heads % gpus == 0 and plan(model, dimensions, card, gpus, **options).fits:  # type: ignore[arg-type]
            return gpus
    return None
