"""Which steps a machine's GPU computes, and what is said where there is none."""

from __future__ import annotations

import pytest

from optimize import processor
from optimize.errors import Refused
from optimize.pipeline import device, plan
from optimize.processor import GPU
from optimize.recipe import Recipe, parse
from optimize.steps.planning import Estimate

QUANTIZE = (Estimate("quantize", "w4a16", 12 * 10**9, 0, 1),)


def of(kind, recipe, size=10**9, **options):
    return device.of_step(kind, options, recipe, QUANTIZE, size)


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
