"""torch's compiler, imported when something is compiled. On a CPU, with adapters, vLLM compiles nothing.

Its modules (torch._dynamo, most of torch._inductor and what they import) take a quarter of the time that a server's
imports do. vLLM, transformers and torchvision import them for decorators, and for names that they use while something
is compiled. Until somebody really asks for torch._dynamo, decorators only note what they were asked, and such a name
is a placeholder. When it is imported, whoever does so, the decorators are applied and the placeholders replaced: a
first compilation finds everything as it would have been.

`READ` has the versions of vLLM's own module for which this is known to hold; with another one it is imported as ever,
and where Triton is installed, whose kernels import it in the middle of vLLM's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import torch

from serve.cpu_kernels.install import VARIABLE
from serve.vllm_backend import import_hooks

COMPILER, INDUCTOR = "torch._dynamo", "torch._inductor"
LOWERING = f"{INDUCTOR}.lowering"
# Modules that take names out of the compiler's, and need none of them before something is compiled.
TAKERS = {
    INDUCTOR: f"{INDUCTOR}.standalone_compile",
    "torchvision.ops.roi_align": f"{COMPILER}.utils",
    "transformers.masking_utils": f"{COMPILER}._trace_wrapped_higher_order_op",
    "vllm.compilation.decorators": f"{COMPILER}.symbolic_convert",
}
# vLLM's module that changes torch as soon as vLLM is imported, and its function that needs the compiler for that.
OVERRIDES, OVERRIDE = "vllm.env_override", "_patch_inductor_fallback_allow_list"
# Digests of that module, of vLLM 0.32.0; what it does depends on torch's version.
READ = frozenset({"8a22650f8625"})
TORCH = "2.13."
TRITON = ("triton", "pytorch_triton_xpu")

_again: list[Callable[[], object]] = []


def install() -> None:
    """Before vLLM is imported. Nothing, if torch's compiler has been, or vLLM's module is one that nobody has read."""
    late = any(name in sys.modules for name in (COMPILER, INDUCTOR, OVERRIDES))
    if late or os.environ.get(VARIABLE) == "compile" or any(map(util.find_spec, TRITON)) or not _is_read():
        return
    stock = torch.compile, torch.compiler.disable, torch.compiler.allow_in_graph, torch.compiler.assume_constant_result
    marks: Any = types.SimpleNamespace(
        disable=_deferred(stock[1], with_compiler=False),
        allow_in_graph=_noted(stock[2]),
        assume_constant_result=_noted(stock[3]),
    )
    torch.compile = _deferred(stock[0], with_compiler=True)
    for name, mark in vars(marks).items():
        setattr(torch.compiler, name, mark)
    # vLLM's sampler marks tensors in every step with log-probabilities, for a function that may be compiled.
    tensors = _Attribute(f"{COMPILER}.decorators", mark_unbacked=lambda *args, **options: None)
    attribute = _Attribute(COMPILER, **vars(marks), decorators=tensors)
    torch._dynamo = attribute

    def restore() -> None:
        torch.compile = stock[0]
        torch.compiler.disable, torch.compiler.allow_in_graph, torch.compiler.assume_constant_result = stock[1:]
        del torch._dynamo
        attribute.forget()
        tensors.forget()

    import_hooks.around(COMPILER, lambda module: _imported(restore))
    import_hooks.around(OVERRIDES, _without_compiler)
    for taker, source in TAKERS.items():
        import_hooks.around(taker, functools.partial(_with_placeholders, source))


def _is_read() -> bool:
    vllm = util.find_spec("vllm")
    module = Path((vllm and vllm.origin) or "").with_name("env_override.py")
    try:
        return torch.__version__.startswith(TORCH) and hashlib.sha256(module.read_bytes()).hexdigest()[:12] in READ
    except OSError:
        return False


class _Attribute(types.ModuleType):
    """What `torch._dynamo` and a module of it are meanwhile, for whoever imports torch alone."""

    def __init__(self, name: str, **meanwhile: Any) -> None:
        super().__init__(name)
        self._meanwhile = meanwhile

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._meanwhile:
            return self._meanwhile[name]
        return getattr(importlib.import_module(self.__name__), name)

    def forget(self) -> None:
        self._meanwhile.clear()


@contextmanager
def _imported(restore: Callable[[], None]) -> Iterator[None]:
    restore()
    yield
    notes, _again[:] = list(_again), []
    for note in notes:
        note()


def _noted(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A mark that changes nothing of a function itself."""

    @functools.wraps(stock)
    def mark(function: Any) -> Any:
        _again.append(functools.partial(stock, function))
        return function

    return mark


def _deferred(stock: Callable[..., Any], *, with_compiler: bool) -> Callable[..., Any]:
    """A decorator whose function is the plain one until the compiler is there, or imports it when it is called."""

    @functools.wraps(stock)
    def decorate(function: Any = None, *args: Any, **options: Any) -> Any:
        if function is None:
            return lambda function: decorate(function, *args, **options)
        if not isinstance(function, types.FunctionType):
            return stock(function, *args, **options)
        target = function

        @functools.wraps(function)
        def called(*call_args: Any, **call_options: Any) -> Any:
            if with_compiler and target is function:
                importlib.import_module(COMPILER)
            return target(*call_args, **call_options)

        def apply() -> None:
            nonlocal target
            target = stock(function, *args, **options)

        _again.append(apply)
        return called

    return decorate


class _Placeholder:
    """A name of the compiler's. Whoever uses it all the same has it imported."""

    def __init__(self, source: str, name: str) -> None:
        self._real = lambda: getattr(importlib.import_module(source), name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._real()(*args, **options)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, self._real())


class _Names(types.ModuleType):
    """A module of the compiler's, of which somebody takes names."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(self.__name__, name)


@contextmanager
def _with_placeholders(source: str, taker: types.ModuleType) -> Iterator[None]:
    if source in sys.modules or COMPILER in sys.modules:
        yield
        return
    names = sys.modules[source] = _Names(source)
    try:
        yield
    finally:
        if sys.modules.get(source) is names:
            del sys.modules[source]

    def replace() -> None:
        for name, value in list(vars(taker).items()):
            if isinstance(value, _Placeholder):
                setattr(taker, name, value._real())

    if COMPILER in sys.modules:
        replace()
    else:
        _again.append(replace)


@contextmanager
def _without_compiler(overrides: types.ModuleType) -> Iterator[None]:
    """vLLM goes on without the compiler where there is none, and changes it here when it is imported."""
    sys.modules[INDUCTOR] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[INDUCTOR]

    @contextmanager
    def change(lowering: types.ModuleType) -> Iterator[None]:
        yield
        vars(overrides)[OVERRIDE]()

    import_hooks.around(LOWERING, change)
