"""Why `specialize_active_lora` is refused: vLLM's graphs count adapters, and its kernels rows without one besides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.utils import get_captured_lora_counts
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from serve.config import load
from serve.errors import ConfigError

SLOTS, NOBODY = 8, -1


def graph_of(adapters: int) -> int:
    """The case that vLLM replays for a batch with so many adapters."""
    cases = [0, *get_captured_lora_counts(SLOTS, True)]
    by_count, _ = CudaGraphManager._build_lora_dispatch_map(SimpleNamespace(lora_capture_cases=cases))
    return by_count[adapters]


def ids_of(rows: list[int]) -> list[int]:
    """What the kernels of a step have to look at, one after the other."""
    meta = LoRAKernelMeta.make(SLOTS, 16, "cpu", get_captured_lora_counts(SLOTS, True))
    meta.prepare_tensors(torch.tensor(rows))
    return meta.active_lora_ids.tolist()[: len(set(rows))]


@pytest.mark.parametrize("adapters", [1, 2, 4, 8])
def test_beside_requests_of_the_base_the_graph_is_too_small_by_one(adapters):
    """Where this fails, vLLM has mended it, and the option may be taken."""
    slots = list(range(adapters))
    assert ids_of(slots) == slots and graph_of(adapters) == adapters, "alone they fit"
    mixed = ids_of([NOBODY, *slots])
    assert mixed[graph_of(adapters) :] == [slots[-1]], "nobody computes the last adapter's rows"


def test_so_the_option_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="specialize-active-lora is not taken: with it vLLM answers an adapter's"):
        load(["--specialize-active-lora"], {})
