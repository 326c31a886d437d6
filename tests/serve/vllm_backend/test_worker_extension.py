from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest

from serve.vllm_backend.worker_extension import LOADED, LOADING, REST, RESTS, Worker


class Module:
    """A layer whose slots can be looked at."""

    def __init__(self):
        self.slots = ["?"] * 2
        self.resets = 0

    def reset_lora(self, index):
        self.slots[index] = ""
        self.resets += 1

    def set_lora(self, index, weights):
        self.reset_lora(index)
        self.slots[index] = weights


class Adapters:
    """vLLM's book of adapters, in order of use."""

    _is_moe = is_pooling_model = supports_mm = False
    capacity = 2
    packed_modules: ClassVar[dict[str, list[str]]] = {}

    def __init__(self):
        self.held, self.packed = [], []
        self.modules = {"layer": Module()}
        self.model = SimpleNamespace()

    def __len__(self):
        return len(self.held)

    def remove_oldest_adapter(self):
        self.held.pop(0)

    def add_adapter(self, lora):
        assert lora in self.packed
        self.held.append(lora)

    def _create_merged_loras_inplace(self, lora):
        self.packed.append(lora)


class Manager:
    def __init__(self):
        self._adapter_manager = Adapters()
        self.gate = threading.Event()
        self.gate.set()

    def list_adapters(self):
        return set(self._adapter_manager.held)

    def remove_adapter(self, number):
        self._adapter_manager.held.remove(number)

    def _load_adapter(self, request):
        assert self.gate.wait(60)
        if request.lora_path == "/nowhere":
            raise FileNotFoundError("no such adapter")
        return request.lora_int_id


@pytest.fixture
def worker():
    worker = Worker()
    worker.model_runner = SimpleNamespace(lora_manager=Manager(), input_batch=SimpleNamespace(req_id_to_index={}))
    return worker


@pytest.fixture
def rests(monkeypatch):
    """Seconds of each rest, which take none."""
    seconds = []
    monkeypatch.setattr("serve.vllm_backend.worker_extension.sleep", seconds.append)
    return seconds


def reading(seconds):
    """So many seconds of work, in many small calls."""

    def read(request):
        began = time.thread_time()
        while time.thread_time() - began < seconds:
            pass
        return request.lora_int_id

    return read


def finished(worker, number):
    while (told := worker.loradock_finish(number)) == LOADING:
        time.sleep(0.001)
    return told


def test_an_adapter_is_read_beside_the_computing_and_registered_when_it_is_asked_for(worker):
    manager = worker.model_runner.lora_manager
    manager.gate.clear()
    worker.loradock_begin("tone@1", 7, "/somewhere")
    assert worker.loradock_finish(7) == LOADING, "it waits for nobody"
    manager.gate.set()
    time.sleep(0.1)
    assert manager.list_adapters() == set(), "nothing is changed while a step may be running"
    assert finished(worker, 7) == LOADED
    assert manager.list_adapters() == {7}
    assert worker.loradock_finish(7) == LOADED, "another worker was slower, and this one is asked again"


def test_while_answers_are_computed_the_reading_rests_between_short_spells(worker, rests):
    worker.model_runner.lora_manager._load_adapter = reading(0.01)
    for number, answering in ((1, {}), (2, {"a request": 0})):
        worker.model_runner.input_batch.req_id_to_index |= answering
        worker.loradock_begin("tone@1", number, "/somewhere")
        assert finished(worker, number) == LOADED
        assert bool(rests) == bool(answering)
    assert len(rests) >= 3


def test_a_large_adapter_takes_twice_its_reading_and_not_twelve_times(worker, rests):
    worker.model_runner.lora_manager._load_adapter = reading(0.1)
    worker.model_runner.input_batch.req_id_to_index["a request"] = 0
    worker.loradock_begin("tone@1", 1, "/somewhere")
    assert finished(worker, 1) == LOADED
    assert len(rests) > 32
    assert sum(rests) < RESTS + REST + 0.1


def test_who_cannot_be_read_says_why_and_is_forgotten(worker):
    worker.loradock_begin("tone@1", 7, "/nowhere")
    assert finished(worker, 7) == "no such adapter"
    assert worker.loradock_finish(7) == "it was not begun"


def test_an_adapter_that_another_worker_could_not_read_is_dropped(worker):
    worker.loradock_begin("tone@1", 7, "/somewhere")
    assert finished(worker, 7) == LOADED
    worker.loradock_drop(7)
    worker.loradock_drop(7)
    assert worker.model_runner.lora_manager.list_adapters() == set()
    assert worker.loradock_finish(7) == "it was not begun"


def test_no_more_are_held_than_fit(worker):
    for number in (1, 2, 3):
        worker.loradock_begin("tone@1", number, "/somewhere")
        assert finished(worker, number) == LOADED
    assert worker.model_runner.lora_manager.list_adapters() == {2, 3}


def test_a_slot_is_zeroed_once_and_again_after_something_was_put_there(worker):
    module = worker.model_runner.lora_manager._adapter_manager.modules["layer"]
    worker._loradock()
    module.reset_lora(0)
    module.reset_lora(0)
    assert (module.slots[0], module.resets) == ("", 1)
    module.set_lora(0, "weights")
    assert (module.slots[0], module.resets) == ("weights", 2)
    module.reset_lora(0)
    assert (module.slots[0], module.resets) == ("", 3)
