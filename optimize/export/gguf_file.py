"""A GGUF file of a model, and one of each adapter, as llama.cpp, Ollama and LM Studio read them.

    model.gguf, adapters/NAME.gguf     the export
    dense/                             what the file's weights are, in bfloat16: quality is measured on them

Each matrix is rounded by itself (`gguf_blocks`); with `method: gptq` those of the layers are calibrated, layer by
layer, on what the rounded layers before give. `q4_k_m` is llama.cpp's mixture: 6 bits for the output layer, and for
values and the MLP's last matrix in half of the layers. An adapter's matrices stay float32.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from optimize.checkpoint.checkpoint import Checkpoint, Writer
from optimize.checkpoint.model import held, settle, through
from optimize.errors import OptimizeError
from optimize.export import gguf_metadata
from optimize.export.gguf_blocks import CALIBRATED, blocks, calibrated, kind_of
from optimize.job import Job, Progress
from optimize.steps.calibrated import CalibratedModel, first_readers, windows
from optimize.steps.merge.merge import Adapter, read
from optimize.steps.quantize.gptq import damped, following

KINDS = {
    "fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q4_0": "Q4_0", "q4_k_m": "Q4_K",
}  # fmt: skip
FILE, ADAPTERS = "model.gguf", "adapters"
Blocks: TypeAlias = NDArray[np.uint8]
_LAYER = re.compile(r"layers\.(\d+)\.")


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
    source, out = Checkpoint(Path(job.model)), job.folder / "model"
    for folder in (out, job.folder / "dense"):
        shutil.rmtree(folder, ignore_errors=True)
    (out / ADAPTERS).mkdir(parents=True)
    precision, method = job.options["precision"], job.options.get("method", "nearest")
    adapters = {name: read(name, Path(path)) for name, path in sorted(job.adapters.items())}
    rounded = _calibrated(job, source, progress) if method == "gptq" else ()
    notes = _model(source, out / FILE, precision, method, rounded, progress)
    dense(source, out / FILE, job.folder / "dense")
    for name, adapter in adapters.items():
        _adapter(source, adapter, out / ADAPTERS / f"{name}.gguf")
    exported = {"adapters": {name: "exported for llama.cpp" for name in adapters}} if adapters else {}
    return {"precision": precision, "method": method, **notes, **exported, "bytes": (out / FILE).stat().st_size}


def dense(like: Checkpoint, file: Path, folder: Path) -> Path:
    """What the weights in a file are, as a checkpoint in bfloat16: of the model `like`, which it was made of."""
    architecture, turned = gguf_metadata.ARCHITECTURES[like.config["architectures"][0]]
    names = _names(architecture, int(like.config["num_hidden_layers"]))
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    shutil.rmtree(folder, ignore_errors=True)
    out = Writer(folder, like.folder)
    for name in _wanted(like):
        tensor = there.get(_name(names, name))
        if tensor is None:
            raise OptimizeError(f"{file.name} has no {_name(names, name)}")
        read = _read(tensor.data, tensor.tensor_type).view(like.shapes[name])
        out.add(name, (_apart(read, name, like.config) if turned else read).bfloat16())
    out.close(like.config)
    return folder


def _wanted(source: Checkpoint) -> list[str]:
    return [name for name in source.entries if not (name == "lm_head.weight" and source.tied)]


def _model(
    source: Checkpoint,
    file: Path,
    precision: str,
    method: str,
    rounded: Iterable[tuple[str, Blocks]],
    progress: Progress,
) -> dict[str, Any]:
    """The file: what is `rounded` already, by name, and then all else."""
    architecture, turned = gguf_metadata.ARCHITECTURES[source.config["architectures"][0]]
    names = _names(architecture, int(source.config["num_hidden_layers"]))
    out = gguf.GGUFWriter(file, architecture, use_temp_file=True)
    out.add_type("model")
    out.add_name(source.folder.name)
    about = {"precision": precision, "method": method, "made_by": "loradock optimize"}
    out.add_string("loradock.manifest", json.dumps(about))
    gguf_metadata.write(out, source.config, source.folder)
    types: Counter[str] = Counter()

    def add(name: str, kind: str, values: NDArray[Any]) -> None:
        types[kind] += math.prod(source.shapes[name])
        label = None if kind == "F32" and values.ndim == 1 else gguf.GGMLQuantizationType[kind]
        out.add_tensor(_name(names, name), values, raw_dtype=label)

    left = dict.fromkeys(_wanted(source))
    for name, packed in rounded:
        add(name, _kind(source, name, precision), packed)
        del left[name]
    for done, name in enumerate(left):
        progress(done, len(left), name)
        tensor, kind = source.tensor(name).float(), _kind(source, name, precision)
        moved = _side_by_side(tensor, name, source.config) if turned else tensor
        add(name, kind, np.ascontiguousarray(moved.numpy()) if tensor.ndim == 1 else blocks(moved, kind))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    whole = sum(types.values())
    return {"types": {kind: round(count / whole, 4) for kind, count in types.most_common()}}


def _kind(source: Checkpoint, name: str, precision: str) -> str:
    """The type of a tensor."""
    shape = source.shapes[name]
    if len(shape) == 1:
        return "F32"
    wanted, layers = KINDS[precision], int(source.config["num_hidden_layers"])
    head = name == "lm_head.weight" or (source.tied and name == "model.embed_tokens.weight")
    sensitive = False
    if precision == "q4_k_m":
        found = _LAYER.search(name)
        layer = int(found[1]) if found and name.endswith(("v_proj.weight", "down_proj.weight")) else -1
        sensitive = layer >= 0 and (layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2)
    if sensitive or (head and precision.startswith("q4")):  # as in llama.cpp's files of these names
        wanted = "Q6_K"
    return kind_of(wanted, shape[1])


@torch.inference_mode()
def _calibrated(job: Job, source: Checkpoint, progress: Progress) -> Iterator[tuple[str, Blocks]]:
    """The blocks of each matrix of the layers, rounded for what the rounded layers before it give."""
    progress(0, 1, "loading")
    model = CalibratedModel(source.folder, windows(job), by_layer=True)
    turned = gguf_metadata.ARCHITECTURES[source.config["architectures"][0]][1]
    begun, full = model.entered(), model.parameters()
    whole, vectors = begun, sum(state[..., 0].numel() for state in begun.states)
    for at, layer in enumerate(model.layers):
        progress(at, len(model.layers), f"rounding, layer {at + 1} of {len(model.layers)}")
        with held(layer):
            units = model.units_of(at)
            hessians, apart, whole = model.products(at, first_readers(units), begun, whole)
            for unit in units:
                hessian, of_unit = hessians.pop(unit), apart.pop(unit)
                importance = hessian.diagonal().clone()
                damped(hessian, vectors)
                kinds: dict[str, list[str]] = {}
                for name in (f"{name}.weight" for name in unit.names):
                    kinds.setdefault(_kind(source, name, job.options["precision"]), []).append(name)
                for kind, names in kinds.items():
                    if kind not in CALIBRATED:
                        continue
                    tensors = [model.model.get_parameter(name).float() for name in names]
                    if turned:
                        tensors = [_side_by_side(*of, source.config) for of in zip(tensors, names, strict=True)]
                    rows = [len(tensor) for tensor in tensors]
                    packed = calibrated(following(torch.cat(tensors), hessian, of_unit), kind, hessian, importance)
                    back = _read(packed, gguf.GGMLQuantizationType[kind]).split(rows)
                    for name, part, values in zip(names, np.split(packed, np.cumsum(rows)[:-1]), back, strict=True):
                        yield name, part
                        weight = _apart(values, name, source.config) if turned else values
                        model.set_weight(name.removesuffix(".weight"), weight)
            begun = through([layer], begun)
            if not all(bool(state.isfinite().all()) for state in begun.states):
                raise OptimizeError(f"layer {at} gives NaN or infinity on the calibration text: the weights are broken")
            model.restore(at, full)


def _read(packed: Blocks, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(packed, kind), np.float32))  # of its own: torch may write


def _names(architecture: str, layers: int) -> Any:
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    return gguf.get_tensor_name_map(number, layers)


def _name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise OptimizeError(f"a GGUF file has no name for the tensor {name!r}")
    return str(found)


def _side_by_side(tensor: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """Rows of queries and keys as llama.cpp rotates them: the two of a pair beside one another."""
    return _turned(tensor, name, config, (2, -1))


def _apart(tensor: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """As they were."""
    return _turned(tensor, name, config, (-1, 2))


def _turned(tensor: torch.Tensor, name: str, config: dict[str, Any], sizes: tuple[int, int]) -> torch.Tensor:
    module = name.split(".lora_")[0].removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if module not in ("q_proj", "k_proj"):
        return tensor
    heads = int(config["num_attention_heads"])
    count = heads if module == "q_proj" else int(config.get("num_key_value_heads") or heads)
    first, second = sizes
    half = tensor.shape[0] // count // 2
    shape = (count, first if first > 0 else half, second if second > 0 else half, *tensor.shape[1:])
    return tensor.reshape(shape).transpose(1, 2).reshape(tensor.shape).contiguous()


def _adapter(source: Checkpoint, adapter: Adapter, file: Path) -> None:
    """As llama.cpp's `convert_lora_to_gguf.py` writes it: a product is multiplied by alpha and divided by its rank.

    Where scales differ from module to module, what is left of each is in B.
    """
    architecture, turned = gguf_metadata.ARCHITECTURES[source.config["architectures"][0]]
    names = _names(architecture, int(source.config["num_hidden_layers"]))
    alpha = float(adapter.config["lora_alpha"])
    out = gguf.GGUFWriter(file, architecture)
    out.add_type("adapter")
    out.add_name(adapter.name)
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", alpha)
    for module, parts in sorted(adapter.lora.items()):
        if not {"A", "B"} <= set(parts):
            raise OptimizeError(f"the adapter {adapter.name!r} changes {module} by more than A and B")
        a, b = parts["A"].float(), parts["B"].float()
        b = b * (adapter.scale(module) * a.shape[0] / alpha)
        b = _side_by_side(b, f"{module}.weight", source.config) if turned else b
        label = _name(names, f"{module}.weight")
        for half, tensor in (("a", a), ("b", b)):
            out.add_tensor(f"{label}.lora_{half}", np.ascontiguousarray(tensor.numpy()))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
