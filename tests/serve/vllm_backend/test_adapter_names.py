"""vLLM's own models that pool take an adapter by each name that fits, and refuse what they would drop.

So do models that take pictures: of an adapter over all attention layers, vLLM keeps the language model's part alone.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("its layers are built on a CPU", allow_module_level=True)

from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named
from serve.vllm_backend.worker_extension import LOADED
from tests.support import peft_kinds
from tests.support.vllm_worker import LayersOnly, one_worker

OURS = "serve.cpu_kernels.punica.Punica"
LABELS = 3


@pytest.fixture(scope="module", autouse=True)
def worker(tmp_path_factory):
    with one_worker(tmp_path_factory.mktemp("init")):
        apply(named("lora-kernels"))
        yield


@pytest.fixture
def classifier(tmp_path, monkeypatch):
    """A base with a head, saved, and in vLLM's layers with our LoRA operations."""
    config = copy.deepcopy(peft_kinds.base().config)
    config.num_labels, config.pad_token_id = LABELS, 0
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda _: OURS))
    return base, LayersOnly(tmp_path / "base", runner="pooling")


def lora(**more):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "gate_proj", "down_proj"], **more)


def test_an_adapter_trained_without_a_head_reaches_the_same_layers_as_one_with_a_head(tmp_path, classifier):
    base, engine = classifier
    peft_kinds.trained(copy.deepcopy(base.model), lora(use_dora=True), tmp_path / "headless", 1)
    peft_kinds.trained(copy.deepcopy(base), lora(use_dora=True), tmp_path / "headed", 1)
    for number, name in enumerate(("headless", "headed"), 1):
        assert engine.load(tmp_path / name, number) == LOADED
    mine, theirs = engine.adapters.get_adapter(1), engine.adapters.get_adapter(2)
    assert mine.loras.keys() == theirs.loras.keys() >= {"model.layers.1.mlp.gate_up_proj"}
    assert mine.loradock_magnitudes.keys() == theirs.loradock_magnitudes.keys()
    assert {name.partition(".")[0] for name in mine.loradock_magnitudes} == {"model"}


def test_what_no_layer_takes_is_refused_where_no_probe_would_tell(tmp_path, classifier):
    _, engine = classifier
    other = copy.deepcopy(peft_kinds.base().config)
    other.num_hidden_layers = 3
    peft_kinds.trained(type(peft_kinds.base())(other).model, lora(), tmp_path / "deep", 1)
    assert "puts no LoRA on layers.2.mlp.down_proj" in engine.load(tmp_path / "deep", 1)


def test_heads_of_adapters_take_the_place_of_the_bases_for_their_own_requests(tmp_path, classifier):
    base, engine = classifier
    heads = {}
    for number in (1, 2):
        trained = peft_kinds.trained(copy.deepcopy(base), lora(task_type="SEQ_CLS"), tmp_path / str(number), number)
        heads[number] = trained.base_model.model.score.modules_to_save["default"].weight
        assert engine.load(tmp_path / str(number), number) == LOADED
    heads[0] = base.score.weight
    requests, hidden = [2, 0, 1, 0], torch.randn(4, peft_kinds.HIDDEN)
    engine.step([request for request in requests for _ in range(5)], requests)  # five tokens each
    with torch.no_grad():
        scores = engine.model.score(hidden)
    for row, request in enumerate(requests):
        torch.testing.assert_close(scores[row], hidden[row] @ heads[request].T, rtol=1e-4, atol=1e-4)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A small LLaVA, saved as those of hubs are, and in vLLM's layers with our LoRA operations."""
    text = copy.deepcopy(peft_kinds.base().config)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31, image_seq_length=4)
    base = LlavaForConditionalGeneration(config).eval()
    base.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    tower = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in weights}
    save_file({tower[name]: each for name, each in weights.items()}, tmp_path / "base/model.safetensors")
    monkeypatch.setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda _: OURS))
    return base, LayersOnly(tmp_path / "base")


def test_a_model_that_takes_pictures_takes_adapters_of_its_language_model(tmp_path, pictures):
    base, engine = pictures
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|down_proj)")
    trained = peft_kinds.trained(copy.deepcopy(base), config, tmp_path / "lora", 1)
    assert engine.load(tmp_path / "lora", 1) == LOADED
    x = torch.randn(4, 64)
    engine.step([1, 0, 1, 0])
    with torch.no_grad():
        served = engine.adapters.modules["language_model.model.layers.1.mlp.down_proj"](x)[0]
        layer = trained.base_model.model.model.language_model.layers[1].mlp.down_proj
        wanted = torch.where(torch.tensor([[True], [False], [True], [False]]), layer(x), layer.base_layer(x))
    assert (served - wanted).abs().max() < 1e-5 and (layer(x) - layer.base_layer(x)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("targets", "stray"),
    [
        (["q_proj", "v_proj"], "vision_tower.encoder.layers.0.self_attn.q_proj"),
        (r".*vision_tower.*fc1", "vision_tower.encoder.layers.0.mlp.fc1"),
        (r".*multi_modal_projector.linear_.", "multi_modal_projector.linear_1, multi_modal_projector.linear_2"),
    ],
)
def test_an_adapter_of_the_tower_or_the_projector_is_refused(targets, stray, tmp_path, pictures):
    """Half of it would be served, and no text would tell."""
    base, engine = pictures
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    peft_kinds.trained(copy.deepcopy(base), config, tmp_path / "lora", 1)
    assert f"the engine puts no LoRA on {stray}" in engine.load(tmp_path / "lora", 1)
