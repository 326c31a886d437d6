"""Reading what a model computes from its modules: all that differs, or a reason why it is not known."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel

from serve.cpu_kernels import digest, families, tally
from serve.cpu_kernels.architecture import CENTERED, PLAIN, ROUNDED, SILU, Unknown, read
from serve.cpu_kernels.step import _check_engine

HIDDEN, INNER = 64, 96


@pytest.fixture(autouse=True)
def config():
    with set_current_vllm_config(VllmConfig()):
        torch.set_default_dtype(torch.bfloat16)
        yield
        torch.set_default_dtype(torch.float32)


def shell(kind: type, **parts: object) -> nn.Module:
    """A module of a kind of vLLM's with these parts, made without its engine."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def linear(inputs: int, outputs: int) -> nn.Module:
    return shell(nn.Module, weight=nn.Parameter(torch.zeros(outputs, inputs)), input_size=inputs)


def attention(heads: int = 2, window: int = -1) -> SimpleNamespace:
    impl = SimpleNamespace(sliding_window=window, alibi_slopes=None, sinks=None, logits_soft_cap=0, scale=0.125)
    return SimpleNamespace(
        impl=impl, num_heads=heads, num_kv_heads=1, head_size=32, attn_type="decoder", kv_sharing_target_layer_name=None
    )


def layer(rope: nn.Module, heads: int = 2) -> nn.Module:
    return shell(
        LlamaDecoderLayer,
        self_attn=shell(
            LlamaAttention,
            qkv_proj=linear(HIDDEN, (heads + 2) * 32),
            o_proj=linear(heads * 32, HIDDEN),
            attn=attention(heads),
            rotary_emb=rope,
        ),
        mlp=shell(
            LlamaMLP, gate_up_proj=linear(HIDDEN, 2 * INNER), down_proj=linear(INNER, HIDDEN), act_fn=SiluAndMul()
        ),
        input_layernorm=RMSNorm(HIDDEN),
        post_attention_layernorm=RMSNorm(HIDDEN),
    )


def llama() -> nn.Module:
    rope = RotaryEmbedding(32, 32, 128, 10000, True, torch.bfloat16)
    processor = SimpleNamespace(scale=1.0, soft_cap=None, org_vocab_size=300, logits_as_input=False, head_dtype=None)
    table = shell(
        nn.Module,
        weight=nn.Parameter(torch.zeros(320, HIDDEN)),
        embedding_dim=HIDDEN,
        num_embeddings_padded=320,
    )
    inner = shell(
        LlamaModel, embed_tokens=table, layers=nn.ModuleList([layer(rope), layer(rope)]), norm=RMSNorm(HIDDEN)
    )
    return shell(LlamaForCausalLM, model=inner, lm_head=table, logits_processor=processor)


def test_a_model_is_read_with_all_that_differs():
    model = llama()
    second = model.model.layers[1]
    second.self_attn.attn.impl.sliding_window = 40
    second.self_attn.attn.impl.logits_soft_cap = 50.0
    second.self_attn.use_rope = False
    second.input_layernorm = GemmaRMSNorm(HIDDEN)
    model.logits_processor.scale = 0.25
    decoder = read(model, 128)
    assert (decoder.hidden, decoder.inner, decoder.activation, decoder.parallel) == (HIDDEN, INNER, SILU, False)
    assert (decoder.vocabulary, decoder.logits_by, decoder.logits_cap) == (300, 0.25, 0)
    assert [(it.window, it.cap, it.scale, it.rope is None) for it in decoder.layers] == [
        (0, 0, 0.125, False),
        (40, 50.0, 0.125, True),
    ]
    assert decoder.layers[0].norms[0].kind == ROUNDED and decoder.layers[1].norms[0].kind == PLAIN
    assert decoder.layers[1].norms[0].weight.eq(1).all(), "Gemma's weights are what is added to 1"
    assert decoder.layers[0].norms[1] is None and CENTERED not in {decoder.last.kind}


class Twisted(LlamaDecoderLayer):
    def forward(self, *args):
        return args


def _other_layer(model):
    model.model.layers[1].__class__ = Twisted


def _gate(model):
    model.model.layers[0].mlp.gate = linear(HIDDEN, HIDDEN)


def _third_norm(model):
    model.model.layers[0].third_layernorm = RMSNorm(HIDDEN)


def _wider(model):
    model.model.layers[1] = layer(model.model.layers[0].self_attn.rotary_emb, heads=4)


def _headless(model):
    del model.logits_processor


def _sinks(model):
    model.model.layers[0].self_attn.attn.impl.sinks = torch.zeros(2)


def _by_position(model):
    model.model.layers[0].self_attn.do_llama_4_scaling = True


def _shared_keys(model):
    model.model.layers[1].self_attn.attn.kv_sharing_target_layer_name = "layers.0"


def _other_norm(model):
    model.model.norm = nn.LayerNorm(HIDDEN)


def _gelu(model):
    model.model.layers[0].mlp.act_fn = GeluAndMul(approximate="none")


def _other_rope(model):
    model.model.layers[0].self_attn.rotary_emb = nn.Identity()


def _bias(model):
    model.lm_head.bias = nn.Parameter(torch.zeros(320))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_layer, "model"),
        (_gate, "model"),
        (_third_norm, "model"),
        (_wider, "model"),
        (_headless, "model"),
        (_sinks, "attention"),
        (_by_position, "attention"),
        (_shared_keys, "attention"),
        (_other_norm, "norm"),
        (_gelu, "activation"),
        (_other_rope, "rope"),
        (_bias, "output"),
    ],
)
def test_what_is_not_known_is_named_and_not_guessed(change, reason):
    model = llama()
    change(model)
    with pytest.raises(Unknown) as caught:
        read(model, 128)
    assert caught.value.reason == reason and reason in tally.REASONS
    assert str(caught.value) and "\n" not in str(caught.value)


def test_a_model_whose_forward_pass_changed_goes_layer_by_layer_whatever_its_name(monkeypatch):
    def forward(self, positions, hidden_states, residual):
        return hidden_states * 2, residual

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(Unknown, match="of LlamaDecoderLayer it is not known what it computes"):
        read(llama(), 128)


def test_a_model_is_known_by_what_it_computes_and_not_by_its_name():
    class Renamed(LlamaDecoderLayer):
        forward = LlamaDecoderLayer.forward

    model = llama()
    for one in model.model.layers:
        one.__class__ = Renamed
    assert read(model, 128).layers


def test_a_norm_that_computes_something_else_is_not_taken(monkeypatch):
    monkeypatch.setattr(RMSNorm, "forward_native", lambda self, x, residual=None: x)
    with pytest.raises(Unknown, match="the norm RMSNorm is not known"):
        read(llama(), 128)


def test_every_forward_pass_is_as_it_was_read():
    def current(place):
        module, _, path = place.partition(":")
        owner, _, name = path.partition(".")
        return digest.of_function(getattr(getattr(import_module(module), owner), name))

    read_digests = {**families.FORWARDS, **families.PLAIN}
    assert {place: current(place) for place in read_digests} == read_digests


def test_a_rotation_that_ends_before_the_context_is_not_taken():
    with pytest.raises(Unknown, match="ends at 128 of 129 positions"):
        read(llama(), 129)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_transfer_config": SimpleNamespace(kv_connector="ExampleConnector")}, "engine"),
        ({"speculative_config": SimpleNamespace()}, "engine"),
        ({"parallel_config": SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1)}, "engine"),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "weights"),
    ],
)
def test_an_engine_whose_cache_or_steps_are_not_plain_goes_vllms_way(change, reason):
    plain = {
        "kv_transfer_config": None,
        "speculative_config": None,
        "parallel_config": SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "model_config": SimpleNamespace(dtype=torch.bfloat16, runner_type="generate"),
    }
    _check_engine(SimpleNamespace(**plain))
    with pytest.raises(Unknown) as caught:
        _check_engine(SimpleNamespace(**{**plain, **change}))
    assert caught.value.reason == reason
