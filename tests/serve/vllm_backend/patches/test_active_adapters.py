"""Adapters of a step that are in their slots cost it nothing, whatever else is in memory, on any device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.cache import LRUCache

from serve.vllm_backend.patches import applying
from serve.vllm_backend.patches.active_adapters import apply_adapters
from serve.vllm_backend.patches.switches import Switches
from serve.vllm_backend.patches.table import PATCHES


def bare(function):
    """vLLM's own, below what replaces it."""
    return bare(function.loradock_original) if hasattr(function, "loradock_original") else function


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
        if number not in self._active_adapters:
            self.calls.append(number)
            if len(self._active_adapters) == self.lora_slots:
                self._active_adapters.remove_oldest()
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
    apply_adapters(lambda *_: pytest.fail("nothing is to be loaded"), workers[1], requests)
    assert ours.order() == own.order() and not ours.calls


@pytest.mark.parametrize("used", [[2, 3], [6], [1]])
def test_an_adapter_that_is_not_in_a_slot_or_is_new_is_vllms(used):
    manager, asked = Manager([1, 2, 3], [1, 2]), []
    requests = {request(number) for number in used}
    if used == [1]:
        (one,) = requests
        one.load_inplace = True
    worker = SimpleNamespace(_adapter_manager=manager)
    apply_adapters(lambda *words: asked.append(words), worker, requests)
    assert asked == [(worker, {one for one in requests if one.lora_int_id != 2})]


def test_a_new_adapter_pushes_out_none_that_the_same_step_uses():
    manager = Manager([1, 2, 3, 4, 5], [1, 2, 3, 4])  # 1 was used longest ago, and all four slots are taken
    worker = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    worker._adapter_manager = manager
    apply_adapters(bare(LRUCacheWorkerLoRAManager._apply_adapters), worker, {request(5), request(1), request(2)})
    assert manager.calls == [5] and {1, 2, 5} <= set(manager.order()[1])


def test_more_adapters_than_slots_is_vllms_error():
    worker = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    worker._adapter_manager = Manager([1, 2, 3, 4, 5], [1, 2, 3, 4])
    with pytest.raises(RuntimeError, match="greater than the number of GPU LoRA slots"):
        apply_adapters(
            bare(LRUCacheWorkerLoRAManager._apply_adapters), worker, {request(number) for number in range(1, 6)}
        )


def test_a_step_lists_no_adapters_where_all_are_in_slots(monkeypatch):
    """With a thousand in memory a list of them for each of a step's adapters is most of what a step costs the host."""
    manager, listed = Manager(list(range(1, 8)), [1, 2, 3]), []
    monkeypatch.setattr(manager, "list_adapters", lambda: listed.append(1) or {})
    worker = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    worker._adapter_manager = manager
    stock = bare(LRUCacheWorkerLoRAManager._apply_adapters)
    apply_adapters(stock, worker, {request(number) for number in (1, 2, 3)})
    assert not listed


@pytest.mark.parametrize("on_cpu", [True, False])
def test_it_is_in_place_on_every_device(on_cpu):
    patches = [patch for patch in PATCHES if patch.process == "all"]
    states = applying.decide(patches, lambda function: function.digest, Switches(), {}, on_cpu=on_cpu)
    replaced = {function.place for patch in patches if patch.name in states for function in patch.functions}
    assert "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters" in replaced
