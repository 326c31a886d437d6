"""What `ps` and `top` show: `loradock: engine smollm2`, `loradock: worker smollm2 TP0`, `loradock: fork server`."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import setproctitle

# The base model of the engine whose processes are started.
ENGINE = "LORADOCK_ENGINE"
# vLLM's: the prefix of the title of a process that loads no plugins.
PREFIX = "VLLM_PROCESS_NAME_PREFIX"
KINDS = {"EngineCore": "engine", "DPCoordinator": "coordinator", "Worker": "worker"}


_renaming: list[ModuleType] = []


def find() -> None:
    """Look for the modules that name processes. A process that was forked meanwhile has them without a look at all."""
    _renaming[:] = [
        module
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("vllm.") and "set_process_title" in vars(module)
    ]


def install() -> None:
    """Name this process of vLLM's our way, and those that it renames later."""
    if not _renaming:
        find()
    for module in _renaming:
        vars(module)["set_process_title"] = show
    _, separator, name = setproctitle.getproctitle().partition("::")
    if separator:
        show(name.rstrip("\0"))


def show(name: str, suffix: str = "", prefix: str = "") -> None:
    """Takes the place of vLLM's `set_process_title`; `name` is EngineCore, EngineCore_DP1, Worker_TP0 and the like."""
    kind, _, rank = name.partition("_")
    words = [KINDS.get(kind, kind), os.environ.get(ENGINE, ""), rank.replace("_", " "), suffix]
    setproctitle.setproctitle("loradock: " + " ".join(word for word in words if word))
