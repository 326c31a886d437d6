"""Whether GPUs have room for one more engine, asked of their driver: no process begins to compute on one for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serve.errors import ConfigError
from serve.models import gpus
from serve.models.hardware import gib


def check(args: Any) -> None:
    """ConfigError where an engine with these arguments would find too little memory when it starts.

    vLLM wants `gpu_memory_utilization` of each of its GPUs to be free, whatever it will use of it. Of GPUs on other
    nodes nothing is known, nor where the driver is not NVIDIA's.
    """
    cards = gpus.cards()
    for number in numbers(args):
        if number >= len(cards):
            return
        card = cards[number]
        wanted = math.ceil(card.total * args.gpu_memory_utilization)
        if card.free < wanted:
            raise ConfigError(
                f"an engine takes {gib(wanted)} of GPU {number} (gpu_memory_utilization="
                f"{args.gpu_memory_utilization:g}), and {gib(card.free)} of its {gib(card.total)} are free: lower "
                "gpu_memory_utilization, so that two fit"
            )


def numbers(args: Any) -> Sequence[int]:
    """The GPUs of this machine that an engine with these arguments takes: the first that are visible, or its own.

    Which those are that it names by their UUIDs is not known.
    """
    if args.device_ids:
        return [number for number in args.device_ids if isinstance(number, int)]
    ranks = args.data_parallel_size if args.data_parallel_size_local is None else args.data_parallel_size_local
    return range(args.tensor_parallel_size * args.pipeline_parallel_size * max(ranks, 1))
