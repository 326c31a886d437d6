"""What is kept is one plain file, whatever names and pieces the weights came in."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.adapters.adapter import WEIGHTS
from serve.adapters.shards import join
from serve.errors import AdapterRejected

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def test_the_names_that_peft_uses_inside_become_plain(tmp_path):
    tensors = {
        f"{LAYER}.lora_A.default.weight": torch.randn(2, 4, dtype=torch.bfloat16),
        f"{LAYER}.lora_B.default.weight": torch.randn(4, 2),
        "base_model.model.model.embed_tokens.lora_embedding_A.default": torch.randn(2, 8),
    }
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    join(tmp_path)
    plain = load_file(tmp_path / WEIGHTS)
    assert {name: tensor.tolist() for name, tensor in plain.items()} == {
        name.replace(".default", ""): tensor.tolist() for name, tensor in tensors.items()
    }


def test_a_file_with_plain_names_stays_as_it_is(tmp_path):
    save_file(
        {f"{LAYER}.lora_A.weight": torch.ones(2), f"{LAYER}.default.lora_B.weight": torch.ones(2)}, tmp_path / WEIGHTS
    )
    before = (tmp_path / WEIGHTS).stat()
    join(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_ino == before.st_ino


def test_a_plain_name_and_its_inner_form_together_are_a_sentence(tmp_path):
    save_file(
        {f"{LAYER}.lora_A.weight": torch.ones(2), f"{LAYER}.lora_A.default.weight": torch.ones(2)}, tmp_path / WEIGHTS
    )
    with pytest.raises(AdapterRejected, match="there twice"):
        join(tmp_path)
