"""A LoHa that is pushed becomes a LoRA, and its version says what that cost."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from tests.support import tiny
from tests.support.app import upload


def loha(folder, rank):
    folder.mkdir()
    settings = {"peft_type": "LOHA", "r": rank, "alpha": 2 * rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    draw = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(tiny.LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.hada_w"
        for number in (1, 2):
            tensors[f"{name}{number}_a"] = torch.randn(tiny.HIDDEN, rank, generator=draw)
            tensors[f"{name}{number}_b"] = torch.randn(rank, tiny.HIDDEN, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


async def test_a_loha_is_served_as_a_lora_and_its_version_says_how_far_it_is_off(client, backend, tmp_path):
    folder = loha(tmp_path / "loha", 3)
    pushed = await client.post("/v1/adapters", **upload(folder, conversion_error="0.3"))
    assert pushed.status_code == 201, pushed.text
    facts = pushed.json()["checks"]["conversion"]
    assert facts["kind"] == "LoHa" and facts["allowed_error"] == 0.3
    assert 0.05 < facts["error"] <= 0.3 and facts["rank"] == pushed.json()["rank"] < 9
    assert facts["left_out_effect"] > 0
    assert any(probed and probed.endswith("-remainder") for probed in backend.probes)
