"""What is written for an adapter of another kind does what PEFT does with the adapter itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.adapters.adapter import CONFIG, WEIGHTS, Limits
from serve.adapters.conversion import program
from serve.adapters.inspection import inspect
from tests.support import peft_kinds


@pytest.fixture(scope="module")
def model() -> Any:
    return peft_kinds.base()


def convert(folder: Path, model: Any, *, max_rank: int = 32, bound: float = 0.001) -> tuple[Path, dict[str, Any]]:
    into = folder / "lora"
    into.mkdir(exist_ok=True)
    settings = json.loads((folder / CONFIG).read_text())
    facts = program.convert(
        {
            "folder": str(folder), "into": str(into), "kind": settings["peft_type"], "settings": settings,
            "modules": peft_kinds.modules(model), "max_rank": max_rank, "bound": bound, "seconds": 1000.0,
        }
    )  # fmt: skip
    return into, facts


@pytest.mark.parametrize("kind", peft_kinds.KINDS)
def test_the_lora_gives_the_logits_of_the_adapter_it_was_made_of(kind: str, model: Any, tmp_path: Path) -> None:
    expected = peft_kinds.saved(model, peft_kinds.KINDS[kind](), tmp_path)
    into, facts = convert(tmp_path, model)
    assert inspect(into, peft_kinds.modules(model), Limits(max_rank=32)).rank == facts["rank"]
    assert facts["error"] <= 0.001
    plain = peft_kinds.logits(model)
    assert (expected - plain).abs().max() > 0.05
    assert (peft_kinds.loaded(model, into) - expected).abs().max() < 0.01 * (expected - plain).abs().max()


def test_a_larger_bound_takes_a_smaller_rank_and_says_how_far_it_is_off(model: Any, tmp_path: Path) -> None:
    peft_kinds.saved(model, peft_kinds.KINDS["LoHa"](), tmp_path)
    _, exact = convert(tmp_path, model)
    into, facts = convert(tmp_path, model, bound=0.3)
    assert facts["rank"] < exact["rank"]
    assert 0.001 < facts["error"] <= 0.3 and facts["worst_error"] >= facts["error"]
    _, deltas = zip(*sorted(_deltas(tmp_path, model).items()), strict=True)
    off = torch.stack([part.square().sum() for part in _differences(into, _deltas(tmp_path, model))]).sum()
    whole = torch.stack([delta.square().sum() for delta in deltas]).sum()
    assert facts["error"] == pytest.approx(float((off / whole).sqrt()), abs=1e-4)
    # What was left out, as a LoRA of its own, is the rest.
    rest = torch.stack(
        [part.square().sum() for part in _differences(into, _deltas(tmp_path, model), into / "remainder")]
    ).sum()
    assert rest < 1e-6 * whole


def test_what_no_rank_here_is_enough_for_is_refused_with_the_rank_that_would_be(
    monkeypatch: pytest.MonkeyPatch, model: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "BEGAN", time.monotonic())  # it looks for that rank for half of its time
    peft_kinds.saved(model, peft_kinds.KINDS["LoHa"](), tmp_path)
    _, exact = convert(tmp_path, model, bound=0.05)
    with pytest.raises(program.Refused, match=rf"rank {exact['rank']} would be needed"):
        convert(tmp_path, model, max_rank=1, bound=0.05)


def test_large_matrices_are_projected_and_their_error_is_measured(monkeypatch: pytest.MonkeyPatch, model: Any,
                                                                  tmp_path: Path) -> None:  # fmt: skip
    peft_kinds.saved(model, peft_kinds.KINDS["LoHa"](), tmp_path)
    _, whole = convert(tmp_path, model, max_rank=8, bound=0.3)
    monkeypatch.setattr(program, "WHOLE", 8)
    monkeypatch.setattr(program, "BEYOND", 4)
    into, projected = convert(tmp_path, model, max_rank=8, bound=0.3)
    assert projected["rank"] - whole["rank"] in (0, 1)
    assert projected["error"] <= 0.31
    first = (into / WEIGHTS).read_bytes()
    convert(tmp_path, model, max_rank=8, bound=0.3)
    assert (into / WEIGHTS).read_bytes() == first, "the same adapter pushed twice would be two versions"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"drop": "layers.0.self_attn.q_proj.hada_w1_a"}, "hada_w1_a` is missing"),
        ({"add": "base_model.model.model.layers.7.self_attn.q_proj.hada_w1_a"}, "fits no module"),
        ({"shape": "layers.1.self_attn.v_proj.hada_w2_b"}, "and the configuration want"),
        ({"config": {"r": -3}}, "PEFT does not build it"),
        ({"config": {"r": "many"}}, "PEFT does not build it"),
        ({"config": {"rank_pattern": {"q_proj": 5}}}, "and the configuration want"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], sentence: str, model: Any, tmp_path: Path) -> None:
    peft_kinds.saved(model, peft_kinds.KINDS["LoHa"](), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    if name := change.get("drop"):
        tensors = {key: tensor for key, tensor in tensors.items() if name not in key}
    if name := change.get("add"):
        tensors[name] = torch.ones(2, 2)
    if name := change.get("shape"):
        tensors = {key: tensor[:, :5].contiguous() if name in key else tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    settings = {**json.loads((tmp_path / CONFIG).read_text()), **change.get("config", {})}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(program.Refused) as refusal:
        convert(tmp_path, model)
    assert sentence in " | ".join(refusal.value.args)


def _deltas(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    settings = json.loads((folder / CONFIG).read_text())
    shapes = peft_kinds.modules(model)
    layers = dict(program._layers(settings["peft_type"], settings, shapes, load_file(folder / WEIGHTS)))
    return dict(program._matrices(layers, shapes))


def _differences(into: Path, deltas: dict[str, torch.Tensor], *more: Path) -> list[torch.Tensor]:
    left = dict(deltas)
    for folder in (into, *more):
        tensors = load_file(folder / WEIGHTS)
        for name in left:
            key = f"base_model.model.{name}.lora_"
            left[name] = left[name] - tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
    return list(left.values())
