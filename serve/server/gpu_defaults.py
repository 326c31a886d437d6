"""What this server prefers to vLLM's defaults where a GPU computes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serve.config import ADAPTERS, Base, kv_cache, whole
from serve.errors import ConfigError
from serve.models import cuda_toolkit, engine_memory, gpu_plan, gpu_share, gpus
from serve.models.cuda_toolkit import Toolkit
from serve.models.dimensions import dimensions
from serve.models.gpu_plan import GpuPlan
from serve.models.gpu_share import Wanted
from serve.models.gpus import Card

log = logging.getLogger("loradock")


def set_environment(bases: Iterable[Base], toolkit: Toolkit | None = None) -> None:
    """The variables that engines on a GPU need and nobody has set; a line for what vLLM has to do without."""
    toolkit = toolkit or Toolkit()
    # vLLM forks its engine unless its own command line started it; this process has threads and sockets by then, and
    # CUDA does not survive a fork.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if said := cuda_toolkit.notice(toolkit, any(_in_blocks_of_fp8(base.model) for base in bases)):
        log.warning("%s", said)
    os.environ.update(cuda_toolkit.environment(toolkit))


def with_room(bases: Sequence[Base], cards: Sequence[Card] | None = None) -> list[Base]:
    """The bases, each with the part of its GPUs that it takes where it shares one; ConfigError where they don't fit."""
    cards = gpus.cards() if cards is None else cards
    bases = [_with_slots(base, cards, len(bases)) for base in bases]
    parts = gpu_share.shares([_wanted(base) for base in bases], cards)
    return [
        base
        if part is None or "gpu_memory_utilization" in base.engine
        else replace(base, engine=MappingProxyType({**base.engine, "gpu_memory_utilization": part}))
        for base, part in zip(bases, parts, strict=True)
    ]


def planned(base: Base, cards: Sequence[Card], part: float = gpu_share.WHOLE) -> GpuPlan | None:
    """What an engine takes of its GPUs; None where they, or the model's dimensions, are not known."""
    engine = {**ADAPTERS, **base.engine}
    numbers = devices(engine)
    if not numbers or not 0 <= numbers[0] < len(cards):
        return None
    parts = whole(engine, "tensor_parallel_size") * whole(engine, "pipeline_parallel_size")
    try:
        return gpu_plan.plan(
            base.model,
            dimensions(base.model),
            cards[numbers[0]],
            parts,
            rank=whole(engine, "max_lora_rank"),
            max_loras=whole(base.engine, "max_loras") if "max_loras" in base.engine else None,
            max_cpu_loras=whole(engine, "max_cpu_loras"),
            kv_cache=kv_cache(engine) // whole(engine, "data_parallel_size") or None,
            part=_part(engine) or part,
        )
    except ConfigError:
        return None


def _with_slots(base: Base, cards: Sequence[Card], engines: int) -> Base:
    """With as many slots of adapters as the memory is good for, where nobody has said how many."""
    if "max_loras" in base.engine:
        return base
    plan = planned(base, cards, gpu_share.WHOLE / engines)
    if plan is None or plan.max_loras == ADAPTERS["max_loras"]:
        return base
    return replace(base, engine=MappingProxyType({**base.engine, "max_loras": plan.max_loras}))


def devices(engine: Mapping[str, Any]) -> tuple[int, ...]:
    """The GPUs of this machine that an engine takes, by number: the first that are visible, or its `device_ids`."""
    named = engine.get("device_ids")
    names = named.split(",") if isinstance(named, str) else named if isinstance(named, list) else []
    if names and all(str(name).strip().isdigit() for name in names):
        return tuple(int(name) for name in names)
    # By UUIDs they are some of this machine's, and which is not known here: they count as shared by nobody.
    first = -1_000_000 if names else 0
    ranks = whole(engine, "data_parallel_size_local" if "data_parallel_size_local" in engine else "data_parallel_size")
    size = whole(engine, "tensor_parallel_size") * whole(engine, "pipeline_parallel_size") * ranks
    return tuple(range(first, first + size))


def _wanted(base: Base) -> Wanted:
    """What an engine takes of each of its GPUs, as its checkpoint's files say."""
    engine = {**ADAPTERS, **base.engine}
    parallel = whole(engine, "tensor_parallel_size") * whole(engine, "pipeline_parallel_size")
    folder = Path(base.model)
    weights = engine_memory.weights(folder)
    slots = engine_memory.slots(folder, whole(engine, "max_loras"), whole(engine, "max_lora_rank"))
    ranks = whole(engine, "data_parallel_size")
    return Wanted(
        base.name,
        () if engine.get("distributed_executor_backend") == "ray" else devices(engine),
        fixed=(weights + slots) // parallel if weights else 0,
        kv_cache=kv_cache(engine) // ranks,
        part=_part(engine),
    )


def _part(engine: Mapping[str, Any]) -> float | None:
    value = engine.get("gpu_memory_utilization")
    if value is None:
        return None
    try:
        part = float(value)
    except (TypeError, ValueError):
        part = 0.0
    if not 0 < part <= 1:
        raise ConfigError(f"gpu_memory_utilization takes a number above 0 up to 1, not {value!r}")
    return part


def _in_blocks_of_fp8(model: str) -> bool:
    """A checkpoint in the directory `model` whose weights have a scale for each block of FP8 numbers."""
    try:
        quantization = json.loads((Path(model) / "config.json").read_text()).get("quantization_config") or {}
    except (OSError, ValueError):
        return False
    groups = (quantization.get("config_groups") or {}).values()
    blocks = any((group.get("weights") or {}).get("strategy") == "block" for group in groups)
    return blocks or bool(quantization.get("weight_block_size"))
