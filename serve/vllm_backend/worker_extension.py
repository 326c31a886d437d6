"""What vLLM's workers can do beside what they do: load an adapter beside the computing, and register it between steps.

vLLM itself reads and converts an adapter's files between two steps, so that every stream stands still meanwhile, and at
once copies it into a slot of the batch, where it pushes out one that is being used, which pushes out the next. Here the
files are read in a thread, and an adapter takes a slot when its first request runs.

Mixed into vLLM's worker by its option `worker_extension_cls`; called through `collective_rpc`, by name.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from time import perf_counter, sleep, thread_time
from types import SimpleNamespace
from typing import Any, Protocol

from serve.cpu_kernels import pages, tally
from serve.vllm_backend.notices import notices

LOADING, LOADED = "loading", "loaded"
# It was read, and what is computed of it between steps is not done.
UNFINISHED = Exception()
# The scheduler's niceness of a thread that reads, beside those that compute.
NICE = 10
# While answers are computed it reads for SPELL seconds, then leaves Python's lock and the core to them for REST: the
# 10 ms that an adapter takes, at a stretch, made three steps a quarter longer each.
SPELL, REST = 0.0008, 0.01
# Seconds of such rests for an adapter, which a small one never uses up. A large one would take twelve times as long as
# its reading does: from then on it rests for as long as it has read.
RESTS = 0.3


class Computed(Protocol):
    """What is done of an adapter beside vLLM's reading before it is registered (adapter_names, dora, saved_modules)."""

    def advance(self, lora: Any) -> bool: ...


class Loader:
    """One worker's adapters on their way in. `manager` is vLLM's LRUCacheWorkerLoRAManager.

    `busy` says whether answers are being computed, and `computed` is what adapters need of the layers.
    """

    def __init__(
        self, manager: Any, busy: Callable[[], bool] = lambda: False, computed: Sequence[Computed] = ()
    ) -> None:
        self._manager = manager
        self._computed = computed
        self._busy = busy
        self._coming: dict[int, Future[Any]] = {}
        self._again: dict[int, Callable[[], Any]] = {}
        self._thread = ThreadPoolExecutor(1, "adapter-loader", initializer=_step_back)
        for module in manager._adapter_manager.modules.values():
            if hasattr(module, "set_lora"):
                _reset_once(module)

    def begin(self, request: Any) -> None:
        """Read and convert the adapter's files in the thread."""
        number, held = request.lora_int_id, self._manager.list_adapters()
        self._coming[number] = self._thread.submit(self._read, request)
        # What is in a slot need not be kept beside it (serve/cpu_kernels/punica.py), while it can be had again.
        again = {each: read for each, read in self._again.items() if each in held or each in self._coming}
        self._again = self._manager._adapter_manager.loradock_read = {**again, number: partial(self._convert, request)}

    def finish(self, number: int) -> str:
        """LOADING, LOADED (it is registered from now on), or why it can't be."""
        coming = self._coming.get(number)
        if coming is None:
            return LOADED if number in self._manager.list_adapters() else "it was not begun"
        if not coming.done():
            return LOADING
        if error := coming.exception() or self._unfinished(coming.result()):
            if error is UNFINISHED:
                return LOADING
            del self._coming[number]
            return str(error) or type(error).__name__
        del self._coming[number]
        adapters = self._manager._adapter_manager
        if len(adapters) + 1 > adapters.capacity:
            adapters.remove_oldest_adapter()
        adapters.add_adapter(coming.result())
        return LOADED

    def _unfinished(self, lora: Any) -> BaseException | None:
        """UNFINISHED while an adapter that was read needs more of the steps' time; or what is wrong with it."""
        try:
            return None if all(part.advance(lora) for part in self._computed) else UNFINISHED
        except (ValueError, RuntimeError) as error:
            return error

    def drop(self, number: int) -> None:
        """Forget an adapter, whether it is being read or registered."""
        if coming := self._coming.pop(number, None):
            coming.cancel()
        if number in self._manager.list_adapters():
            self._manager.remove_adapter(number)

    def _read(self, request: Any) -> Any:
        rested = 0.0

        def rest() -> None:
            nonlocal rested
            if self._busy():
                seconds = (REST if rested < RESTS else SPELL) / max(len(self._coming), 1)
                sleep(seconds)
                rested += seconds

        with _resting(rest):
            return self._convert(request)

    def _convert(self, request: Any) -> Any:
        adapters = self._manager._adapter_manager
        lora = self._manager._load_adapter(request)
        if not adapters._is_moe:  # to pack experts twice, here and when it is added, would not be the same as once
            adapters._create_merged_loras_inplace(lora)
        return lora


class Worker:
    """The mixin. Its names begin as no method of vLLM's does."""

    def loradock_begin(self, name: str, number: int, path: str) -> None:
        request = SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path, is_3d_lora_weight=False)
        self._loradock().begin(request)

    def loradock_finish(self, number: int) -> str:
        return self._loradock().finish(number)

    def loradock_drop(self, number: int) -> None:
        """Another worker could not read this adapter: nobody keeps it."""
        self._loradock().drop(number)

    def loradock_notices(self) -> list[str]:
        """What our code warned of in this process."""
        return notices.messages

    def loradock_weights(self) -> str:
        """The formats of the weights that are multiplied in one call a step; empty in vLLM's layers."""
        fused = getattr(self.model_runner, "loradock_fused", None)  # type: ignore[attr-defined]
        return fused.weights if fused is not None else ""

    def loradock_settle(self) -> None:
        """Give back what was only needed to start."""
        gc.collect()
        pages.release()

    def loradock_steps(self) -> list[tuple[str, str, int]]:
        """How many steps this process computed, by path and reason."""
        return tally.steps()

    def _loradock(self) -> Loader:
        loader: Loader | None = getattr(self, "_loradock_loader", None)
        if loader is None:
            from serve.vllm_backend.adapter_names import Names
            from serve.vllm_backend.dora import Magnitudes
            from serve.vllm_backend.saved_modules import SavedModules

            runner = self.model_runner  # type: ignore[attr-defined]
            # The last reads first, and leaves the rest to those before it.
            computed = [kind(runner.lora_manager, runner) for kind in (Names, Magnitudes, SavedModules)]
            loader = self._loradock_loader = Loader(runner.lora_manager, lambda: _answering(runner), computed)
        return loader


def _answering(runner: Any) -> bool:
    """Whether there are requests in a model runner, vLLM's first kind or its second."""
    requests = runner.input_batch if hasattr(runner, "input_batch") else runner.req_states
    return bool(requests.req_id_to_index)


def _step_back() -> None:
    with suppress(OSError, AttributeError):  # a thread of its own on Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


@contextmanager
def _resting(rest: Callable[[], None]) -> Iterator[None]:
    """`rest` is called after every SPELL of this thread's work, at one of the calls of functions in it."""
    look, worked = perf_counter() + SPELL, thread_time() + SPELL

    def called(*_: Any) -> None:
        nonlocal look, worked
        if perf_counter() < look:
            return
        # Work and not time: on a busy machine it would rest without having got anywhere.
        if thread_time() >= worked:
            rest()
            worked = thread_time() + SPELL
        look = perf_counter() + SPELL

    # The one hook that reaches into vLLM's loops; Python calls it in this thread alone.
    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(None)


def _reset_once(module: Any) -> None:
    """Zero a slot of this module only if something was put there since: of the output layer's it takes milliseconds."""
    reset, put = module.reset_lora, module.set_lora
    clean: set[int] = set(getattr(module, "loradock_zeros", ()))

    def reset_lora(index: int) -> None:
        if index not in clean:
            reset(index)
            clean.add(index)

    def set_lora(index: int, *args: Any, **kwargs: Any) -> None:
        clean.discard(index)
        put(index, *args, **kwargs)
        clean.discard(index)

    module.reset_lora, module.set_lora = reset_lora, set_lora
