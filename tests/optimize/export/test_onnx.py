"""The ONNX graph computes what PyTorch computes, token by token through its cache."""

from __future__ import annotations

import pytest
import torch

from optimize import cli
from optimize.checkpoint.model import logits, opened
from optimize.errors import Refused
from optimize.evaluation.evaluate import compared
from optimize.export import onnx
from tests.optimize.conftest import silent

IDS = torch.arange(2, 34).view(1, 32)


def exported(job, precision):
    made = job("onnx", precision=precision, format="onnx", out=precision)
    return made.folder / "model", onnx.run(made, silent)


def test_fp32_is_pytorch_and_its_bytes_are_the_same_each_time(base, job):
    folder, notes = exported(job, "fp32")
    assert notes["logits_off"] < 1e-4 and notes["greedy_same"] == 64
    session = onnx.Session(folder)
    assert torch.allclose(session.logits(IDS), logits(opened(base, torch.float32), IDS), atol=1e-4)
    # The prefill in two pieces is the prefill in one.
    first, cache = session.step(IDS[:, :20].numpy(), None)
    second, _ = session.step(IDS[:, 20:].numpy(), cache)
    whole = session.logits(IDS)
    assert torch.allclose(torch.cat([torch.from_numpy(first), torch.from_numpy(second)], 1), whole, atol=1e-4)
    before = {file.name: file.read_bytes() for file in folder.glob("model.onnx*")}
    again, _ = exported(job, "fp32")
    assert before == {file.name: file.read_bytes() for file in again.glob("model.onnx*")}


@pytest.mark.parametrize(("precision", "shrinks"), [("fp16", 0.55), ("int8", 0.5), ("int4", 0.4)])
def test_fewer_bits_are_smaller_and_say_what_they_lost(precision, shrinks, base, job):
    folder, notes = exported(job, precision)
    assert 0 < notes["logits_off"] < 3
    session, plain = onnx.Session(folder), opened(base, torch.float32)
    scores = compared(lambda row: logits(plain, row), session.logits, list(IDS.split(1)), lambda _: None)
    assert (scores["kl"] > 0 or precision == "fp16") and scores["kl"] < 0.5
    weights = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    assert weights < shrinks * 4 * sum(p.numel() for p in plain.parameters()) + 500_000  # the graph itself


def test_run_onnx_answers_and_says_what_is_no_export(base, job, capsys, tmp_path):
    folder, _ = exported(job, "fp32")
    assert cli.run(["run-onnx", str(folder), "the river ran", "--tokens", "8"], lambda name: base) == 0
    said = capsys.readouterr()
    assert len(said.out.split()) >= 1 and "tokens/s" in said.err
    assert cli.run(["run-onnx", str(tmp_path), "hello"], lambda name: base) == 2
    with pytest.raises(Refused, match="is no ONNX export"):
        onnx.Session(tmp_path)
