"""The base's modules, from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.errors import ConfigError
from serve.models.lora_modules import kept_lora_modules, lora_modules, module_shapes

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}
QUANTIZED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            }
        },
    }
}


def write(folder: Path, **changes) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)


def test_a_llama_has_the_modules_that_its_checkpoint_names(tmp_path):
    shapes = module_shapes(write(tmp_path))
    assert shapes["model.layers.0.self_attn.q_proj"] == (64, 64)
    assert shapes["model.layers.1.self_attn.k_proj"] == (32, 64)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 160)
    assert shapes["model.embed_tokens"] == (64, 300)
    assert shapes["lm_head"] == (300, 64)
    assert len(shapes) == 2 * 7 + 2


def test_a_quantized_checkpoint_has_the_modules_of_its_base(tmp_path):
    plain = module_shapes(write(tmp_path))
    assert module_shapes(write(tmp_path, **QUANTIZED)) == plain


def test_the_engine_decides_about_embeddings(tmp_path):
    llama = lora_modules(write(tmp_path))
    assert {"lm_head", "model.embed_tokens"} < set(llama)
    mistral = lora_modules(write(tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", head_dim=16))
    assert "model.layers.0.self_attn.q_proj" in mistral
    assert not {"lm_head", "model.embed_tokens"} & set(mistral)
    assert "lm_head" in lora_modules(write(tmp_path), embeddings=["lm_head"])
    assert "model.embed_tokens" not in lora_modules(write(tmp_path), embeddings=["lm_head"])


def test_the_shapes_are_those_of_a_really_built_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        kept = {name.removesuffix(".weight"): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    shapes = module_shapes(str(tmp_path))
    for name, shape in kept.items():
        if not name.endswith("norm"):
            assert shapes[name] == (shape[::-1] if name.endswith("embed_tokens") else shape)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "nonesuch"}'])
def test_a_folder_without_a_usable_configuration_says_so(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json|architecture"):
        module_shapes(str(tmp_path))


def test_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ConfigError, match="give a folder"):
        module_shapes(str(tmp_path / "nothing"))


def test_what_was_listed_once_is_read_from_the_cache(tmp_path, monkeypatch):
    model, cache = write(tmp_path), tmp_path / "cache"
    first = kept_lora_modules(model, cache)
    assert first == lora_modules(model)
    monkeypatch.setattr("serve.models.lora_modules.lora_modules", lambda model: {"again": (1, 2)})
    assert kept_lora_modules(model, cache) == first
    assert kept_lora_modules(write(tmp_path, hidden_size=128), cache) == {"again": (1, 2)}
    write(tmp_path)
    for file in cache.iterdir():
        file.write_text("[1]")
    assert kept_lora_modules(model, cache) == {"again": (1, 2)}
    assert kept_lora_modules(str(tmp_path / "of-a-hub"), cache) == {"again": (1, 2)}
