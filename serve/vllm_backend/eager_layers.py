"""vLLM's layers as they are where something of ours follows them: run one by one, each row with its adapter's slot."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CompilationMode, CUDAGraphMode


def is_eager(config: Any) -> bool:
    """Whether layers run as they are, neither compiled nor recorded. `config` is vLLM's."""
    compilation = config.compilation_config
    compiled = compilation.mode not in (None, CompilationMode.NONE)
    recorded = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    return bool(config.model_config.enforce_eager) or not (compiled or recorded)


def slots_of(punica: Any, rows: int) -> torch.Tensor:
    """The slot of each of a step's rows; -1 for one without an adapter, as what pads a batch."""
    slots = punica.token_lora_indices[:rows]
    return torch.nn.functional.pad(slots, (0, rows - slots.shape[0]), value=-1)
