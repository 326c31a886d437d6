"""A LoRA in llama.cpp's format: the same adapter as PEFT's, pushed the same way; hostile ones are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.client.adapter_client import adapter_files
from serve.errors import ConfigError
from serve.models.gguf.adapter import write_peft
from tests.support import gguf_files, tiny

HEADS = {"q_proj": 2, "k_proj": 2}


def written(file: Path, base: Path, out: Path) -> tuple[dict, dict]:
    out.mkdir()
    write_peft(file, base, out / "config.json", out / "weights.safetensors")
    return json.loads((out / "config.json").read_text()), load_file(out / "weights.safetensors")


@pytest.fixture
def all_modules(tmp_path: Path) -> Path:
    """Of every linear layer, of two ranks."""
    folder = tiny.adapter(tmp_path / "peft")
    sizes = {"self_attn.q_proj": 16, "self_attn.k_proj": 16, "self_attn.v_proj": 16, "self_attn.o_proj": 16}
    sizes |= {"mlp.gate_proj": 32, "mlp.up_proj": 32, "mlp.down_proj": 16}
    tensors = {}
    for module, outputs in sizes.items():
        rank = 4 if module == "mlp.down_proj" else 2
        name = f"base_model.model.model.layers.1.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 32 if module == "mlp.down_proj" else 16)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank).half().float()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_numbers_names_and_scales_are_pefts(all_modules, tiny_model, tmp_path):
    file = gguf_files.adapter(tmp_path / "a.gguf", all_modules, HEADS)
    config, tensors = written(file, tiny_model, tmp_path / "out")
    original = load_file(all_modules / "adapter_model.safetensors")
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name], original[name]) for name in original)
    assert (config["r"], config["lora_alpha"]) == (2, 4.0)
    assert config["rank_pattern"] == {"model.layers.1.mlp.down_proj": 4}
    assert "q_proj" in config["target_modules"] and config["peft_type"] == "LORA"


def test_logits_are_those_of_the_peft_original(all_modules, tmp_path):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tiny.model((tmp_path / "base").resolve()) if (tmp_path / "base").mkdir() is None else None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).eval()
    config = json.loads((all_modules / "adapter_config.json").read_text())
    config |= {"target_modules": sorted(name.rpartition(".")[2] for name in gguf_files.GGUF_NAMES)}
    config |= {"layers_to_transform": [1], "rank_pattern": {"down_proj": 4}}
    (all_modules / "adapter_config.json").write_text(json.dumps(config))
    file = gguf_files.adapter(tmp_path / "a.gguf", all_modules, HEADS)
    (out := tmp_path / "out").mkdir()
    write_peft(file, base, out / "adapter_config.json", out / "adapter_model.safetensors")
    ids, logits = torch.tensor([[1, 5, 9, 3, 30]]), []
    for folder in (all_modules, out):
        adapted = PeftModel.from_pretrained(model, str(folder))
        with torch.no_grad():
            logits.append(adapted(ids).logits)
        model = adapted.unload()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, logits[0])
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"adapter_type": "control_vector"}, "only lora is taken"),
        ({"family": "mamba"}, "architecture 'mamba'"),
        ({"adapter_alora_invocation": "1"}, "activated LoRA"),
    ],
)
def test_what_is_no_plain_lora_of_a_known_family_is_refused(given, sentence, tiny_model, make_adapter, tmp_path):
    file = gguf_files.adapter(tmp_path / "a.gguf", make_adapter(), HEADS, **given)
    with pytest.raises(ConfigError, match=sentence):
        written(file, tiny_model, tmp_path / "out")


def test_a_model_is_no_adapter(tiny_model, tmp_path):
    for said in ({"general.type": "model"}, {}):  # older converters say nothing
        file = gguf_files.write(tmp_path / "model.gguf", extra=said)
        with pytest.raises(ConfigError, match="is a model, not an adapter"):
            written(file, tiny_model, tmp_path / f"out{len(said)}")


def test_no_mutated_file_ends_in_anything_but_a_sentence(tiny_model, make_adapter, tmp_path):
    whole = gguf_files.adapter(tmp_path / "whole.gguf", make_adapter(), HEADS).read_bytes()
    draw, refused = random.Random(0), 0
    for number in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            data[draw.randrange(min(900, len(data)))] = draw.randrange(256)
        (file := tmp_path / "mutated.gguf").write_bytes(data[: draw.choice((len(data), draw.randrange(len(data))))])
        try:
            written(file, tiny_model, tmp_path / f"out{number}")
        except ConfigError as error:
            refused += len(error.message) > 20
    assert refused > 60


async def test_a_pushed_file_becomes_the_version_that_the_peft_folder_is(client, make_adapter, tmp_path):
    folder = make_adapter()
    file = gguf_files.adapter(tmp_path / "tone.gguf", folder, HEADS)
    assert adapter_files(file) == [file]

    async def push(name: str, content: bytes, **fields: str):
        files = [("files", (name, content))]
        return await client.post("/v1/adapters", data={"name": "tone", **fields}, files=files)

    tried = await push("tone.gguf", file.read_bytes(), dry_run="true")
    assert tried.json()["rank"] == 2 and tried.json()["target_modules"] == ["q_proj"], tried.text
    pushed = await push("tone.gguf", file.read_bytes())
    assert pushed.status_code == 201, pushed.text
    again = await push("other-name.gguf", file.read_bytes())
    assert (again.status_code, again.json()["digest"]) == (200, pushed.json()["digest"])
    kept = await client.get("/v1/adapters/tone/versions/1/files/adapter_model.safetensors")
    (out := tmp_path / "kept.safetensors").write_bytes(kept.content)
    original = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(values, original[name]) for name, values in load_file(out).items())


async def test_a_pushed_file_that_is_none_is_a_422_in_a_sentence(client, make_adapter, tmp_path):
    cut = gguf_files.adapter(tmp_path / "tone.gguf", make_adapter(), HEADS).read_bytes()[:300]
    refused = await client.post("/v1/adapters", data={"name": "tone"}, files=[("files", ("tone.gguf", cut))])
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("this GGUF file ends within")
