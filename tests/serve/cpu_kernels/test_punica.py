"""The CPU LoRA kernels against the exact answer and against vLLM's own path, on vLLM's own layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora.layers import (
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these kernels are for machines without a GPU", allow_module_level=True)

from serve.cpu_kernels import build, install, operators, punica
from serve.vllm_backend.patches.applying import apply, decide
from serve.vllm_backend.patches.switches import Switches
from serve.vllm_backend.patches.table import PATCHES, named

HIDDEN, INNER, VOCAB = 100, 250, 203  # none of them a multiple of a vector's width
MAX_RANK = 64
RANKS = {1: 1, 2: 8, 3: 17, 4: 64}  # adapter id -> rank; the odd and the largest too
SLOTS = 5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LINEARS = ["qkv", "o", "gate_up", "down", "other"]


@pytest.fixture(scope="module", autouse=True)
def one_worker(tmp_path_factory):
    """vLLM's layers want to know their place among parallel workers."""
    for name in ("lora-rows", "lora-device", "lora-kernels"):
        apply(named(name))
    place = tmp_path_factory.mktemp("init") / "file"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{place}", 0, backend="gloo")
        parallel_state.initialize_model_parallel(1, 1)
        yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def model(request, one_worker) -> Model:
    return Model(request.param)


@dataclass
class Model:
    """Every kind of layer that takes an adapter, four adapters in them, and both paths over them."""

    dtype: torch.dtype
    modules: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        config = LoRAConfig(max_lora_rank=MAX_RANK, max_loras=SLOTS, lora_dtype=self.dtype)
        kinds = {"params_dtype": self.dtype, "bias": True}
        head = ParallelLMHead(VOCAB, HIDDEN, params_dtype=self.dtype)
        self.modules = {
            "qkv": MergedQKVParallelLinearWithLoRA(QKVParallelLinear(HIDDEN, 20, 4, 2, **kinds)),
            "o": RowParallelLinearWithLoRA(RowParallelLinear(HIDDEN, HIDDEN, **kinds)),
            "gate_up": MergedColumnParallelLinearWithLoRA(MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **kinds)),
            "down": RowParallelLinearWithLoRA(RowParallelLinear(INNER, HIDDEN, **kinds)),
            "other": ReplicatedLinearWithLoRA(ReplicatedLinear(HIDDEN, 33, **kinds)),
            "embed": VocabParallelEmbeddingWithLoRA(VocabParallelEmbedding(VOCAB, HIDDEN, params_dtype=self.dtype)),
            "logits": LogitsProcessorWithLoRA(LogitsProcessor(VOCAB), HIDDEN, self.dtype, torch.device("cpu"), None),
        }
        self.head = head
        for module in [*self.modules.values(), head]:
            for weight in module.parameters():
                weight.data.normal_(std=0.1)
            method = getattr(getattr(module, "base_layer", module), "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(getattr(module, "base_layer", module))
        self.stock = PunicaWrapperCPU(512, 512, "cpu")
        self.ours = punica.Punica(512, 512, "cpu")
        for module in self.modules.values():
            module.create_lora_weights(SLOTS, config)
            module.set_mapping(self.ours)
        self.lora_slots = SLOTS
        self.lora_index_to_id: list[int | None] = [3, None, 1, 4, 2]
        self.model = torch.nn.Module()
        punica._adopt(self)
        self.views = {name: module.punica_wrapper for name, module in self.modules.items()}
        self.exact: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for slot, adapter in enumerate(self.lora_index_to_id):
            if adapter is not None:
                self.fill(slot, adapter)

    def fill(self, slot: int, adapter: int) -> None:
        """What activating an adapter does: vLLM copies it into a slot, and the kernels are told."""
        rank = RANKS[adapter]
        for name, module in self.modules.items():
            a_stacked, b_stacked = module.lora_a_stacked, module.lora_b_stacked
            slices = (
                list(zip(a_stacked, b_stacked, strict=True))
                if isinstance(a_stacked, tuple)
                else [(a_stacked, b_stacked)]
            )
            a, b = [], []
            for one_a, one_b in slices:
                width = one_a.shape[1] if name == "embed" else one_a.shape[-1]
                a.append(torch.randn(rank, width).mul(width**-0.5 if name != "embed" else 0.3).to(self.dtype))
                b.append(torch.randn(one_b.shape[-2], rank).mul(0.3).to(self.dtype))
            self.exact[name, adapter] = list(zip(a, b, strict=True))
            many = len(slices) > 1
            module.set_lora(slot, a if many else a[0], b if many else b[0])
        operators.load(self.loradock_layers, slot)

    def step(self, ids: list[int], prompts: list[int] | None = None) -> None:
        mapping = LoRAMapping(tuple(ids), tuple(prompts or ids), is_prefill=True)
        for wrapper in (self.stock, self.ours):
            wrapper.update_metadata(mapping, self.lora_index_to_id, SLOTS, VOCAB)

    def run(self, name: str, x: torch.Tensor, path: str) -> torch.Tensor:
        module = self.modules[name]
        module.set_mapping(self.stock if path == "stock" else self.views[name])
        with torch.no_grad():
            out = module._get_logits(x, self.head) if name == "logits" else module(x)
        return (out[0] if isinstance(out, tuple) else out).clone()

    def base(self, name: str, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            layer = self.modules[name].base_layer
            out = layer._apply_head(self.head, x, None) if name == "logits" else layer(x)
        return (out[0] if isinstance(out, tuple) else out)[:, : VOCAB if name == "logits" else None].clone()

    def answer(self, name: str, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """In double precision, from the adapters as they were made."""
        y = self.base(name, x).double()
        for row, adapter in enumerate(ids):
            if adapter:
                added = [
                    (a.double().T[x[row]] if name == "embed" else x[row].double() @ a.double().T) @ b.double().T
                    for a, b in self.exact[name, adapter]
                ]
                y[row] += torch.cat(added)
        return y


STEPS = {
    "one": [2],
    "an odd rank": [3, 3, 3],
    "every adapter, decoding": [1, 2, 3, 4, 2],
    "some without": [0, 2, 0, 0, 4, 1, 0],
    "chunks of prompts among decodes": [2, 4, *[3] * 37, 0, *[1] * 70, *[0] * 9, *[4] * 33, 1],
}


@pytest.mark.parametrize("ids", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("name", [*LINEARS, "embed", "logits"])
def test_no_further_from_the_exact_answer_than_vllm(model: Model, name: str, ids: list[int]):
    torch.manual_seed(len(ids))
    width = INNER if name == "down" else HIDDEN
    x = torch.randint(VOCAB, (len(ids),)) if name == "embed" else torch.randn(len(ids), width).to(model.dtype)
    model.step(ids)
    exact, base = model.answer(name, x, ids), model.base(name, x)
    ours, stock = model.run(name, x, "ours"), model.run(name, x, "stock")
    with_adapter = torch.tensor(ids) > 0
    # What has no adapter is the base's, to the bit; vLLM's own path gave it the last slot's adapter.
    assert torch.equal(ours[~with_adapter], base[~with_adapter])
    assert torch.equal(stock[~with_adapter], base[~with_adapter])
    moved = (exact - base)[with_adapter].abs().max()
    missed, their = ((y.double() - exact)[with_adapter].abs().max() for y in (ours, stock))
    rounding = torch.finfo(model.dtype).eps * exact[with_adapter].abs().max() / 2
    assert moved > 20 * rounding
    # Sums in another order: float32 keeps no spare digits for them.
    assert missed <= max(float(their), (32 if model.dtype == torch.float32 else 2) * float(rounding))


def test_a_step_without_adapters_changes_nothing(model: Model):
    model.step([0, 0, 0])
    x = torch.randn(3, HIDDEN).to(model.dtype)
    assert torch.equal(model.run("qkv", x, "ours"), model.base("qkv", x))


def test_a_slot_answers_with_what_was_put_there_last(model: Model):
    slot = model.lora_index_to_id.index(4)
    x = torch.randn(2, HIDDEN).to(model.dtype)
    model.step([4, 4])
    before = model.run("gate_up", x, "ours")
    model.fill(slot, 4)  # new weights of rank 64
    after = model.run("gate_up", x, "ours")
    assert not torch.equal(before, after)
    assert (after.double() - model.answer("gate_up", x, [4, 4])).abs().max() < 0.05
    # An adapter that leaves some modules alone leaves the former one's weights nowhere.
    model.modules["gate_up"].reset_lora(slot)
    operators.load(model.loradock_layers, slot)
    assert torch.equal(model.run("gate_up", x, "ours"), model.base("gate_up", x))
    model.fill(slot, 4)


def test_rows_that_lie_apart_in_memory(model: Model):
    """An attention's output, or one half of a merged layer's, is a view into something wider."""
    model.step([2, 0, 4])
    wide = torch.randn(3, HIDDEN + 44).to(model.dtype)
    x = wide[:, 20 : 20 + HIDDEN]
    assert torch.equal(model.run("qkv", x, "ours"), model.run("qkv", x.contiguous(), "ours"))
    y, flipped = torch.zeros(3, 160, dtype=model.dtype), x.T.contiguous().T
    operators.lora_linear(y, flipped, model.views["qkv"].number)
    straight = torch.zeros_like(y)
    operators.lora_linear(straight, x.contiguous(), model.views["qkv"].number)
    assert torch.equal(y, straight) and y[0].any() and not y[1].any()


def test_rows_that_are_not_the_steps_are_refused(model: Model):
    model.step([1, 2, 3])
    x, y = torch.zeros(2, HIDDEN, dtype=model.dtype), torch.zeros(2, 160, dtype=model.dtype)
    with pytest.raises(RuntimeError, match="rows are not the step's 3: 2 in, 2 out"):
        operators.lora_linear(y, x, model.views["qkv"].number)


def test_a_compiled_graph_follows_the_step(model: Model):
    """The compiler must not bake in what the step was when it looked."""
    module = model.modules["o"]
    module.set_mapping(model.views["o"])
    compiled = torch.compile(lambda x: module(x)[0] * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for ids in ([2, 2, 2], [0, 0, 0], [1, 0, 4], [3] * 40):
        model.step(ids)
        x = torch.randn(len(ids), HIDDEN).to(model.dtype)
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x)[0] * 2)


@pytest.mark.parametrize("ids", [[1, 0, 4, 4, *[3] * 50], [4, 0, 1, 2, 3], [0, 0]], ids=["prompts", "decodes", "none"])
def test_the_answers_are_the_same_without_a_compiler(model: Model, monkeypatch, ids: list[int]):
    monkeypatch.setattr(operators, "library", lambda: None)
    module = model.modules["qkv"]
    plan = operators.Plan()
    layer = operators.Layer(plan, module.lora_a_stacked, module.lora_b_stacked, module.output_slices)
    plan.set(torch.tensor([model.lora_index_to_id.index(one) if one else -1 for one in ids]), SLOTS)
    x = torch.randn(len(ids), HIDDEN).to(model.dtype)
    y = model.base("qkv", x)
    operators._lora_linear(y, x, layer.number)
    torch.testing.assert_close(y.double(), model.answer("qkv", x, ids), rtol=0.02, atol=0.05)


INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": [],
}


def test_adapters_over_an_int8_base(monkeypatch):
    """W8A8, through oneDNN, which packs the weight and leaves None in its place: vLLM alone crashes on that."""
    monkeypatch.setattr("vllm.model_executor.kernels.linear.scaled_mm.cpu.check_cpu_sgl_kernel", lambda *_: False)
    quantization = CompressedTensorsConfig.from_config(INT8)
    kinds = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": quantization, "prefix": "layers.0.qkv_proj"}
    base = QKVParallelLinear(128, 32, 4, 2, **kinds)
    base.weight.data.random_(-127, 128)
    base.weight_scale.data.fill_(0.001)
    base.quant_method.process_weights_after_loading(base)
    assert base.weight is None
    module = MergedQKVParallelLinearWithLoRA(base)
    module.create_lora_weights(2, LoRAConfig(max_lora_rank=8, max_loras=2, lora_dtype=torch.bfloat16))
    ours = punica.Punica(64, 64, "cpu")
    module.set_mapping(ours)
    manager = SimpleNamespace(modules={"qkv": module}, lora_slots=2, model=torch.nn.Module())
    punica._adopt(manager)
    a = [torch.randn(8, 128).mul(0.1).bfloat16() for _ in range(3)]
    b = [torch.randn(size, 8).bfloat16() for size in module.output_slices]
    module.set_lora(1, a, b)
    operators.load(manager.loradock_layers, 1)
    ours.update_metadata(LoRAMapping((0, 7, 7), (0, 7, 7), is_prefill=True), [None, 7], 2, VOCAB)
    x = torch.randn(3, 128).bfloat16()
    plain, got = base(x)[0], module(x)[0]
    added = torch.cat([x.double() @ one.double().T @ other.double().T for one, other in zip(a, b, strict=True)], dim=-1)
    assert torch.equal(got[0], plain[0]) and added[1:].abs().max() > 1
    torch.testing.assert_close(got[1:].double(), plain[1:].double() + added[1:], rtol=0.01, atol=0.03)


def test_what_is_in_a_slot_for_good_is_in_memory_once():
    """Its B is packed, and what it was read as is let go; it is read again if it ever comes back."""
    base = QKVParallelLinear(128, 32, 4, 4, bias=False, params_dtype=torch.bfloat16, prefix="layers.0.qkv_proj")
    base.weight.data.normal_(std=0.1)
    base.quant_method.process_weights_after_loading(base)
    module = MergedQKVParallelLinearWithLoRA(base)
    module.create_lora_weights(2, LoRAConfig(max_lora_rank=64, max_loras=2, lora_dtype=torch.bfloat16))
    ours = punica.Punica(64, 64, "cpu")
    module.set_mapping(ours)
    a = [torch.randn(64, 128).mul(0.1).bfloat16() for _ in range(3)]
    b = [torch.randn(size, 64).bfloat16() for size in module.output_slices]
    adapter = SimpleNamespace(loras={"qkv": (a, b)})
    manager = SimpleNamespace(
        modules={"qkv": module},
        lora_slots=2,
        capacity=2,
        model=torch.nn.Module(),
        lora_index_to_id=[None, None],
        _registered_adapters={7: adapter},
        _active_adapters={},
        loradock_read={7: lambda: SimpleNamespace(loras={"qkv": (a, b)})},
    )
    punica._adopt(manager)
    assert module.loradock_zeros == {0, 1}

    def activate(slot: int) -> torch.Tensor:
        def original(manager, number):
            manager.lora_index_to_id[slot] = number
            module.set_lora(slot, *adapter.loras["qkv"])
            return True

        manager.lora_index_to_id = [None, None]
        assert punica.activate_adapter(original, manager, 7)
        ours.update_metadata(LoRAMapping((0, 7, 7), (0, 7, 7), is_prefill=True), manager.lora_index_to_id, 2, VOCAB)
        return module(x)[0]

    x = torch.randn(3, 128).bfloat16()
    first = activate(0)
    added = torch.cat([x.double() @ one.double().T @ other.double().T for one, other in zip(a, b, strict=True)], dim=-1)
    torch.testing.assert_close(first[1:].double(), base(x)[0][1:].double() + added[1:], rtol=0.01, atol=0.1)
    assert not adapter.loras
    zeros = (module.lora_b_stacked[0][0] == 0).float().mean()
    assert zeros > 0.4 or build.library() is None  # all but the pages at its ends
    assert torch.equal(activate(1), first)

    manager.capacity, adapter.loras = 3, {"qkv": (a, b)}  # it may lose its slot
    assert torch.equal(activate(0), first) and adapter.loras


def test_the_kernels_are_compiled_once_and_a_broken_compiler_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LORADOCK_CACHE_DIR", str(tmp_path))
    first = build._compiled()
    assert first is not None and first.parent == tmp_path / "kernels"
    made = first.stat().st_mtime_ns
    assert build._compiled() == first and first.stat().st_mtime_ns == made
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert build.library.__wrapped__() is None
    assert "no space left" in caplog.text and "plain torch operations" in caplog.text
    assert [file.name for file in (tmp_path / "kernels").iterdir()] == [first.name]


class TestInstalling:
    def modes(self, *configs):
        """How vLLM is asked to run each of them, by what replaces its look at the configuration."""
        seen = []
        for config in configs:
            install.check_and_update_config(
                lambda platform, config: seen.append("eager" if config.lora_config else "compiled"), None, config
            )
        return seen

    def config(self, lora=None, **model):
        text = SimpleNamespace(**model.pop("hf_text_config", {}))
        lora = lora or SimpleNamespace(fully_sharded_loras=False)
        return SimpleNamespace(lora_config=lora, model_config=SimpleNamespace(hf_text_config=text, **model))

    def asked(self, **environ):
        states = decide(PATCHES, lambda function: function.digest, Switches(), environ, on_cpu=True)
        return {name for name in ("lora-kernels", "lora-compile") if name in states and states[name].on}

    def test_by_default_the_kernels_alone(self):
        assert self.asked() == {"lora-kernels"}
        assert install.get_punica_wrapper(None, None) == f"{punica.Punica.__module__}.Punica"

    def test_a_model_with_adapters_is_compiled_if_asked(self):
        config = self.config()
        assert self.modes(config) == ["compiled"] and config.lora_config is not None
        assert self.asked(**{install.VARIABLE: "compile"}) == {"lora-kernels", "lora-compile"}

    def test_what_cannot_be_compiled_with_adapters_stays_eager(self, monkeypatch):
        sharded = self.config(lora=SimpleNamespace(fully_sharded_loras=True))
        experts = self.config(hf_text_config={"num_local_experts": 8})
        assert self.modes(experts, sharded, self.config(is_multimodal_model=True)) == ["eager"] * 3
        monkeypatch.setattr(build, "compiler", lambda: None)
        assert self.modes(self.config()) == ["eager"]

    def test_off_is_vllm_as_it_is(self):
        assert self.asked(**{install.VARIABLE: "off"}) == set()


def test_a_layer_whose_weight_the_int8_kernel_has_packed_takes_adapters():
    import vllm.lora.layers.base_linear as base_linear

    assert base_linear._get_lora_device(SimpleNamespace(weight=None)).type == "cpu"
