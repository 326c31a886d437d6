"""A base takes adapters of its class with another head, or with none, by what those call its modules."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.adapters.adapter import WEIGHTS, Limits
from serve.adapters.conversion.conversion import convert
from serve.adapters.conversion.kinds import convertible
from serve.adapters.inspection import inspect
from serve.adapters.mixing.stacking import stack
from serve.adapters.module_names import as_in_file, bare
from serve.errors import AdapterRejected
from tests.support import peft_kinds

HEADED = {"model.layers.0.q_proj": (4, 4), "model.embed_tokens": (4, 9), "lm_head": (9, 4)}
BARE = {"layers.0.q_proj": (4, 4), "embed_tokens": (4, 9)}
LIMITS = Limits(max_rank=64)
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})


@pytest.mark.parametrize(
    ("base", "tensor", "called"),
    [
        (HEADED, "base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj"),
        (HEADED, "base_model.model.layers.0.q_proj.lora_A.weight", "layers.0.q_proj"),
        (HEADED, "base_model.model.lm_head.lora_A.weight", "model.layers.0.q_proj"),
        (HEADED, "base_model.model.bert.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj"),
        (BARE, "base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj"),
        (BARE, "base_model.model.bert.layers.0.q_proj.lora_A.weight", "bert.layers.0.q_proj"),
        (BARE, "base_model.model.head.layers.0.q_proj.lora_A.weight", "layers.0.q_proj"),
        (BARE, "." * 100_000, "layers.0.q_proj"),
    ],
)
def test_a_bases_modules_are_called_as_in_the_file_if_that_fits(base, tensor, called):
    names = as_in_file(base, [tensor])
    assert called in names and {bare(name) for name in names} == {bare(name) for name in base}


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """A LoRA that PEFT saved of a model without a head."""
    peft_kinds.trained(copy.deepcopy(peft_kinds.base().model), copy.deepcopy(LORA), tmp_path / "headless", 1)
    return tmp_path / "headless"


def test_an_adapter_of_a_model_without_a_head_fits_one_with_a_head_and_the_other_way_round(tmp_path, headless):
    headed, bare_base = peft_kinds.base(), peft_kinds.base().model
    peft_kinds.saved(headed, copy.deepcopy(LORA), tmp_path / "headed")
    for folder in (headless, tmp_path / "headed"):
        for base in (headed, bare_base):
            assert inspect(folder, peft_kinds.modules(base), LIMITS).target_modules == ("down_proj", "q_proj")


def test_patterns_match_what_the_trainer_called_the_modules(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=r"layers\.[01]\.(self_attn\.q|mlp\.down)_proj",
                             rank_pattern={r"^layers\.0\.self_attn\.q_proj": 2})  # fmt: skip
    peft_kinds.trained(copy.deepcopy(peft_kinds.base().model), config, tmp_path, 1)
    assert inspect(tmp_path, peft_kinds.modules(peft_kinds.base()), LIMITS).rank == 4


def test_a_file_calls_its_modules_by_one_kind_of_name(headless):
    tensors = load_file(headless / WEIGHTS)
    name = "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name.replace("layers", "model.layers")] = tensors.pop(name)
    save_file(tensors, headless / WEIGHTS)
    with pytest.raises(AdapterRejected, match="fits no module"):
        inspect(headless, peft_kinds.modules(peft_kinds.base()), LIMITS)


async def test_another_kind_of_adapter_of_a_model_without_a_head_becomes_a_lora(tmp_path):
    base = peft_kinds.base()
    peft_kinds.trained(copy.deepcopy(base.model), peft_kinds.KINDS["LoHa"](), tmp_path / "loha", 1)
    settings = convertible(tmp_path / "loha")
    assert settings
    (tmp_path / "lora").mkdir()
    await convert(tmp_path / "loha", tmp_path / "lora", settings, peft_kinds.modules(base), LIMITS)
    inspect(tmp_path / "lora", peft_kinds.modules(base), LIMITS)
    before, after = (
        peft.PeftModel.from_pretrained(peft_kinds.base().model, tmp_path / kind) for kind in ("loha", "lora")
    )
    with torch.no_grad():
        wanted, told = (each.eval()(peft_kinds.PROMPT).last_hidden_state for each in (before, after))
    assert float((told - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_mixture_has_one_name_for_a_module_that_its_parts_call_differently(tmp_path, headless):
    base = peft_kinds.base()
    peft_kinds.saved(base, copy.deepcopy(LORA), tmp_path / "headed", seed=2)
    (tmp_path / "mixed").mkdir()
    stack([(headless, 0.5), (tmp_path / "headed", 2.0)], tmp_path / "mixed")
    assert len(load_file(tmp_path / "mixed" / WEIGHTS)) == len(load_file(headless / WEIGHTS))
    inspect(tmp_path / "mixed", peft_kinds.modules(base), LIMITS)
    name = "layers.1.mlp.down_proj"
    products = {
        folder: tensors[f"base_model.model.{called}.lora_B.weight"]
        @ tensors[f"base_model.model.{called}.lora_A.weight"]
        for folder, called in (("headless", name), ("headed", f"model.{name}"), ("mixed", f"model.{name}"))
        if (tensors := load_file(tmp_path / folder / WEIGHTS))
    }
    scaling = 8 / 2
    wanted = scaling * (0.5 * products["headless"] + 2.0 * products["headed"])
    torch.testing.assert_close(products["mixed"], wanted)
