"""The sizes that a plan names are those that the files and vLLM's shapes have."""

from __future__ import annotations

import pytest

from serve.errors import ConfigError
from serve.models import hardware
from serve.models.memory_plan import plan
from tests.support.tiny import HIDDEN, LAYERS, VOCABULARY


def test_the_sizes_follow_from_the_configuration(tiny_model):
    told = plan(str(tiny_model), max_loras=3, max_cpu_loras=5, rank=4, kv_cache=1 << 20)
    # q, k, v, o are square; gate and up double the width, down halves it. Two bytes a number, A and B.
    sides = LAYERS * (4 * 2 * HIDDEN + 3 * 3 * HIDDEN)
    assert told.adapter == 2 * 4 * sides
    assert told.host == 5 * told.adapter
    assert told.table == 2 * HIDDEN * VOCABULARY
    # A GPU has room for the embedding's and the output layer's too.
    more = 0 if hardware.on_cpu() else 2 * (HIDDEN + 32)
    assert told.slots == 3 * 2 * 4 * (sides + more)
    assert told.kv_token == 2 * LAYERS * HIDDEN * 2  # keys and values of two heads of half the width
    assert told.tokens == (1 << 20) // told.kv_token
    assert told.total == told.weights + told.kv_cache + told.slots + told.host + told.overhead
    assert told.fits == (told.total <= told.free)


def test_the_kv_cache_is_what_a_start_would_take_beside_the_slots(tiny_model, monkeypatch):
    monkeypatch.setattr(hardware, "free_memory", lambda: 10 * hardware.GIB)
    made = plan(str(tiny_model), max_loras=100_000, max_cpu_loras=1, rank=16, kv_cache=None)
    assert made.kv_cache == hardware.kv_space(made.weights + made.slots) < hardware.kv_space(made.weights)


@pytest.mark.skipif(not hardware.on_cpu(), reason="a GPU's memory is another one than the host's")
def test_adapters_that_have_a_slot_each_are_in_memory_once(tiny_model):
    told = plan(str(tiny_model), max_loras=3, max_cpu_loras=3, rank=4, kv_cache=1 << 20)
    assert told.slots == 3 * told.adapter and told.host == 0


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        plan(str(tmp_path), max_loras=1, max_cpu_loras=1, rank=1, kv_cache=None)


def test_a_host_with_a_gpu_also_holds_what_compiles_for_it(tiny_model, monkeypatch):
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    told = plan(str(tiny_model), max_loras=2, max_cpu_loras=2, rank=8, kv_cache=None)
    assert told.overhead == 2 * hardware.GIB
