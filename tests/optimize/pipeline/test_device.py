"""Which steps a machine's GPU computes, and what is said where there is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from optimize import processor
from optimize.errors import Refused
from optimize.pipeline import device, plan
from optimize.pipeline.run import Run
from optimize.processor import GPU
from optimize.recipe import Recipe, parse
from optimize.steps.planning import Estimate
from tests.support.nvml import GIB, Device, Nvml

QUANTIZE = (Estimate("quantize", "w4a16", 12 * 10**9, 0, 1),)


def of(kind, recipe, size=10**9, **options):
    return device.of_step(kind, options, recipe, QUANTIZE, size)[0]


@pytest.fixture(autouse=True)
def nothing_else_computes_there(monkeypatch):
    monkeypatch.setattr(GPU, "free", lambda self: self.memory)


def test_a_gpu_computes_what_fits_it_and_the_processor_the_rest(monkeypatch):
    recipe = Recipe()
    monkeypatch.setattr(processor, "gpu", lambda: None)
    assert of("quantize", recipe) == "cpu"
    monkeypatch.setattr(processor, "gpu", lambda: GPU("NVIDIA L4", 24 * 10**9))
    assert of("quantize", recipe) == "cuda"
    assert of("quantize", recipe, size=16 * 10**9) == "cpu", "the weights of 8 billion and the step's own"
    assert of("quantize", Recipe(device="cuda"), size=16 * 10**9) == "cuda"
    assert of("quantize", Recipe(device="cpu")) == "cpu"
    for kind in ("onnx", "genai", "engine"):
        assert of(kind, recipe) == "cpu", "they have a runtime of their own"
    assert of("evaluate", recipe, format="onnx") == "cpu"
    assert of("evaluate", recipe, format="vllm") == "cuda"


def test_cuda_is_refused_before_any_work_where_there_is_none(base, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "gpu", lambda: None)
    recipe = parse(f"model: {base}\ndevice: cuda\nsteps: [quantize]\n", tmp_path)
    with pytest.raises(Refused, match="says `device: cuda`, and torch finds no GPU here"):
        plan.made(recipe, base, {}, tmp_path / "out", 10**12)


def test_what_a_gpu_computed_is_not_taken_for_the_processors(base, tmp_path, monkeypatch):
    recipe = parse(f"model: {base}\nsteps: [{{quantize: {{group: 16}}}}]\n", tmp_path)
    keys = []
    for gpu in (None, GPU("NVIDIA L4", 24 * 10**9), GPU("NVIDIA H100", 80 * 10**9)):
        monkeypatch.setattr(processor, "gpu", lambda gpu=gpu: gpu)
        keys.append(plan.made(recipe, base, {}, tmp_path / "out", 10**12).key)
    assert len(set(keys)) == 3


def test_a_card_that_a_server_holds_is_not_counted_as_free(monkeypatch):
    gpu = GPU("NVIDIA L4", 24 * 10**9, "GPU-a")
    monkeypatch.setattr(processor, "gpu", lambda: gpu)
    monkeypatch.setattr(GPU, "free", lambda self: 2 * 10**9)
    assert of("quantize", Recipe()) == "cpu"
    assert of("quantize", Recipe(device="cuda")) == "cuda", "whoever says so knows better"


def test_what_is_free_is_the_drivers_word(monkeypatch):
    monkeypatch.undo()
    nvml = Nvml([Device("NVIDIA L4", 22, 20, "GPU-b"), Device("NVIDIA L4", 22, 3.5, "GPU-a")])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert GPU("NVIDIA L4", 22 << 30, "GPU-a").free() == int(3.5 * GIB)
    assert nvml.open == 0
    nvml.broken = True
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (5, 9))
    assert GPU("NVIDIA L4", 22 << 30, "GPU-a").free() == 5


def test_what_one_device_has_finished_the_other_does_not_compute_again(tmp_path, monkeypatch):
    """A server fills the card between two runs: the step that the card had computed is taken."""
    monkeypatch.setattr(processor, "gpu", lambda: GPU("NVIDIA L4", 24 * 10**9))
    run = Run.__new__(Run)
    run.recipe, run.done, run.out = Recipe(), [], tmp_path
    run.plan = SimpleNamespace(steps=QUANTIZE, bytes=10**9)
    where, folder = run._place("quantize", {}, {})
    assert where == "cuda"
    monkeypatch.setattr(GPU, "free", lambda self: 0)
    assert run._place("quantize", {}, {})[0] == "cpu"
    folder.mkdir(parents=True)
    assert run._place("quantize", {}, {}) == ("cuda", folder)
