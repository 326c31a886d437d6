"""The adapters of a step, on any device: those in a slot already are found without a look at all that are in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def apply_adapters(original: Callable[..., None], worker: Any, requests: set[Any]) -> None:
    """Have these adapters in their slots.

    In all but a few steps they are there: then they are as recently used, no more. Where some are not, these are
    marked first, so that no adapter of this step is pushed out for another one of it.
    """
    manager = worker._adapter_manager
    known, active = manager._registered_adapters, manager._active_adapters
    wanted = [request for request in requests if request]
    if len({request.lora_int_id for request in wanted}) > manager.lora_slots:
        original(worker, requests)  # its error
        return
    missing = set()
    for request in wanted:
        number = request.lora_int_id
        if request.load_inplace or number not in known or number not in active:
            missing.add(request)
        else:
            known.touch(number)
            active.touch(number)
    if missing:
        original(worker, missing)
