"""Adapters of every kind that is served, made by PEFT: PEFT's own logits, alone and sixteen kinds in one batch.

The layers are vLLM's, of a whole small Llama over float32, bfloat16, and weights rounded to 8 and 4 bits. What adds
the adapters to them are vLLM's products, as on a GPU, or our kernels. The fused step, which takes the layers' place on
a CPU, has its own tests (tests/serve/cpu_kernels/test_decoder.py), and the whole engine tests/e2e/test_lora_answers.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("vllm")

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("its layers are built on a CPU", allow_module_level=True)

from serve.adapters.adapter import CONFIG
from serve.adapters.conversion import program
from serve.adapters.mixing.stacking import stack
from serve.cpu_kernels import build
from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named
from serve.vllm_backend.worker_extension import LOADED
from tests.support import peft_kinds
from tests.support.vllm_worker import LayersOnly, one_worker

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [3, 7, 30]
LENGTH, VOCABULARY, LABELS = 6, 32, 3
STOCK, OURS = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU", "serve.cpu_kernels.punica.Punica"

Kind = Callable[[], Any]
KINDS: dict[str, Kind] = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR),
    "rsLoRA": lambda: peft.LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=LINEAR),
    "LoRA of every module, with ranks and alphas of their own": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[*LINEAR, "embed_tokens", "lm_head"],
        rank_pattern={"down_proj": 7, "q_proj": 2}, alpha_pattern={"v_proj": 3},
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=LINEAR),
    **peft_kinds.KINDS,
    "rows of tokens": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS),
    "whole tables": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "DoRA with rows of tokens": lambda: peft.LoraConfig(
        r=4, use_dora=True, target_modules=["v_proj", "down_proj"], trainable_token_indices=TOKENS
    ),
    "head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
}  # fmt: skip
MIXTURE, WEIGHTS = "mixture", (("LoRA", 0.7), ("rsLoRA", -0.3))
ALL = [*KINDS, MIXTURE]
# How far logits may be off, of the largest: in bfloat16 each product is rounded.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.06, "8 bits": 1e-4, "4 bits": 1e-4}
BITS = {"8 bits": 8, "4 bits": 4}


@dataclass(frozen=True)
class Made:
    """A base, its adapters' folders in order, and what PEFT says for each to its own prompt."""

    base: Any
    folder: Path
    folders: list[Path]
    prompts: torch.Tensor
    wanted: list[torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def worker(tmp_path_factory):
    with one_worker(tmp_path_factory.mktemp("init")):
        apply(named("lora-kernels"))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Made]:
    ready: dict[str, Made] = {}

    def make(weights: str) -> Made:
        if weights not in ready:
            ready[weights] = _made(tmp_path_factory.mktemp("adapters"), weights)
        return ready[weights]

    return make


def _made(root: Path, weights: str) -> Made:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=peft_kinds.HIDDEN, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 10  # or attention would see nothing
            if weights in BITS and name != "lm_head":
                module.weight.data = _rounded(module.weight.data, BITS[weights])
    if weights == "bfloat16":
        base = base.bfloat16().float()
    base.save_pretrained(root / "base")
    prompts = torch.randint(VOCABULARY, (len(ALL), LENGTH))
    prompts[:, 2] = torch.tensor(TOKENS)[torch.arange(len(ALL)) % len(TOKENS)]
    folders, wanted = [], []
    for number, kind in enumerate(KINDS):
        folder, logits = _trained(base, kind, root / str(number), number, prompts[number : number + 1])
        folders.append(folder)
        wanted.append(logits)
    mixture = root / MIXTURE
    mixture.mkdir()
    stack([(root / str(ALL.index(kind)), weight) for kind, weight in WEIGHTS], mixture)
    wanted.append(_mixed(base, root, prompts[-1:]))
    return Made(base, root / "base", [*folders, mixture], prompts, wanted)


def _rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


def _trained(base: Any, kind: str, folder: Path, seed: int, prompt: torch.Tensor) -> tuple[Path, torch.Tensor]:
    """The folder that is served of an adapter with values as if it were trained, and PEFT's logits, or scores."""
    own = copy.deepcopy(base)
    if kind == "head":
        config = copy.deepcopy(base.config)
        config.num_labels = LABELS
        own = LlamaForSequenceClassification(config)
        own.model.load_state_dict(base.model.state_dict())
    model = peft_kinds.trained(own, KINDS[kind](), folder, seed)
    with torch.no_grad():
        if kind == "head":
            hidden = model.base_model.model.model(prompt).last_hidden_state[0]
            return folder, model.base_model.model.score(hidden)
        logits = model(prompt).logits[0]
    if kind in peft_kinds.KINDS:
        folder = _converted(folder, base)
    return folder, logits


def _converted(folder: Path, base: Any) -> Path:
    into = folder / "lora"
    into.mkdir()
    settings = json.loads((folder / CONFIG).read_text())
    program.convert(
        {
            "folder": str(folder), "into": str(into), "kind": settings["peft_type"], "settings": settings,
            "modules": peft_kinds.modules(base), "max_rank": 32, "bound": 1e-4, "seconds": 1e9,
        }
    )  # fmt: skip
    return into


def _mixed(base: Any, root: Path, prompt: torch.Tensor) -> torch.Tensor:
    names = [kind for kind, _ in WEIGHTS]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), root / str(ALL.index(names[0])), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(root / str(ALL.index(name))), adapter_name=name)
    model.add_weighted_adapter(names, [weight for _, weight in WEIGHTS], MIXTURE, combination_type="cat")
    model.set_adapter(MIXTURE)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(prompt).logits[0]
    return logits


class Products:
    """A method of a quantized layer: there is no `weight`, and its products are of rounded ones."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, bias)


def _hidden_weights(engine: LayersOnly, base: Any) -> None:
    """Have the linear layers tell products alone, as quantized ones do."""
    packed = engine.adapters.packed_modules
    for name, module in engine.adapters.modules.items():
        if name.endswith("_proj"):
            stem = name.rpartition(".")[0]
            parts = [each.rpartition(".")[2] for each in packed.get(name, [name])]
            weights = [base.get_submodule(f"{stem}.{part}").weight.data for part in parts]
            module.base_layer.quant_method = Products(torch.cat(weights))
            del module.base_layer.weight


def forward(engine: LayersOnly, base: Any, prompts: torch.Tensor) -> torch.Tensor:
    """Logits (prompts, tokens, vocabulary) of vLLM's layers, with transformers' norms and attention between them."""
    count, length = prompts.shape
    modules, dtype = engine.adapters.modules, engine.config.model_config.dtype

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answer: torch.Tensor = modules[name](x.to(dtype))[0]
        return answer.float()

    x = engine.embedded(prompts.flatten()).float()
    cos, sin = base.model.rotary_emb(x.view(count, length, -1), torch.arange(length)[None])
    for number, block in enumerate(base.model.layers):
        stem = f"model.layers.{number}"
        qkv = layer(f"{stem}.self_attn.qkv_proj", block.input_layernorm(x))
        q, k, v = (part.view(count, length, 2, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + layer(f"{stem}.self_attn.o_proj", seen.transpose(1, 2).reshape(count * length, -1))
        gate, up = layer(f"{stem}.mlp.gate_up_proj", block.post_attention_layernorm(x)).chunk(2, -1)
        x = x + layer(f"{stem}.mlp.down_proj", torch.nn.functional.silu(gate) * up)
    logits: torch.Tensor = engine.logits(base.model.norm(x).to(dtype)).float()
    return logits.view(count, length, -1)


def difference(kind: str, logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far they are off, of the largest; of a head, its scores are, which stand beside a 0."""
    if kind == "head":
        assert logits[:, LABELS + 1 :].eq(-torch.inf).all()
        logits = logits[:, :LABELS] - logits[:, LABELS : LABELS + 1]
    return float((logits - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize("weights", list(TOLERANCE))
def test_each_kind_alone_and_in_a_batch_with_all_others_gives_pefts_logits(weights, kernels, made, monkeypatch):
    if kernels == "on" and build.library() is None:
        pytest.skip("no kernels for this processor, or no compiler")
    monkeypatch.setattr(
        type(current_platform), "get_punica_wrapper", classmethod(lambda _: OURS if kernels == "on" else STOCK)
    )
    these, count = made(weights), len(ALL)
    assert count == 16
    engine = LayersOnly(these.folder, "bfloat16" if weights == "bfloat16" else "float32", slots=count, rank=32)
    if weights in BITS:
        _hidden_weights(engine, these.base)
    for number, folder in enumerate(these.folders, 1):
        assert engine.load(folder, number) == LOADED, ALL[number - 1]
    with torch.no_grad():
        plain = these.base(these.prompts).logits
        engine.step([number for number in range(1, count + 1) for _ in range(LENGTH)])
        together = forward(engine, these.base, these.prompts)
        worst = {}
        for number, kind in enumerate(ALL):
            engine.step([number + 1] * LENGTH)
            alone = forward(engine, these.base, these.prompts[number : number + 1])[0]
            wanted = these.wanted[number]
            worst[kind] = max(difference(kind, each, wanted) for each in (together[number], alone))
            if kind != "head" and weights == "float32":  # the others have the same adapters
                assert (wanted - plain[number]).abs().max() > 0.05 * wanted.abs().max(), kind
        engine.step([0] * LENGTH)
        base_alone = forward(engine, these.base, these.prompts[:1])[0]
    print(weights, kernels, {kind: float(f"{off:.1g}") for kind, off in worst.items()})
    assert max(worst.values()) < TOLERANCE[weights], worst
    assert float((base_alone - plain[0]).abs().max() / plain[0].abs().max()) < TOLERANCE[weights]


def test_kinds_that_change_places_in_few_slots_leave_nothing_behind(made, monkeypatch):
    """Each new adapter takes the slot of another kind, while three others stay in the batch."""
    monkeypatch.setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda _: STOCK))
    these, held = made("float32"), list[tuple[int, int]]()
    engine = LayersOnly(these.folder, slots=4, rank=32)
    order = torch.randperm(2 * len(ALL), generator=torch.Generator().manual_seed(0)) % len(ALL)
    for number, kind in enumerate(order.tolist(), 1):
        assert engine.load(these.folders[kind], number) == LOADED
        held = [*held, (number, kind)][-4:]
        rows = [*held[::-1], (0, 0)]
        engine.step([which for which, _ in rows for _ in range(LENGTH)])
        with torch.no_grad():
            logits = forward(engine, these.base, these.prompts[[kind for _, kind in rows]])
            plain = these.base(these.prompts[:1]).logits[0]
        for row, (which, each) in zip(logits, rows, strict=True):
            wanted, name = (these.wanted[each], ALL[each]) if which else (plain, "base")
            assert difference(name, row, wanted) < TOLERANCE["float32"], (ALL[kind], name)
