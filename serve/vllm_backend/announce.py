"""What a person is told of an engine's start: what is loaded, where, how much KV cache, and what degraded."""

from __future__ import annotations

import logging
import os
from typing import Any

from serve.models import hardware
from serve.vllm_backend.notices import notices

log = logging.getLogger(__name__)

TCMALLOC = "tcmalloc is not installed: vLLM recommends it on a CPU (apt install libtcmalloc-minimal4)"


def loading(name: str, model: str, args: Any, version: str) -> None:
    """Before an engine is built."""
    log.info("loading %s (%s) on %s with vLLM %s", name, model, _devices(args), version)
    if hardware.on_cpu() and "malloc" not in os.environ.get("LD_PRELOAD", "") and TCMALLOC not in notices.messages:
        log.warning(TCMALLOC)


def loaded(name: str, vllm_config: Any, slots: int, warned: list[str]) -> None:
    """After it has started; `warned` is what its processes warned of."""
    tokens, most = vllm_config.cache_config.kv_cache_size_tokens, vllm_config.model_config.max_model_len
    if tokens:
        log.info(
            "%s: KV cache for %s tokens (%.1f requests of %s), %d adapters in a batch",
            name, f"{tokens:,}", tokens / most, f"{most:,}", slots,
        )  # fmt: skip
    for message in dict.fromkeys(warned):
        if message not in notices.messages:
            log.warning("%s: %s", name, message)


def _devices(args: Any) -> str:
    count = args.tensor_parallel_size * args.pipeline_parallel_size * (args.data_parallel_size or 1)
    if hardware.on_cpu():
        cores = len(hardware.CORES)  # this thread may have left one
        return f"{cores} CPU core{'s' if cores > 1 else ''}"
    return f"{count} GPU{'s' if count > 1 else ''}"
