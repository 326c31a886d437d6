"""What is left out between steps changes nothing but their time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.cache import LRUCache
from vllm.v1.utils import CpuGpuBuffer

from serve.cpu_kernels import between_steps


def bare(function):
    """vLLM's own, below what replaces it."""
    return bare(function.loradock_original) if hasattr(function, "loradock_original") else function


def buffer(shared: bool) -> CpuGpuBuffer:
    made = CpuGpuBuffer.__new__(CpuGpuBuffer)
    made.cpu = torch.arange(12).view(4, 3)
    made.gpu = made.cpu if shared else torch.zeros(4, 3, dtype=torch.int64)
    return made


@pytest.mark.parametrize("shared", [True, False])
def test_a_buffer_is_where_it_is_read_after_it_was_copied(shared):
    made = buffer(shared)
    got = between_steps.copy_to_gpu(bare(CpuGpuBuffer.copy_to_gpu), made, 2)
    assert torch.equal(got, made.cpu[:2]) and got.data_ptr() == made.gpu.data_ptr()
    assert torch.equal(made.gpu[2:], made.cpu[2:]) == shared
    assert torch.equal(between_steps.copy_to_gpu(bare(CpuGpuBuffer.copy_to_gpu), made), made.cpu)
    assert torch.equal(made.gpu, made.cpu)


class Manager:
    """A few adapters in memory, and some of them in slots."""

    def __init__(self, known: list[int], active: list[int]) -> None:
        self.lora_slots, self.calls = 4, []
        self._registered_adapters, self._active_adapters = LRUCache(8), LRUCache(4)
        for number in known:
            self._registered_adapters[number] = f"adapter {number}"
        for number in active:
            self._active_adapters[number] = None

    def list_adapters(self):
        return dict(self._registered_adapters.cache)

    def get_adapter(self, number):
        return self._registered_adapters.get(number)

    def activate_adapter(self, number):
        self.calls.append(number)
        self._active_adapters[number] = None
        self._active_adapters.touch(number)

    def order(self) -> tuple[list[int], list[int]]:
        return list(self._registered_adapters.order), list(self._active_adapters.order)


def request(number: int) -> LoRARequest:
    return LoRARequest(f"adapter {number}", number, f"/adapters/{number}")


@pytest.mark.parametrize("used", [[], [2], [1, 4], [4, 2, 1]])
def test_adapters_that_are_in_their_slots_are_as_recently_used_as_vllm_would_have_them(used):
    own, ours = (Manager([1, 2, 3, 4, 5], [2, 4, 1]) for _ in range(2))
    stock = bare(LRUCacheWorkerLoRAManager._apply_adapters)
    workers = []
    for manager in (own, ours):
        workers.append(LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager))
        workers[-1]._adapter_manager = manager
    requests = [request(number) for number in used]  # in a set's order both would be the same by luck or not
    stock(workers[0], requests)
    between_steps.apply_adapters(lambda *_: pytest.fail("nothing is to be loaded"), workers[1], requests)
    assert ours.order() == own.order() and not ours.calls


@pytest.mark.parametrize("used", [[2, 3], [6], [1]])
def test_an_adapter_that_is_not_there_or_is_new_is_vllms(used):
    manager, asked = Manager([1, 2, 3], [1, 2]), []
    requests = {request(number) for number in used}
    if used == [1]:
        (one,) = requests
        one.load_inplace = True
    worker = SimpleNamespace(_adapter_manager=manager)
    before = manager.order()
    between_steps.apply_adapters(lambda *words: asked.append(words), worker, requests)
    assert asked == [(worker, requests)] and manager.order() == before
