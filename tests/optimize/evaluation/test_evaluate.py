"""Models are compared the same way whether memory holds them or a layer of them."""

from __future__ import annotations

import msgspec
import pytest
import torch

from optimize.checkpoint import model as models
from optimize.evaluation import evaluate
from optimize.steps.quantize import quantize
from tests.optimize.conftest import silent


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_layer_at_a_time_gives_the_same_scores(scheme, base, job, adapter, monkeypatch):
    one = {"one": adapter()}
    made = job("quantize", scheme=scheme, method="rtn", adapters=one)
    quantize.run(made, silent)
    asked = job("evaluate", model=made.folder / "model", adapters=one, out="scores", format="vllm")
    whole = evaluate.run(asked, silent)["scores"]
    read = []
    original = models._OnDisk.__init__
    monkeypatch.setattr(models._OnDisk, "__init__", lambda self, *given: read.append(1) or original(self, *given))
    assert evaluate.run(msgspec.structs.replace(asked, memory=1), silent)["scores"] == whole
    assert len(read) == 6  # three layers of the original and of the result
    assert torch.is_grad_enabled(), "whatever comes next in this process may train"
