"""vLLM's LoRA operations on a CPU, with our kernels where a layer is of a kind they know, and vLLM's own elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA, ClassificationHeadWithLoRA, LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from serve.cpu_kernels import pages
from serve.cpu_kernels.build import library
from serve.cpu_kernels.operators import Layer, Plan, load, lora_embedding, lora_linear, takes

log = logging.getLogger("loradock")


class Punica(PunicaWrapperCPU):
    """One step's tokens and their adapters. Layers that our kernels know hold a `LayerPunica` over it instead."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.tokens = Plan()
        self.samples = Plan()

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.tokens.set(self.token_lora_indices, max_loras)
        self.samples.set(self.sampler_indices, max_loras)


class LayerPunica:
    """What one layer calls: the kernels with this layer's number. Everything else is the shared object's."""

    def __init__(self, shared: Punica, layer: Layer) -> None:
        self.shared = shared
        self.layer = layer
        self.number = layer.number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shared, name)

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *others: Any, **kwargs: Any) -> None:
        lora_linear(y, x, self.number)

    def add_lora_embedding(self, y: torch.Tensor, x: torch.Tensor, *others: Any, **kwargs: Any) -> None:
        lora_embedding(y, x, self.number)

    def add_lora_logits(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """Outside of the compiled graph: here, what to do may depend on what is there."""
        if not self.layer.touched():
            return
        rows = self.shared.sampler_indices.shape[0]
        if y.dtype == x.dtype == b.dtype and rows == y.shape[0] == x.shape[0]:
            lora_linear(y, x, self.number)
        else:
            self.shared.add_lora_logits(y, x, a, b, scale)


def _adopt(manager: LoRAModelManager) -> None:
    """Give every layer of a kind that we know its own view of its punica wrapper."""
    manager.loradock_layers = known = []
    unknown = set()
    for module in dict.fromkeys(manager.modules.values()):  # in order: the numbers are part of the compiled graph
        shared = getattr(module, "punica_wrapper", None)
        # Its rows are requests, and vLLM tells it theirs by the wrapper that they share.
        if not isinstance(shared, Punica) or isinstance(module, ClassificationHeadWithLoRA):
            continue
        layer = _layer(module, shared)
        if layer is None:
            unknown.add(type(module).__name__)
            continue
        known.append(layer)
        module.set_mapping(LayerPunica(shared, layer))
        for zeros in (*layer.a, *layer.b):
            pages.drop(zeros)
        module.loradock_zeros = frozenset(range(len(layer.b[0])))  # slots
    if unknown:
        log.warning("vLLM's own LoRA path serves %s, and torch.compile is off", ", ".join(sorted(unknown)))
        for module in manager.model.modules():
            if hasattr(module, "do_not_compile"):
                module.do_not_compile = True


def _layer(module: BaseLayerWithLoRA, shared: Punica) -> Layer | None:
    a: Any = getattr(module, "lora_a_stacked", None)
    b: Any = getattr(module, "lora_b_stacked", None)
    if isinstance(module, BaseLinearLayerWithLoRA):
        if not (isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == len(module.output_slices)):
            return None
        packed = library() is not None and not module.lora_config.fully_sharded_loras
        return _checked(shared.tokens, a, b, tuple(module.output_slices), packed=packed)
    if isinstance(module, VocabParallelEmbeddingWithLoRA):
        return _checked(shared.tokens, (a,), (b,), (b.shape[-2],), looked_up=True)
    if isinstance(module, LogitsProcessorWithLoRA):
        return _checked(shared.samples, (a,), (b,), (b.shape[-2],))
    return None


def _checked(plan: Plan, a: Any, b: Any, sizes: tuple[int, ...], **kwargs: Any) -> Layer | None:
    tensors = (*a, *b)
    if not takes(b[0].dtype) or any(t.dtype != b[0].dtype or not t.is_contiguous() for t in tensors):
        return None
    if any(stacked.shape[-2] != size for stacked, size in zip(b, sizes, strict=True)):
        return None
    return Layer(plan, a, b, sizes, **kwargs)


def create_lora_modules(original: Callable[..., None], manager: Any) -> None:
    original(manager)
    _adopt(manager)


def activate_adapter(original: Callable[..., bool], manager: Any, lora_id: int) -> bool:
    adapter = manager._registered_adapters[lora_id]
    read = getattr(manager, "loradock_read", {}).get(lora_id)
    if read is not None and not adapter.loras and lora_id not in manager._active_adapters:
        adapter.loras = read().loras
    changed = original(manager, lora_id)
    if changed and manager.loradock_layers:
        slot = manager.lora_index_to_id.index(lora_id)
        load(manager.loradock_layers, slot)
        for layer in manager.loradock_layers:
            for stacked in layer.unread(slot):
                pages.drop(stacked)
        if manager.capacity <= manager.lora_slots and read is not None:
            adapter.loras = {}  # it keeps its slot for as long as it is in memory
    return changed
