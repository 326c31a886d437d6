"""What may call itself an adapter, and how the others are told."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from serve.adapters.adapter import CONFIG, WEIGHTS, Adapter, Inspection, Limits, check_digest
from serve.adapters.inspection import inspect
from serve.errors import AdapterRejected, BadRequest
from serve.names import check_name, shown

MODULES = {
    "model.embed_tokens": (16, 40),
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.0.mlp.down_proj": (16, 32),
    "model.layers.1.self_attn.q_proj": (16, 16),
    "model.layers.1.self_attn.v_proj": (8, 16),
    "model.layers.1.mlp.down_proj": (16, 32),
}
LIMITS = Limits(max_rank=8)
HARD = settings(max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "150")), deadline=None)


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "base_model_name_or_path": "toy",
        **changes,
    }


def weights(
    modules: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 4, dtype=torch.bfloat16
) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (out, into) in MODULES.items():
        if name.rpartition(".")[2] in modules:
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, into).to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank).to(dtype)
    return tensors


@pytest.fixture
def pack(tmp_path: Path):
    def pack(conf: Any = None, tensors: dict[str, torch.Tensor] | bytes | None = None) -> Path:
        text = conf if isinstance(conf, bytes) else json.dumps(config() if conf is None else conf).encode()
        (tmp_path / CONFIG).write_bytes(text)
        if isinstance(tensors, bytes):
            (tmp_path / WEIGHTS).write_bytes(tensors)
        else:
            save_file(weights() if tensors is None else tensors, tmp_path / WEIGHTS)
        return tmp_path

    return pack


def refused(folder: Path, limits: Limits = LIMITS) -> str:
    with pytest.raises(AdapterRejected) as caught:
        inspect(folder, MODULES, limits)
    json.dumps(caught.value.body()).encode()
    return " | ".join([caught.value.message, *caught.value.problems])


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# What is taken


def test_a_sound_adapter_is_described(pack):
    folder = pack()
    found = inspect(folder, MODULES, LIMITS)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert found == Inspection(rank=4, base="toy", target_modules=("q_proj", "v_proj"), nbytes=size, tensors=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_that_the_engine_casts_is_taken(pack, dtype):
    assert inspect(pack(tensors=weights(dtype=dtype)), MODULES, LIMITS).tensors == 8


def test_what_peft_itself_saves_is_taken(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=40,
        )
    )  # fmt: skip
    tuned = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], rank_pattern={"q_proj": 2})
    )
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.normal_()
    tuned.save_pretrained(tmp_path, save_embedding_layers=True)
    found = inspect(tmp_path, MODULES, LIMITS)
    assert found.rank == 4
    assert found.target_modules == ("down_proj", "embed_tokens", "q_proj")


TABLE, TOKENS = (
    f"base_model.model.model.embed_tokens.{name}" for name in ("weight", "token_adapter.trainable_tokens_delta")
)


def test_an_embedding_or_the_rows_of_tokens_may_come_beside_a_lora(pack):
    whole = weights() | {TABLE: torch.randn(40, 16)}
    assert inspect(pack(config(modules_to_save=["embed_tokens"]), whole), MODULES, LIMITS).saved_modules == (
        "model.embed_tokens",
    )
    # PEFT saves an embedding that was resized without naming it.
    assert inspect(pack(config(), whole), MODULES, LIMITS).saved_modules
    assert inspect(pack(config(), weights() | {TABLE: torch.randn(43, 16)}), MODULES, LIMITS), "three tokens were added"
    rows = weights() | {TOKENS: torch.randn(2, 16)}
    for indices in ([3, 39], {"embed_tokens": [3, 39]}):
        folder = pack(config(trainable_token_indices=indices), rows)
        assert inspect(folder, MODULES, LIMITS).saved_modules == ("model.embed_tokens",)
    # The base's output layer takes no LoRA here: the engine compares the sizes.
    head = weights() | {"base_model.model.lm_head.weight": torch.randn(40, 16)}
    assert inspect(pack(config(modules_to_save=["lm_head"]), head), MODULES, LIMITS).saved_modules == ("lm_head",)


@pytest.mark.parametrize(
    ("changes", "tensors", "reason"),
    [
        ({"modules_to_save": ["embed_tokens"]}, {}, "the file has no weight of it"),
        ({"modules_to_save": "embed_tokens"}, {}, "a list of module names"),
        ({}, {TABLE: torch.randn(1065, 16)}, "at most 1024 beyond those are served"),
        ({}, {TABLE: torch.randn(39, 16)}, "trained on another vocabulary"),
        ({}, {TABLE: torch.randn(40, 8)}, "wants 16 columns"),
        ({}, {TABLE: torch.randn(40)}, "a row for each token"),
        ({}, {TABLE: torch.ones(40, 16, dtype=torch.int8)}, "is I8"),
        ({}, {TABLE: torch.full((40, 16), torch.nan)}, "NaN or infinity"),
        ({}, {"base_model.model.other.embed_tokens.weight": torch.randn(40, 16)}, "fits no module"),
        ({}, {TOKENS: torch.randn(2, 16)}, "names no tokens of it"),
        ({"trainable_token_indices": [1, 2]}, {}, "the file has no rows of tokens"),
        ({"trainable_token_indices": [1, 1]}, {TOKENS: torch.randn(2, 16)}, "names 1 tokens"),
        ({"trainable_token_indices": [1, 1064]}, {TOKENS: torch.randn(2, 16)}, "names token 1064, and the base has 40"),
        ({"trainable_token_indices": [-1]}, {}, "a list of token numbers"),
        ({"trainable_token_indices": {"embed_tokens": 5}}, {}, "a list of token numbers"),
        ({"ensure_weight_tying": 1}, {}, "it must be true or false"),
        (
            {"target_modules": ["embed_tokens"]},
            {
                TABLE: torch.randn(40, 16),
                TABLE.replace("weight", "lora_embedding_A"): torch.randn(4, 40),
                TABLE.replace("weight", "lora_embedding_B"): torch.randn(16, 4),
            },
            "adapted in two ways",
        ),
    ],
)
def test_a_saved_module_that_does_not_fit_is_refused_with_the_reason(pack, changes, tensors, reason):
    assert reason in refused(pack(config(**changes), weights() | tensors))


SCORE, BIAS = "base_model.model.score.weight", "base_model.model.score.bias"


def test_a_classification_head_has_its_labels_names(pack):
    settings = config(task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    tensors = weights() | {SCORE: torch.randn(3, 16)}
    assert inspect(pack(settings, tensors), MODULES, LIMITS).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    named = {**settings, "id2label": {"0": "good", "2": "bad"}}
    assert inspect(pack(named, tensors), MODULES, LIMITS).labels == ("good", "LABEL_1", "bad")


@pytest.mark.parametrize(
    ("changes", "tensors", "reason"),
    [
        ({}, {SCORE: torch.randn(128, 16)}, "has 128 labels; up to 127 are served"),
        ({}, {SCORE: torch.zeros(1_000_000, 1)}, "has 1000000 labels; up to 127 are served"),
        ({}, {SCORE: torch.randn(16)}, "a row for each label"),
        ({}, {SCORE: torch.zeros(0, 16)}, "a row for each label"),
        ({}, {SCORE: torch.full((2, 16), torch.inf)}, "NaN or infinity"),
        ({}, {BIAS: torch.zeros(2)}, "0 classification heads with a weight"),
        ({}, {SCORE: torch.ones(2, 16), BIAS: torch.zeros(5)}, "score.bias` is [5], and its weight [2, 16]"),
        ({}, {SCORE: torch.ones(2, 16), BIAS: torch.zeros(1)}, "score.bias` is [1], and its weight [2, 16]"),
        ({}, {SCORE: torch.ones(2, 16), SCORE.replace("score", "classifier"): torch.ones(2, 16)}, "one is served"),
        ({"modules_to_save": ["score"]}, {}, "the file has no weight of it"),
        ({"id2label": ["a"]}, {SCORE: torch.ones(2, 16)}, "id2label is"),
        ({"id2label": {"0": "a", "1": "a"}}, {SCORE: torch.ones(2, 16)}, "different printable names"),
        ({"id2label": {"0": "\u202e"}}, {SCORE: torch.ones(2, 16)}, "different printable names"),
        ({"id2label": {str(n): str(n) for n in range(1000)}}, {SCORE: torch.ones(2, 16)}, "up to 127 numbers"),
        ({"problem_type": 5}, {SCORE: torch.ones(2, 16)}, "it must be a text"),
    ],
)
def test_a_head_that_is_not_served_is_refused_with_the_reason(pack, changes, tensors, reason):
    assert reason in refused(pack(config(**changes), weights() | tensors))


def magnitudes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same adapter as a DoRA."""
    stems = [name.removesuffix(".lora_B.weight") for name in tensors if name.endswith(".lora_B.weight")]
    return tensors | {
        f"{stem}.lora_magnitude_vector": torch.ones(len(tensors[f"{stem}.lora_B.weight"])) for stem in stems
    }


def test_a_dora_has_a_magnitude_for_each_output_of_every_module(pack):
    tensors = magnitudes(weights())
    assert inspect(pack(config(use_dora=True), tensors), MODULES, LIMITS).rank == 4
    name = next(name for name in tensors if name.endswith("q_proj.lora_magnitude_vector"))
    for wrong, sentence in (
        (torch.ones(7), "is [7]; the base wants [16]"),
        (torch.ones(16, 1), "is [16, 1]; the base wants [16]"),
        (torch.full((16,), torch.inf), "holds NaN or infinity"),
        (torch.full((16,), torch.nan), "holds NaN or infinity"),
        (torch.zeros(16), "is zero throughout"),
        (torch.zeros(0), "is [0]; the base wants [16]"),
        (torch.ones(16, dtype=torch.int32), "is I32"),
    ):
        assert sentence in refused(pack(config(use_dora=True), tensors | {name: wrong}))
    assert "use_dora is not set" in refused(pack(config(), tensors))
    assert "has no lora_magnitude_vector" in refused(pack(config(use_dora=True), weights()))
    both = tensors | {f"{name}.weight": torch.ones(16)}
    assert "is the second lora_magnitude" in refused(pack(config(use_dora=True), both))
    stem = "base_model.model.model.embed_tokens"
    table = {f"{stem}.lora_embedding_A": torch.randn(4, 40), f"{stem}.lora_embedding_B": torch.randn(16, 4)}
    table |= {f"{stem}.lora_magnitude_vector": torch.ones(16)}
    assert "linear layers alone" in refused(pack(config(use_dora=True, target_modules=["embed_tokens"]), table))


def test_a_rank_pattern_gives_modules_their_own_rank(pack):
    tensors = weights(("v_proj",), rank=4) | weights(("q_proj",), rank=2)
    assert inspect(pack(config(rank_pattern={"q_proj": 2}), tensors), MODULES, LIMITS).rank == 4
    refusal = refused(pack(config(rank_pattern={"layers.0.self_attn.q_proj": 2}), tensors))
    assert "layers.1.self_attn.q_proj.lora_A.weight` is [2, 16]; the base and rank 4 want [4, 16]" in refusal


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"]])
def test_targets_may_be_a_list_a_pattern_or_all_linear(pack, targets):
    assert inspect(pack(config(target_modules=targets)), MODULES, LIMITS).target_modules == ("q_proj", "v_proj")


def test_fields_that_peft_will_add_are_no_reason_to_refuse(pack):
    assert inspect(pack(config(some_new_field={"x": 1}, loftq_config={}, lora_dropout=0.1)), MODULES, LIMITS)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_an_initialization_that_leaves_the_base_alone_is_taken(pack, init):
    assert inspect(pack(config(init_lora_weights=init)), MODULES, LIMITS)


# What the configuration gives away


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"modules_to_save": ["lm_head", "norm"]}, "alone are served"),
    ],
)
def test_what_can_be_merged_is_refused_with_that_way_out(pack, change, reason):
    refusal = refused(pack(config(**change)))
    assert reason in refusal
    assert "merge it into its base with `loradock optimize`" in refusal


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": "all"}, "biases"),
        ({"bias": None}, "biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "base's weights"),
        ({"init_lora_weights": "loftq"}, "train it again with init_lora_weights true"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [5]}, "activated LoRA"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"target_parameters": ["experts.down_proj"]}, "fused experts"),
    ],
)
def test_what_cannot_be_merged_either_is_refused_without_that_advice(pack, change, reason):
    refusal = refused(pack(config(**change)))
    assert reason in refusal
    assert "merge it" not in refusal
    assert "train it again" in refusal or "save it again" in refusal


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "whole number"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -1.5}, "finite number above 0"),
        ({"lora_alpha": 10**400}, "finite number above 0"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", 3]}, "target_modules"),
        ({"target_modules": "("}, "no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern gives 0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"((a{999}){999}){999}": 2}}, "counted repeats"),
        ({"alpha_pattern": {"q_proj": "16"}}, "alpha_pattern"),
        ({"use_rslora": "false"}, "true or false"),
        ({"base_model_name_or_path": "a\x00b"}, "printable"),
        ({"r": 16}, "rank 16 is above the 8 that this server takes; retrain, or raise max_lora_rank"),
        ({"rank_pattern": {"nothing": 16}}, "rank 16 is above"),
    ],
)
def test_a_configuration_that_says_nonsense_is_told_so(pack, change, reason):
    assert reason in refused(pack(config(**change)))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"r": 1, "r": 2}',
        b'{"lora_alpha": NaN}',
        b'{"r": 1e999}',
        b"[" * 100000,
        b"9" * 5000,
        b" " * (1 << 20) + b"{}",
    ],
)
def test_a_configuration_that_is_no_json_object_is_refused(pack, text):
    assert CONFIG in refused(pack(text))


def test_a_pattern_that_would_hang_the_engine_is_refused_in_time(pack):
    slow = r"(.|..|...)*(?!.)(?<=0)"
    assert "takes too long to match" in refused(pack(config(rank_pattern={slow: 2})))
    assert "takes too long to match" in refused(pack(config(alpha_pattern={slow: 2})))
    assert "takes too long to match" in refused(pack(config(target_modules=slow)))


# What the tensors give away


def test_all_that_does_not_fit_is_named_at_once(pack):
    tensors = weights()
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 16)
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] = torch.ones(4, 32)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 17)
    tensors["base_model.model.model.norm.weight"] = torch.ones(16)
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"] = torch.ones(8, 4, dtype=torch.int32)
    folder = pack(config(target_modules=["q_proj", "v_proj", "gate_proj"]), tensors)
    with pytest.raises(AdapterRejected) as caught:
        inspect(folder, MODULES, LIMITS)
    text = "\n".join(caught.value.problems)
    assert caught.value.status == 422
    assert len(caught.value.problems) == 6
    assert "6 things are wrong" in caught.value.message and "trained on toy" in caught.value.message
    assert "layers.7.self_attn.q_proj.lora_A.weight` fits no module of the base" in text
    assert "`model.layers.0.mlp.down_proj` has lora_A and no lora_B" in text
    assert "is [4, 17]; the base and rank 4 want [4, 16]" in text
    assert "norm.weight` is not a LoRA tensor" in text
    assert "is I32; save the adapter as BF16" in text
    assert "`gate_proj`, and that matches no module of the base" in text


def test_an_adapter_that_fits_nothing_is_refused_and_not_ignored(pack):
    tensors = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in weights().items()}
    assert "would change nothing" in refused(pack(tensors=tensors))


def test_a_target_without_tensors_is_a_half_saved_adapter(pack):
    refusal = refused(pack(config(target_modules=["q_proj", "v_proj", "down_proj"])))
    assert "`down_proj`, and that matches no tensor of the file" in refusal


def test_one_module_cannot_be_named_twice(pack):
    tensors = weights()
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 16)
    assert "the second lora_A" in refused(pack(tensors=tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_the_tensor_that_holds_them(pack, value, dtype):
    tensors = weights(dtype=dtype)
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][7, 3] = value
    refusal = refused(pack(tensors=tensors))
    assert "layers.1.self_attn.v_proj.lora_B.weight` holds NaN or infinity" in refusal
    assert "lora_A" not in refusal


def test_an_untrained_adapter_is_refused_because_it_changes_nothing(pack):
    tensors = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in weights().items()}
    assert "saved before training" in refused(pack(tensors=tensors))


def test_one_idle_module_is_no_reason_to_refuse(pack):
    tensors = weights()
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] *= 0
    assert inspect(pack(tensors=tensors), MODULES, LIMITS)


def test_another_vocabulary_is_found_in_the_copy_of_the_embedding(pack):
    tensors = weights() | {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(41, 16)}
    assert "another vocabulary" in refused(pack(tensors=tensors))


def test_a_deployment_may_allow_some_modules_only(pack):
    limits = Limits(max_rank=8, allowed_target_modules=frozenset({"q_proj"}))
    assert "adapts `v_proj`; this server allows q_proj" in refused(pack(), limits)


def test_a_deployment_may_allow_some_digests_only():
    limits = Limits(max_rank=8, allowed_digests=frozenset({"a" * 64}))
    assert check_digest("a" * 64, limits) == "a" * 64
    assert check_digest("b" * 64, LIMITS) == "b" * 64
    with pytest.raises(AdapterRejected, match="approved"):
        check_digest("b" * 64, limits)


def test_a_thousand_problems_are_a_readable_list(pack):
    tensors = {f"base_model.model.x{number}.lora_A.weight": torch.ones(1) for number in range(1000)}
    folder = pack(tensors=tensors)
    with pytest.raises(AdapterRejected, match="1003 things") as caught:
        inspect(folder, MODULES, LIMITS)
    assert len(caught.value.problems) == 201 and caught.value.problems[-1] == "... and 803 more"


# What the bytes give away


def test_a_pickle_under_a_safetensors_name_is_refused_by_its_content(pack, tmp_path):
    import io
    import pickle

    zipped = io.BytesIO()
    torch.save({"x": torch.ones(2)}, zipped)
    assert "zip file" in refused(pack(tensors=zipped.getvalue()))
    assert "Python pickle" in refused(pack(tensors=pickle.dumps({"x": 1})))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\x01", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"GGUF\x03\0\0\0" + bytes(20), "GGUF"),
        (struct.pack("<Q", 1 << 40) + b"{}", "this server reads up to"),
        (raw({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "cut short"),
        (raw({}, b"PK\x03\x04"), "belong to no tensor"),
        (raw({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), "begins at byte"),
        (raw({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), "holds 4 bytes"),
        (raw({"t": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "unknown type"),
        (raw({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), "wrongly"),
        (raw({"t": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)), "wrongly"),
        (raw({"t": 7}), "wrongly"),
        (raw({"__metadata__": {"a": 1}}), "__metadata__"),
        (raw(b'{"a":1,"a":1}'), "twice"),
        (raw(b'{"\\ud800": 1}'), "wrongly"),
        (raw(b"{" * 50_000), "JSON"),
    ],
)
def test_bytes_that_are_no_safetensors_are_refused_before_they_are_used(pack, data, reason):
    assert reason in refused(pack(tensors=data))


def test_overlapping_tensors_are_refused(pack):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert "begins at byte" in refused(pack(tensors=raw({"a": entry, "b": entry}, bytes(8))))


def test_a_missing_file_is_named(tmp_path, pack):
    assert f"{CONFIG} is missing" in refused(tmp_path)
    pack()
    (tmp_path / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refused(tmp_path)


def test_a_link_is_not_followed(tmp_path, pack):
    folder = pack()
    (folder / CONFIG).rename(folder / "elsewhere.json")
    (folder / CONFIG).symlink_to(folder / "elsewhere.json")
    assert "plain file" in refused(folder)
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)
    assert "plain file" in refused(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
        "use_dora",
        "use_rslora",
        "init_lora_weights",
        "base_model_name_or_path",
        "exclude_modules",
        "layer_replication",
    ]
)


def judged(folder: Path) -> None:
    """Either verdict will do; any other exception fails the test."""
    try:
        inspect(folder, MODULES, LIMITS)
    except AdapterRejected as refusal:
        json.dumps(refusal.body()).encode()
        refusal.message.encode()


@HARD
@given(st.dictionaries(fields, json_values, max_size=4))
def test_no_configuration_brings_the_judge_down(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("case")
    (folder / CONFIG).write_text(json.dumps(config(**changes)))
    save_file(weights(), folder / WEIGHTS)
    judged(folder)


header_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 20), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 200), min_size=2, max_size=2) | json_values,
    },
)


@HARD
@given(
    st.dictionaries(st.sampled_from(sorted(weights())) | st.text(max_size=9), header_entries | json_values), st.binary()
)
def test_no_header_brings_the_judge_down(tmp_path_factory, header, data):
    folder = tmp_path_factory.mktemp("case")
    (folder / CONFIG).write_text(json.dumps(config()))
    (folder / WEIGHTS).write_bytes(raw(header, data))
    judged(folder)


@HARD
@given(st.data())
def test_no_flipped_or_missing_byte_brings_the_judge_down(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("case")
    (folder / CONFIG).write_text(json.dumps(config()))
    save_file(weights(), folder / WEIGHTS)
    content = bytearray((folder / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    judged(folder)


# The value


def test_an_adapter_has_one_name_for_the_engine_and_one_for_people():
    adapter = Adapter("pirate", 3, "0123456789abcdef" * 4, 8, None, ("q_proj",), 100, 0.0)
    assert adapter.id == "pirate@0123456789ab"
    assert adapter.tag == "pirate@v3"


@pytest.mark.parametrize("name", ["a", "A-1.b_c", "x" * 64, "7"])
def test_a_plain_name_is_taken(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a@v1", "x" * 65, "a\n", "ü", "../x", "a b", None, 3])
def test_a_name_that_could_be_something_else_is_refused(name):
    with pytest.raises(BadRequest, match="cannot be an adapter's name"):
        check_name(name)


@HARD
@given(st.text() | json_values)
def test_whatever_is_shown_is_short_and_printable(value):
    text = shown(value)
    assert text.isprintable() and len(text.encode()) < 1000


def test_the_scan_reads_bits_as_numpy_reads_floats(tmp_path):
    from serve.adapters.tensors import Tensor, scan

    rng = np.random.default_rng(7)
    bits = rng.integers(0, 1 << 16, 4096, dtype=np.uint16)
    path = tmp_path / "bits"
    for at in range(0, 4096, 64):
        chunk = bits[at : at + 64]
        path.write_bytes(chunk.tobytes())
        with path.open("rb") as file:
            finite, zero = scan(file, Tensor("t", "F16", (64,), 0, 128))
        assert finite == bool(np.isfinite(chunk.view(np.float16)).all())
        assert zero == bool((chunk.view(np.float16) == 0).all())
