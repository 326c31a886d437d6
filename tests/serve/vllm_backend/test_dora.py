"""DoRA in vLLM's layers: PEFT's own outputs for each row, beside rows of LoRA adapters and of none.

vLLM's own CPU path is the stand-in for its GPU path: the same layers, the same calls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import CompilationMode, CUDAGraphMode, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import (
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("its layers are built on a CPU", allow_module_level=True)

from serve.vllm_backend.dora import Magnitudes
from serve.vllm_backend.worker_extension import LOADED, LOADING, Loader
from tests.support import vllm_worker

HIDDEN, INNER, RANK, SLOTS, ALPHA = 64, 96, 4, 4, 8
PACKED = {
    "l.qkv_proj": ["l.q_proj", "l.k_proj", "l.v_proj"],
    "l.gate_up_proj": ["l.gate_proj", "l.up_proj"],
}
SIZES = {
    "l.q_proj": (HIDDEN, HIDDEN), "l.k_proj": (HIDDEN, 32), "l.v_proj": (HIDDEN, 32), "l.o_proj": (HIDDEN, HIDDEN),
    "l.gate_proj": (HIDDEN, INNER), "l.up_proj": (HIDDEN, INNER), "l.down_proj": (INNER, HIDDEN),
}  # fmt: skip
ALL = tuple(name.rpartition(".")[2] for name in SIZES)


@pytest.fixture(scope="module", autouse=True)
def one_worker(tmp_path_factory):
    with vllm_worker.one_worker(tmp_path_factory.mktemp("init")):
        yield


class Rounded:
    """A method of a quantized layer: there is no `weight`, its products are of rounded ones, with its bias."""

    def __init__(self, method: Any, layer: Any, bits: int) -> None:
        scale = layer.weight.data.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        self.weight = (layer.weight.data / scale).round() * scale
        self.bias = layer.bias

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass
class Host:
    """What Magnitudes knows of vLLM: a worker's manager, its layers, and the runner."""

    modules: dict[str, Any]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.packed_modules, self.lora_slots = PACKED, SLOTS
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self._adapter_manager = self
        self.model = torch.nn.Module()
        self.registered: dict[int, Any] = {}
        self._active_adapters: dict[int, None] = {}
        self.capacity, self._is_moe = 8, False
        self.punica = PunicaWrapperCPU(256, 256, "cpu")
        config = LoRAConfig(max_lora_rank=8, max_loras=SLOTS, lora_dtype=self.dtype)
        for module in self.modules.values():
            module.create_lora_weights(SLOTS, config)
            module.set_mapping(self.punica)
        self.runner = SimpleNamespace(
            vllm_config=SimpleNamespace(
                parallel_config=SimpleNamespace(world_size=1),
                compilation_config=SimpleNamespace(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE),
                model_config=SimpleNamespace(enforce_eager=True),
            )
        )
        self.loader = Loader(self, computed=[Magnitudes(self, self.runner)])

    def __len__(self) -> int:
        return len(self.registered)

    def get_adapter(self, number: int) -> Any:
        return self.registered[number]

    def list_adapters(self) -> dict[int, Any]:
        return self.registered

    def add_adapter(self, lora: Any) -> None:
        self.registered[lora.id] = lora

    def activate_adapter(self, number: int) -> bool:
        slot = self.lora_index_to_id.index(None)
        self.lora_index_to_id[slot] = number
        for name, module in self.modules.items():
            if weights := self.registered[number].loras.get(name):
                module.set_lora(slot, weights.lora_a, weights.lora_b)
            else:
                module.reset_lora(slot)
        return True

    def _create_merged_loras_inplace(self, lora: Any) -> None:
        for name, parts in PACKED.items():
            halves = [lora.loras.pop(part, None) for part in parts]
            if any(halves):
                lora.loras[name] = PackedLoRALayerWeights.pack(halves)
        for weights in lora.loras.values():
            weights.optimize()

    def _load_adapter(self, request: Any) -> Any:
        from safetensors.torch import load_file

        settings = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
        assert not settings["use_dora"], "vLLM refuses that"
        tensors = load_file(Path(request.lora_path) / "adapter_model.safetensors")
        loras = {}
        for name in SIZES:
            if (a := tensors.get(f"base_model.model.{name}.lora_A.weight")) is not None:
                b = tensors[f"base_model.model.{name}.lora_B.weight"]
                loras[name] = LoRALayerWeights(name, RANK, ALPHA, a.to(self.dtype), b.to(self.dtype))
        return SimpleNamespace(id=request.lora_int_id, loras=loras)

    def load(self, folder: Path, number: int) -> str:
        self.loader.begin(SimpleNamespace(lora_name=str(number), lora_int_id=number, lora_path=str(folder)))
        while (state := self.loader.finish(number)) == LOADING:
            pass
        if state == LOADED:
            self.activate_adapter(number)
        return state

    def step(self, ids: list[int]) -> None:
        mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
        self.punica.update_metadata(mapping, self.lora_index_to_id, SLOTS, 100)


def host(bits: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Host, torch.nn.Module]:
    """vLLM's layers, and a model of torch's with the same (rounded) weights for PEFT."""
    torch.manual_seed(0)
    kinds = {"params_dtype": dtype, "bias": True}
    modules = {
        "l.qkv_proj": MergedQKVParallelLinearWithLoRA(QKVParallelLinear(HIDDEN, 16, 4, 2, **kinds)),
        "l.o_proj": RowParallelLinearWithLoRA(RowParallelLinear(HIDDEN, HIDDEN, **kinds)),
        "l.gate_up_proj": MergedColumnParallelLinearWithLoRA(MergedColumnParallelLinear(HIDDEN, [INNER] * 2, **kinds)),
        "l.down_proj": RowParallelLinearWithLoRA(RowParallelLinear(INNER, HIDDEN, **kinds)),
    }
    base = torch.nn.Module()
    base.add_module("l", torch.nn.Module())
    for name, module in modules.items():
        layer = module.base_layer
        layer.weight.data.normal_(std=0.1)
        layer.bias.data.normal_(std=5.0)
        if bits < 16:
            layer.quant_method = Rounded(layer.quant_method, layer, bits)
        weight = layer.weight.data.clone() if bits == 16 else layer.quant_method.weight
        if bits == 16:
            layer.quant_method.process_weights_after_loading(layer)
        begin = 0
        for part in PACKED.get(name, [name]):
            into, out = SIZES[part]
            linear = torch.nn.Linear(into, out)
            linear.weight.data = weight[begin : begin + out].clone()
            linear.bias.data = layer.bias.data[begin : begin + out].clone()
            base.l.add_module(part.rpartition(".")[2], linear)
            begin += out
        if bits < 16:
            del layer.weight
    return Host(modules, dtype), base


def adapter(base: Any, folder: Path, seed: int, *, dora: bool = True, targets: tuple[str, ...] = ALL) -> Any:
    """One of PEFT's over `base`, with values as if it were trained, saved in `folder`."""
    import copy

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=dora, target_modules=list(targets))
    model = peft.get_peft_model(copy.deepcopy(base), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=draw))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    return model.eval()


def outputs(model: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    tree = model.base_model.model.l if hasattr(model, "base_model") else model.l
    with torch.no_grad():
        return torch.cat([getattr(tree, part.rpartition(".")[2])(x) for part in PACKED.get(name, [name])], -1)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_each_row_of_a_mixed_batch_is_pefts(bits, tmp_path):
    worker, base = host(bits)
    models = {
        1: adapter(base, tmp_path / "dora", 1),
        2: adapter(base, tmp_path / "lora", 2, dora=False),
        3: adapter(base, tmp_path / "some", 3, targets=("v_proj", "down_proj")),
    }
    for number, folder in ((1, "dora"), (2, "lora"), (3, "some")):
        assert worker.load(tmp_path / folder, number) == LOADED
    ids = [1, 2, 0, 3, 1, 0, 2]
    worker.step(ids)
    assert worker.runner.loradock_layerwise()
    for name, module in worker.modules.items():
        x = torch.randn(len(ids), module.input_size)
        with torch.no_grad():
            answer = module(x)[0]
        for row, number in enumerate(ids):
            expected = outputs(models.get(number, base), name, x[row : row + 1])[0]
            torch.testing.assert_close(answer[row], expected, atol=2e-4, rtol=2e-4)
            if number == 1:
                assert (expected - outputs(base, name, x[row : row + 1])[0]).abs().max() > 0.5
    worker.step([2, 0])
    assert not worker.runner.loradock_layerwise(), "a step without one may go the fast way"


def test_bfloat16_is_as_far_off_as_its_rounding(tmp_path):
    worker, base = host(dtype=torch.bfloat16)
    model = adapter(base.float(), tmp_path, 1)
    assert worker.load(tmp_path, 1) == LOADED
    worker.step([1] * 5)
    for name, module in worker.modules.items():
        x = torch.randn(5, module.input_size).bfloat16()
        with torch.no_grad():
            answer = module(x)[0].float()
        expected = outputs(model, name, x.float())
        assert (answer - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_slot_forgets_the_magnitudes_of_the_one_before(tmp_path):
    worker, base = host()
    adapter(base, tmp_path / "dora", 1)
    lora = adapter(base, tmp_path / "lora", 2, dora=False)
    worker.load(tmp_path / "dora", 1)
    worker.lora_index_to_id[0] = None
    worker.load(tmp_path / "lora", 2)
    assert worker.lora_index_to_id[0] == 2
    worker.step([2])
    x = torch.randn(1, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(worker.modules["l.o_proj"](x)[0], outputs(lora, "l.o_proj", x), atol=2e-4, rtol=2e-4)


def test_magnitudes_may_be_zero_or_negative_and_not_beyond_all_numbers(tmp_path):
    from safetensors.torch import load_file, save_file

    worker, base = host()
    model = adapter(base, tmp_path, 1)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "o_proj" in name and name.endswith("lora_magnitude_vector"))
    tensors[name][:2] = torch.tensor([0.0, -3.0])
    save_file(tensors, file)
    model.base_model.model.l.o_proj.lora_magnitude_vector["default"].weight.data[:2] = torch.tensor([0.0, -3.0])
    assert worker.load(tmp_path, 1) == LOADED
    worker.step([1])
    x = torch.randn(1, HIDDEN)
    with torch.no_grad():
        answer = worker.modules["l.o_proj"](x)[0]
    torch.testing.assert_close(answer, outputs(model, "l.o_proj", x), atol=2e-4, rtol=2e-4)
    for magnitude in (3.4e38, 1e6):
        tensors[name][0] = magnitude
        small = {each: tensor * (1e-3 if ".o_proj.lora_B" in each else 1) for each, tensor in tensors.items()}
        save_file(small, file)
        assert "a magnitude of l.o_proj is too large" in worker.load(tmp_path, 2)


def test_where_layers_are_compiled_or_spread_it_is_refused_in_a_sentence(tmp_path):
    worker, base = host()
    adapter(base, tmp_path, 1)
    config = worker.runner.vllm_config
    config.model_config.enforce_eager = False
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    assert "start the engine with enforce_eager" in worker.load(tmp_path, 1)
    config.parallel_config.world_size = 2
    assert "spread over devices" in worker.load(tmp_path, 2)
    config.parallel_config.world_size = 1
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    assert worker.load(tmp_path, 3) == LOADED


def test_vllms_own_manager_reads_it_and_packs_its_modules(tmp_path):
    """A whole model of vLLM's, with its names, its packed layers and its way of loading."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.model_loader import get_model

    from tests.support import peft_kinds

    base = peft_kinds.base()
    base.save_pretrained(tmp_path / "base")
    config = EngineArgs(
        model=str(tmp_path / "base"), skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True,
        enable_lora=True, max_lora_rank=8, max_loras=2, max_cpu_loras=4, max_num_seqs=4,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        manager.create_lora_manager(model, config)
    runner = SimpleNamespace(vllm_config=config)
    loader = Loader(manager, computed=[Magnitudes(manager, runner)])
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = adapter(base, tmp_path / "dora", 1, targets=tuple(targets))
    loader.begin(
        SimpleNamespace(lora_name="d", lora_int_id=1, lora_path=str(tmp_path / "dora"), is_3d_lora_weight=False)
    )
    while (state := loader.finish(1)) == LOADING:
        pass
    assert state == LOADED
    adapters = manager._adapter_manager
    adapters.activate_adapter(1)
    adapters.set_adapter_mapping(LoRAMapping((0, 1, 1), (0, 1, 1), is_prefill=True))
    layerwise = getattr(runner, "loradock_layerwise", None)
    assert layerwise is None or layerwise(), "our kernels multiply with the gains, where they are"
    own, plain = adapted.base_model.model.model.layers[1], base.model.layers[1]
    packed = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    for name, parts in packed.items():
        module = adapters.modules[f"model.layers.1.{name}"]
        x = torch.randn(3, module.input_size)
        with torch.no_grad():
            answer = module(x)[0]
            with_it = torch.cat([own.get_submodule(part)(x) for part in parts], -1)
            without = torch.cat([plain.get_submodule(part)(x) for part in parts], -1)
        torch.testing.assert_close(answer[0], without[0], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(answer[1:], with_it[1:], atol=2e-4, rtol=2e-4)
        assert (with_it - without)[1:].abs().max() > 0.05
