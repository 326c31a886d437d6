"""What this server prefers to vLLM's defaults where a GPU computes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from serve.config import Base
from serve.models import cuda_toolkit
from serve.models.cuda_toolkit import Toolkit

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


def _in_blocks_of_fp8(model: str) -> bool:
    """A checkpoint in the directory `model` whose weights have a scale for each block of FP8 numbers."""
    try:
        quantization = json.loads((Path(model) / "config.json").read_text()).get("quantization_config") or {}
    except (OSError, ValueError):
        return False
    groups = (quantization.get("config_groups") or {}).values()
    blocks = any((group.get("weights") or {}).get("strategy") == "block" for group in groups)
    return blocks or bool(quantization.get("weight_block_size"))
