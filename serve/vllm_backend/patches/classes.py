"""Subclasses of vLLM's scheduler and model runner, with our methods over vLLM's.

vLLM asks its configuration for the class of its scheduler, and a worker makes its model runner: those two functions are
replaced, and the classes themselves are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.vllm_backend.patches.functions import bound, resolved
from serve.vllm_backend.patches.patch import Function

SCHEDULER, RUNNER = "scheduler", "runner"

# By hook, in the order in which they were applied.
_methods: dict[str, list[Function]] = {SCHEDULER: [], RUNNER: []}


def extend(function: Function) -> None:
    """Have this method of ours in the subclasses that are made from now on."""
    if function not in _methods[function.via]:
        _methods[function.via].append(function)


def subclass(kind: type, hook: str) -> type:
    """A subclass with those of our methods that are for it; the class itself where there are none."""
    for function in _methods[hook]:
        module, _, path = function.place.partition(":")
        owner, _, name = path.rpartition(".")
        if not issubclass(kind, resolved(f"{module}:{owner}")):
            continue  # vLLM's second model runner
        method = bound(function.replacement, getattr(kind, name))
        kind = type(kind.__name__, (kind,), {name: method, "__module__": kind.__module__, "__doc__": kind.__doc__})
    return kind


def get_scheduler_cls(original: Callable[..., type], config: Any) -> type:
    return subclass(original(config), SCHEDULER)


def init_device(original: Callable[..., None], worker: Any) -> None:
    original(worker)
    worker.model_runner.__class__ = subclass(type(worker.model_runner), RUNNER)
