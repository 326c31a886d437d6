"""onnxruntime-genai answers as PyTorch does, with the base and with each adapter, chosen at run time."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from optimize import recipe
from optimize.checkpoint.model import adapted, logits, opened
from optimize.errors import Refused
from optimize.export import genai
from optimize.export.session import Session
from optimize.pipeline import plan
from tests.optimize.conftest import silent

IDS = torch.arange(2, 34).view(1, 32)
built = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is an extra"
)


@pytest.fixture
def adapters(adapter) -> dict[str, Path]:
    return {
        "one": adapter(1, target_modules=["q_proj", "down_proj"]),
        "two": adapter(2, target_modules=["v_proj", "o_proj", "up_proj", "gate_proj"], r=8, lora_alpha=4),
    }


@built
def test_one_graph_answers_as_the_base_and_as_each_adapter(base, job, adapters):
    made = job("genai", adapters=adapters, precision="fp32", format="genai")
    notes = genai.run(made, silent)
    assert set(notes["checked"]) == {"base", "one", "two"}
    for found in notes["checked"].values():
        assert found["logits_off"] < 1e-4 and found["greedy_same"] == 64
    folder = made.folder / "model"
    assert {"genai_config.json", "model.onnx", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert torch.allclose(Session(folder).logits(IDS), logits(opened(base, torch.float32), IDS), atol=1e-4)
    # The same files in plain ONNX Runtime.
    for name, path in adapters.items():
        said = Session(folder, name).logits(IDS)
        with adapted(opened(base, torch.float32), path) as model:
            right = logits(model, IDS)
        assert torch.allclose(said, right, atol=1e-4)
        assert (right - logits(opened(base, torch.float32), IDS)).abs().max() > 0.01


@built
def test_int4_leaves_the_adapters_whole(base, job, adapters):
    made = job("genai", adapters=adapters, precision="int4", format="genai")
    notes = genai.run(made, silent)
    assert 0 < notes["scores"]["logit_difference"] < 5


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("steps: [{quantize: {}}]", "takes a quantized model in GPTQ's format"),
        ("target: gpu", "is checked on a CPU here"),
    ],
)
def test_what_the_builder_does_not_take_is_refused_before_any_work(more, says, written, tmp_path, monkeypatch):
    monkeypatch.setattr("optimize.export.rules.find_spec", lambda name: object())
    read = recipe.load(written(more + "\nexport: {format: genai}"))
    with pytest.raises(Refused, match=says):
        plan.made(read, plan.Path(read.model), {}, tmp_path / "out", 10**12)
    monkeypatch.setattr("optimize.export.rules.find_spec", lambda name: None)
    with pytest.raises(Refused, match="the genai export needs onnxruntime-genai: pip install"):
        plan.made(read, plan.Path(read.model), {}, tmp_path / "out", 10**12)
