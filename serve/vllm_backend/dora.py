"""DoRA: an adapter with a magnitude for each output, in vLLM's layers.

    output = g * (W x + B A x) + bias        g = magnitude / ||W + B A||, of each row

The norms are of the weights that are served, in whatever format. g of an adapter is computed once, when it is loaded,
between steps; the base's norms once for all adapters. A fused step of our kernels multiplies with g too. Where they do
not know a layer, a step with a row of such an adapter goes layer by layer.

Not where the layers were compiled or recorded before the first such adapter came, nor where they are spread over
devices.
"""

from __future__ import annotations

import ctypes
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
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name

from serve.adapters.adapter import CONFIG, WEIGHTS
from serve.vllm_backend.eager_layers import is_eager, slots_of

ENDINGS = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
# Columns and rows of a base's weights that are looked at at a time, and seconds of such products between two steps.
COLUMNS, ROWS = 256, 4096
BUDGET = 0.05
# Some layers add their bias to every product, which nothing of so large a vector's is lost in.
LARGE = 2.0**20
# Trained gains are near 1. Where outputs are as many times as large, what follows overflows.
MOST_GAIN = 1e4

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
        # Not kept while it runs: one that failed begins anew.
        computing = self._computing.pop(lora.id, None) or self._compute(lora, vectors)
        for _ in computing:
            if perf_counter() > until:
                self._computing[lora.id] = computing
                return False
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
        if not is_eager(config):
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
            if not (gains[name].abs() <= MOST_GAIN).all():
                raise ValueError(f"a magnitude of {name} is too large for the base's weights: train it again")
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
        if not all(layer.is_fused for layer in self._layers.values()):
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
        # Where our kernels know the layer, a fused step multiplies its outputs with the gains itself.
        self._kernels = _kernels(module)
        self._original = module._apply_lora_to_output
        module._apply_lora_to_output = self.apply

    def put(self, slot: int, gains: torch.Tensor | None) -> None:
        """What the slot holds from now on; None is of an adapter that scales nothing here."""
        self._gains[slot] = 1.0 if gains is None else gains.to(self._gains.device)
        if self._kernels is not None:
            values = torch.empty(0) if gains is None else gains.float().contiguous()
            place = ctypes.c_void_p(values.data_ptr() if len(values) else None)
            self._kernels.loradock_gains(self._module.punica_wrapper.number, slot, place, len(values))
        (self._slots.discard if gains is None else self._slots.add)(slot)

    @property
    def is_fused(self) -> bool:
        return self._kernels is not None

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
        gains = self._gains[slots_of(self._module.punica_wrapper, rows.shape[0])]
        base = self._module.base_layer
        bias = None if getattr(base, "skip_bias_add", False) else getattr(base, "bias", None)
        scaled = rows.float() * gains if bias is None else (rows.float() - bias) * gains + bias
        # Rows without a magnitude stay what they are to the last bit.
        return torch.where(gains == 1.0, rows, scaled.to(rows.dtype)).view(output.shape)


def _kernels(module: Any) -> Any:
    """Ours, if they know the adapters of a layer; else None."""
    if not hasattr(module.punica_wrapper, "number"):
        return None
    from serve.cpu_kernels.build import library

    return library()


def _squares(module: Any) -> Iterator[torch.Tensor]:
    """Of each row of the served weights the sum of its squares, in parts that add up.

    Where the weights cannot be read, products with unit vectors say what they are: so many as the layer has inputs.
    """
    weight, count = getattr(module.base_layer, "weight", None), sum(module.output_slices)
    if (packed := _packed_squares(module.base_layer, count)) is not None:
        yield packed
        return
    if weight is not None and weight.shape == (count, module.input_size) and weight.is_floating_point():
        for begin in range(0, count, ROWS):
            part = torch.zeros(count)
            part[begin : begin + ROWS] = weight[begin : begin + ROWS].detach().float().square().sum(1).cpu()
            yield part
        return
    for begin in range(0, module.input_size, COLUMNS):
        count = min(COLUMNS, module.input_size - begin)
        unit = torch.zeros(count, module.input_size)
        unit[torch.arange(count), begin + torch.arange(count)] = 1
        yield _product(module, unit).square().sum(0)


def _packed_squares(layer: Any, count: int) -> torch.Tensor | None:
    """Of weights that our kernels have packed."""
    if getattr(layer, "loradock_matrix", -1) < 0:
        return None
    from serve.cpu_kernels.build import library
    from serve.cpu_kernels.packing import at

    kernels, squares = library(), torch.empty(count)
    refused = kernels is None or kernels.loradock_row_squares(layer.loradock_matrix, at(squares))
    return None if refused else squares


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
