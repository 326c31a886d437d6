"""vLLM without torch's compiler, where nothing is compiled: its import takes seconds of a start, and much memory.

vLLM 0.32 imports it for classes that only a compiled model needs, and for one function that counts. `imported` leaves
it out while vLLM is imported; `install` puts a plain function in the place of the compiled one. Whoever asks for the
compiler later gets it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from serve.cpu_kernels.install import VARIABLE
from serve.cpu_kernels.patches import Patch, apply

# Of whose list of functions that are not looked into: vllm.env_override adds vLLM's to it.
INDUCTOR = "torch._inductor"


def _called(module: str, name: str) -> Callable[..., Any]:
    """A function or class that is imported when it is called."""
    return lambda *args, **kwargs: getattr(importlib.import_module(module), name)(*args, **kwargs)


_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"
# What others import of the compiler, and what they get.
STAND_INS: dict[str, dict[str, Any]] = {
    # vllm.compilation.decorators changes it while it compiles.
    "torch._dynamo.symbolic_convert": {"InliningInstructionTranslator": type("InliningInstructionTranslator", (), {})},
    # torchvision.ops.roi_align asks whether it may compile on a GPU.
    "torch._dynamo.utils": {"is_compile_supported": lambda device: False},
    # vllm.v1.worker.gpu.metrics.logits, for Triton.
    "torch._inductor.runtime.triton_helpers": {"libdevice": None},
    # transformers.masking_utils, for models that it computes itself.
    _MASKS: {"TransformGetItemToIndex": _called(_MASKS, "TransformGetItemToIndex")},
}
# The base class of vLLM's passes, a file that needs nothing else of the compiler.
PASSES = "torch._inductor.custom_graph_pass"
# Decorators that say how a function is compiled.
MARKS = ("disable", "allow_in_graph", "assume_constant_result")
CELLS = 1 << 22  # that are compared at a time

PATCHES = [
    Patch(
        "vllm.v1.sample.ops.logprobs",
        "batched_count_greater_than",
        "x values",
        f"{__name__}:count_greater",
        "of a few rows it takes microseconds, and the compiler seconds at every start",
        copies="vllm.v1",
    )
]


def wanted() -> bool:
    """Whether this machine's engines compute without the compiler, as the settings are."""
    return os.environ.get(VARIABLE, "auto") != "compile"


@contextmanager
def imported() -> Iterator[None]:
    """While it lasts vLLM is imported without the compiler, unless that is there already."""
    if not wanted() or "torch._dynamo" in sys.modules or "vllm.env_override" in sys.modules:
        yield
        return
    # Of the first nothing can be imported.
    stand_ins: dict[str, ModuleType | None] = {INDUCTOR: None, PASSES: _alone(PASSES)}
    for name, content in STAND_INS.items():
        stand_ins[name] = module = ModuleType(name)
        vars(module).update(content)
    marks = {name: vars(torch.compiler)[name] for name in MARKS}
    compiler = torch.compile
    sys.modules.update(stand_ins)  # type: ignore[arg-type]
    torch.compile = _later
    vars(torch.compiler).update(dict.fromkeys(MARKS, _unmarked))
    torch._dynamo = _Unimported(**dict.fromkeys(MARKS, _unmarked))
    try:
        yield
    finally:
        torch.compile = compiler
        vars(torch.compiler).update(marks)
        for name, stand_in in stand_ins.items():
            if name in sys.modules and sys.modules[name] is stand_in:
                del sys.modules[name]
    if "torch._dynamo" not in sys.modules:
        torch._dynamo = _Unimported()


def _alone(name: str) -> ModuleType:
    """A module of torch's without its package."""
    spec = importlib.util.spec_from_file_location(
        name, Path(torch.__file__).parents[1] / f"{name.replace('.', '/')}.py"
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not a file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Unimported:
    """The compiler's module until somebody imports it: vLLM tells it about tensors that nobody compiles for."""

    def __init__(self, **functions: Any) -> None:
        marks = SimpleNamespace(mark_unbacked=lambda *_: None)
        self._functions = {**functions, "decorators": marks}

    def __getattr__(self, name: str) -> Any:
        if name in self._functions and "torch._dynamo" not in sys.modules:
            return self._functions[name]
        return getattr(importlib.import_module("torch._dynamo"), name)


def _later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile`, of a function that is compiled when it is first called."""
    if function is None:
        return lambda function: _later(function, **options)
    compiled: list[Callable[..., Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **options))
        return compiled[0](*args, **kwargs)

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def _unmarked(function: Callable[..., Any] | None = None, *_: Any, **options: Any) -> Any:
    """One of MARKS, of a function that is not compiled anyway."""
    return function if function is not None else lambda function: function


def install() -> None:
    """In each of vLLM's processes."""
    from vllm.platforms import current_platform

    if wanted() and current_platform.is_cpu():
        apply(PATCHES)


def count_greater(original: Callable[..., Any], x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How many elements of each row are at least its value; (rows,)."""
    rows = max(1, CELLS // max(1, x.shape[1]))
    counts = [(part >= value).sum(-1) for part, value in zip(x.split(rows), values.split(rows), strict=True)]
    return torch.cat(counts)
