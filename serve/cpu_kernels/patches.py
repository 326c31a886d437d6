"""What loradock replaces in vLLM: tables of single functions, all checked before one of them is changed.

A replacement is a function of ours that gets what it replaces as its first argument: vLLM's own, or the replacement of
another table. vLLM may move: a function that is gone, or that takes other arguments than it did when the patch was
written, ends the start with a sentence that names it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any


class PatchError(RuntimeError):
    """Which patches do not fit the installed vLLM, and why."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One function of vLLM's and what takes its place."""

    owner: str  # "module:Class", or "module" for a function
    name: str
    parameters: str  # the names of its arguments, by which it is recognized
    replacement: str  # "module:function"
    why: str
    checked: str = "0.32.0"  # the version of vLLM whose source this was written for
    copies: str = ""  # the package whose modules have imported the function by its name

    def __str__(self) -> str:
        return f"{self.owner.partition(':')[2] or self.owner}.{self.name}"

    def misfit(self) -> str | None:
        """Why it cannot be applied, in words."""
        try:
            function = _bare(self._stock())
        except (ImportError, AttributeError):
            return f"{self} is gone"
        taken = " ".join(inspect.signature(_layers(function)[-1]).parameters)
        return None if taken == self.parameters else f"{self} takes ({taken}) and not ({self.parameters})"

    def apply(self) -> None:
        """Put the replacement in place, once."""
        stock = self._stock()
        original = _bare(stock)
        replacement = _resolved(self.replacement)
        if any(replacement in _wrapped(layer) for layer in _layers(original)):
            return
        replaced: Any = _bound(replacement, original)
        if isinstance(stock, (staticmethod, classmethod)):
            replaced = type(stock)(replaced)
        setattr(_resolved(self.owner), self.name, replaced)
        for name, module in list(sys.modules.items()) if self.copies else ():
            if name.startswith(self.copies) and vars(module).get(self.name) is original:
                setattr(module, self.name, replaced)

    def _stock(self) -> Any:
        return inspect.getattr_static(_resolved(self.owner), self.name)


def apply(patches: Sequence[Patch]) -> None:
    """Apply all of them, or none and PatchError."""
    misfits = [(patch, misfit) for patch in patches if (misfit := patch.misfit())]
    if misfits:
        from vllm.version import __version__

        checked = " and ".join(sorted({patch.checked for patch, _ in misfits}))
        raise PatchError(
            f"loradock changes vLLM {__version__} in ways that were checked against {checked} and no longer fit: "
            f"{'; '.join(misfit for _, misfit in misfits)}. Install the vLLM that loradock pins"
        )
    for patch in patches:
        patch.apply()


def _resolved(place: str) -> Any:
    module, _, name = place.partition(":")
    imported = import_module(module)
    return getattr(imported, name) if name else imported


def _bare(stock: Any) -> Callable[..., Any]:
    function: Callable[..., Any] = stock.__func__ if isinstance(stock, (staticmethod, classmethod)) else stock
    return function


def _layers(function: Any) -> list[Any]:
    """The function, what it replaces, and so on down to vLLM's own."""
    layers = [function]
    while (below := getattr(layers[-1], "loradock_original", None)) is not None:
        layers.append(below)
    return layers


def _wrapped(function: Any) -> list[Any]:
    """What it is said to wrap (`functools.wraps`), and what that wraps."""
    found = []
    while (function := getattr(function, "__wrapped__", None)) is not None:
        found.append(function)
    return found


def _bound(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(replacement)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    replaced.loradock_original = original  # type: ignore[attr-defined]
    return replaced


_HERE = "serve.cpu_kernels"
_OPS = "vllm.lora.ops.torch_ops.lora_ops"
_NOBODYS = "a row without an adapter has the number -1, which is the last slot's: another request's adapter"
_RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
_MANAGER = "vllm.lora.model_manager:LoRAModelManager"
_PLATFORM = "vllm.platforms.cpu:CpuPlatform"

# On every CPU.
ROWS = [
    Patch(
        _OPS,
        "bgmv_shrink",
        "inputs lora_b_weights output_tensor lora_indices_tensor scaling",
        f"{_HERE}.install:with_an_adapter",
        _NOBODYS,
        copies="vllm.lora",
    ),
    Patch(
        _OPS,
        "bgmv_expand",
        "inputs lora_b_weights output_tensor lora_indices_tensor add_inputs",
        f"{_HERE}.install:with_an_adapter",
        _NOBODYS,
        copies="vllm.lora",
    ),
    Patch(
        _OPS,
        "bgmv_expand_slice",
        "inputs lora_b_weights output_tensor lora_indices_tensor slice_offset slice_size add_inputs",
        f"{_HERE}.install:with_an_adapter",
        _NOBODYS,
        copies="vllm.lora",
    ),
]

# LORADOCK_LORA_KERNELS=auto or compile.
WRAPPER = [
    Patch(
        _PLATFORM,
        "get_punica_wrapper",
        "cls",
        f"{_HERE}.install:get_punica_wrapper",
        "the platform names the class that computes adapters",
    ),
]

# LORADOCK_LORA_KERNELS=compile.
COMPILE = [
    Patch(
        _PLATFORM,
        "check_and_update_config",
        "cls vllm_config",
        f"{_HERE}.install:check_and_update_config",
        "it turns torch.compile off where there are adapters, which its own LoRA path needs and ours does not",
    ),
]

# Once vLLM has asked for our wrapper.
ADAPTERS = [
    Patch(
        _MANAGER,
        "_create_lora_modules",
        "self",
        f"{_HERE}.punica:create_lora_modules",
        "no hook tells that the layers with adapters are made",
    ),
    Patch(
        _MANAGER,
        "activate_adapter",
        "self lora_id",
        f"{_HERE}.punica:activate_adapter",
        "no hook tells that an adapter was copied into a slot",
    ),
    Patch(
        "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager",
        "_apply_adapters",
        "self lora_requests",
        f"{_HERE}.between_steps:apply_adapters",
        "in every step it lists all adapters in memory, once for each that the step uses",
    ),
    Patch(
        "vllm.lora.layers.utils",
        "_get_lora_device",
        "base_layer",
        f"{_HERE}.punica:get_lora_device",
        "the int8 kernel packs a weight and leaves None in its place, of which vLLM asks the device",
        copies="vllm.lora",
    ),
]

# LORADOCK_LORA_KERNELS=auto, on a processor that the step is written for.
STEP = [
    Patch(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader",
        "create_model",
        "self vllm_config model_config prefix",
        f"{_HERE}.step:create_model",
        "whether the step takes a model is known before its weights are read, which are packed in place of vLLM's",
    ),
    Patch(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod",
        "process_weights_after_loading",
        "self layer",
        f"{_HERE}.step:process_embedding_after_loading",
        "the output layer is packed in place of vLLM's, and the embedding is not multiplied",
    ),
    Patch(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod",
        "embedding",
        "self layer input_",
        f"{_HERE}.step:embedding",
        "an embedding that is also the output layer is looked up in its packed matrix",
    ),
    Patch(
        "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
        "process_weights_after_loading",
        "self layer",
        f"{_HERE}.step:process_weights_after_loading",
        "weights are packed for the step before vLLM takes them apart for its own kernels",
    ),
    Patch(
        "vllm.model_executor.kernels.linear.scaled_mm.cpu:CPUInt8ScaledMMLinearKernel",
        "process_weights_after_loading",
        "self layer",
        f"{_HERE}.step:process_int8_weights_after_loading",
        "the same for weights that are int8",
    ),
    Patch(
        "vllm.model_executor.kernels.linear.mixed_precision.cpu:CPUWNA16LinearKernel",
        "process_weights_after_loading",
        "self layer",
        f"{_HERE}.step:process_integers_after_loading",
        "the same for 4 bits in groups",
    ),
    Patch(
        "vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel:FP8ScaledMMLinearKernel",
        "process_weights_after_loading",
        "self layer",
        f"{_HERE}.step:process_float8_after_loading",
        "the same for float8, which a CPU without tile instructions only emulates",
    ),
    Patch(
        _RUNNER,
        "load_model",
        "self load_dummy_weights",
        f"{_HERE}.step:load_model",
        "a model that the step knows is taken in once it is loaded, its output layer too",
    ),
    Patch(
        _RUNNER,
        "_model_forward",
        "self input_ids positions intermediate_tensors inputs_embeds model_kwargs",
        f"{_HERE}.step:model_forward",
        "a whole step is computed in one call",
    ),
    Patch(
        "vllm.v1.worker.block_table:BlockTable",
        "compute_slot_mapping",
        "self num_reqs query_start_loc positions",
        f"{_HERE}.between_steps:compute_slot_mapping",
        "for a few tokens other threads wake up later than it is done",
    ),
    Patch(
        "vllm.v1.utils:CpuGpuBuffer",
        "copy_to_gpu",
        "self n",
        f"{_HERE}.between_steps:copy_to_gpu",
        "it copies block tables and positions onto themselves, several times a step",
    ),
    Patch(
        "vllm.v1.sample.sampler:Sampler",
        "greedy_sample",
        "logits",
        f"{_HERE}.between_steps:greedy_sample",
        "of one or two rows the largest is found sooner in one thread",
    ),
]
