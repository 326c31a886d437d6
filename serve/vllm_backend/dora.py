"""DoRA: an adapter with a magnitude for each output, in vLLM's layers.

    output = g * (W x + B A x) + bias        g = magnitude / ||W + B A||, of each row

The norms are of the weights that are served, in whatever format: the layers' own products say what those are. g of an
adapter is computed once, when it is loaded, between steps; the base's norms once for all adapters. A step with a row of
such an adapter goes layer by layer.

Not where the layers were compiled or recorded before the first such adapter came, nor where they are spread over
devices.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENDINGS = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
# Columns of a base's weights that are looked at in one product, and seconds of such products between two steps.
COLUMNS, BUDGET = 256, 0.05
# Some layers add their bias to every product, which nothing of so large a vector's is lost in.
LARGE = 2.0**20

Gains = dict[str, torch.Tensor]


class Magnitudes:
    """One worker's DoRA adapters. `worker` is vLLM's LoRA worker manager, `runner` the model runner."""

    def __init__(self, worker: Any, runner: Any) -> None:
        self._worker = worker
        self._runner = runner
        self._read = worker._load_adapter
        worker._load_adapter = self._load
        # By adapter: each module's gains, once they are computed.
        self._gains: dict[int, Gains] = {}
        self._computing: dict[int, Iterator[None]] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._layers: dict[str, Scaled] = {}
        # Those that hold such an adapter.
        self._slots: set[int] = set()

    def advance(self, lora: Any) -> bool:
        """Go on with the gains of an adapter that was read, for a moment; whether it has all it needs."""
        if not (vectors := getattr(lora, "loradock_magnitudes", None)) or lora.id in self._gains:
            return True
        until = perf_counter() + BUDGET
        computing = self._computing.setdefault(lora.id, self._compute(lora, vectors))
        for _ in computing:
            if perf_counter() > until:
                return False
        del self._computing[lora.id]
        return True

    def drop(self, number: int) -> None:
        """Forget an adapter's gains."""
        self._gains.pop(number, None)
        self._computing.pop(number, None)

    def in_use(self) -> bool:
        """Whether a row of this step has such an adapter."""
        if not self._slots:
            return False
        layer = next(iter(self._layers.values()))
        return bool(self._slots & set(layer.indices.tolist()))

    def _load(self, request: Any) -> Any:
        """vLLM's, of the adapter without its magnitudes, which it would refuse."""
        folder = Path(request.lora_path)
        settings = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
        if not settings.get("use_dora"):
            return self._read(request)
        self._check()
        tensors = load_file(folder / WEIGHTS)
        vectors = {name: tensors.pop(name) for name in list(tensors) if name.endswith(ENDINGS)}
        with tempfile.TemporaryDirectory() as plain:
            (Path(plain) / CONFIG).write_text(json.dumps({**settings, "use_dora": False}))
            save_file(tensors, Path(plain) / WEIGHTS)
            own = copy(request)
            own.lora_path = plain
            lora = self._read(own)
        lora.loradock_magnitudes = {self._module(name): vector for name, vector in vectors.items()}
        return lora

    def _check(self) -> None:
        config = self._runner.vllm_config
        if config.parallel_config.world_size > 1:
            raise ValueError("DoRA is not computed where a model is spread over devices: merge it into its base")
        if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
            raise ValueError("DoRA is not computed beside its base: start without VLLM_LORA_ENABLE_DUAL_STREAM")
        compilation = config.compilation_config
        compiled = compilation.mode not in (None, CompilationMode.NONE)
        recorded = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
        if not config.model_config.enforce_eager and (compiled or recorded):
            raise ValueError("DoRA needs layers that are not compiled: start the engine with enforce_eager")

    def _module(self, name: str) -> str:
        """vLLM's name of the module that a magnitude belongs to, before it is packed with others."""
        mapper = getattr(self._worker._adapter_manager.model, "hf_to_vllm_mapper", None)
        stem = name.removesuffix(".weight").removesuffix(".lora_magnitude_vector")
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        return str(parse_fine_tuned_lora_name(f"{stem}.lora_A.weight", mapper)[0])

    def _compute(self, lora: Any, vectors: dict[str, torch.Tensor]) -> Iterator[None]:
        """The gains of every module, with a pause after each product."""
        adapters = self._worker._adapter_manager
        packed = {name: parts for name, parts in adapters.packed_modules.items() if name in adapters.modules}
        gains: Gains = {}
        for name, module in adapters.modules.items():
            weights = lora.loras.get(name)
            mine = [vectors.get(part) for part in packed.get(name, [name])]
            if weights is None or all(vector is None for vector in mine):
                continue
            if not isinstance(module, BaseLinearLayerWithLoRA):
                raise ValueError(f"DoRA of {name} is not computed, only of linear layers")
            if name not in self._squares:
                squares = torch.zeros(sum(module.output_slices))
                for part in _squares(module):
                    squares += part
                    yield
                self._squares[name] = squares
            a = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
            b = weights.lora_b if isinstance(weights.lora_b, list) else [weights.lora_b]
            gains[name] = _gain(module, self._squares[name], mine, a, b)
            yield
        self._watch()
        self._gains[lora.id] = gains

    def _watch(self) -> None:
        """From the first such adapter on, each linear layer is followed by its gains."""
        if self._layers:
            return
        adapters = self._worker._adapter_manager
        for name, module in adapters.modules.items():
            if isinstance(module, BaseLinearLayerWithLoRA):
                self._layers[name] = Scaled(module, adapters.lora_slots)
        adapters.activate_adapter = partial(self._activate, adapters.activate_adapter)
        self._runner.loradock_layerwise = self.in_use

    def _activate(self, original: Callable[[int], bool], lora_id: int) -> bool:
        adapters = self._worker._adapter_manager
        if lora_id not in adapters._active_adapters:
            while not self.advance(adapters.get_adapter(lora_id)):
                continue  # vLLM itself has read it again
        changed = original(lora_id)
        if changed:
            slot = adapters.lora_index_to_id.index(lora_id)
            for each in set(self._gains) - set(adapters.list_adapters()):
                self.drop(each)
            gains = self._gains.get(lora_id, {})
            (self._slots.add if gains else self._slots.discard)(slot)
            for name, layer in self._layers.items():
                layer.put(slot, gains.get(name))
        return changed


class Scaled:
    """One layer's gains by slot, and its output times those of each row's adapter."""

    def __init__(self, module: Any, slots: int) -> None:
        self._module = module
        self._slots: set[int] = set()
        # The last row is of those without an adapter, whose slot is -1.
        device = module.lora_b_stacked[0].device
        self._gains = torch.ones(slots + 1, sum(module.output_slices), device=device)
        self._original = module._apply_lora_to_output
        module._apply_lora_to_output = self.apply

    def put(self, slot: int, gains: torch.Tensor | None) -> None:
        """What the slot holds from now on; None is of an adapter that scales nothing here."""
        self._gains[slot] = 1.0 if gains is None else gains.to(self._gains.device)
        (self._slots.discard if gains is None else self._slots.add)(slot)

    @property
    def indices(self) -> torch.Tensor:
        """The slot of each row of this step."""
        indices: torch.Tensor = self._module.punica_wrapper.token_lora_indices
        return indices

    def apply(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output = self._original(x, output)
        if not self._slots:
            return output
        rows = output.reshape(-1, output.shape[-1])
        indices = self.indices[: rows.shape[0]]
        # What pads a batch has no adapter.
        gains = self._gains[torch.nn.functional.pad(indices, (0, rows.shape[0] - indices.shape[0]), value=-1)]
        base = self._module.base_layer
        bias = None if getattr(base, "skip_bias_add", False) else getattr(base, "bias", None)
        scaled = rows.float() * gains if bias is None else (rows.float() - bias) * gains + bias
        # Rows without a magnitude stay what they are to the last bit.
        return torch.where(gains == 1.0, rows, scaled.to(rows.dtype)).view(output.shape)


def _squares(module: Any) -> Iterator[torch.Tensor]:
    """Of each row of the served weights the sum of its squares, some columns at a time."""
    for begin in range(0, module.input_size, COLUMNS):
        count = min(COLUMNS, module.input_size - begin)
        unit = torch.zeros(count, module.input_size)
        unit[torch.arange(count), begin + torch.arange(count)] = 1
        yield _product(module, unit).square().sum(0)


def _product(module: Any, rows: torch.Tensor) -> torch.Tensor:
    """Of rows and the served weights alone, in float32 on the host."""
    dtype = module.lora_a_stacked[0].dtype
    large = 1.0 if dtype == torch.float16 else LARGE
    both = torch.cat([rows.float() * large, torch.zeros(1, rows.shape[1])]).to(dtype).to(module.device)
    product = module._get_quant_method().apply(module.base_layer, both, None).float().cpu()
    return (product[:-1] - product[-1]) / large


def _gain(
    module: Any,
    squares: torch.Tensor,
    vectors: list[torch.Tensor | None],
    a: list[torch.Tensor | None],
    b: list[torch.Tensor | None],
) -> torch.Tensor:
    """magnitude / ||W + B A|| of each output; B holds the adapter's scaling. 1 where there is no magnitude."""
    gains = torch.ones_like(squares)
    begin = 0
    for size, vector, down, up in zip(module.output_slices, vectors, a, b, strict=True):
        rows = slice(begin, begin + size)
        begin += size
        if vector is None or down is None or up is None:
            continue
        crossed = _product(module, down)[:, rows]
        down, up = down.float(), up.float()
        norms = squares[rows] + 2 * (up * crossed.T).sum(1) + ((up @ (down @ down.T)) * up).sum(1)
        gains[rows] = vector.float().flatten() / norms.clamp(min=1e-12).sqrt()
    return gains
