"""A GGUF file of a model, and one of each adapter, as llama.cpp, Ollama and LM Studio read them.

    model.gguf, adapters/NAME.gguf     the export
    dense/                             what the file's weights are, in bfloat16: quality is measured on them

Each matrix is rounded by itself (`gguf_blocks`), without calibration. `q4_k_m` is llama.cpp's mixture: 6 bits for the
output layer, and for values and the MLP's last matrix in half of the layers. An adapter's matrices stay float32.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from optimize.checkpoint.checkpoint import Checkpoint, Writer
from optimize.checkpoint.model import settle
from optimize.errors import OptimizeError
from optimize.export import gguf_metadata
from optimize.export.gguf_blocks import blocks, kind_of
from optimize.job import Job, Progress
from optimize.steps.merge.merge import Adapter, read

KINDS = {
    "fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q4_0": "Q4_0", "q4_k_m": "Q4_K",
}  # fmt: skip
FILE, ADAPTERS = "model.gguf", "adapters"
_LAYER = re.compile(r"layers\.(\d+)\.")


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
    source, out = Checkpoint(Path(job.model)), job.folder / "model"
    for folder in (out, job.folder / "dense"):
        shutil.rmtree(folder, ignore_errors=True)
    (out / ADAPTERS).mkdir(parents=True)
    precision = job.options["precision"]
    adapters = {name: read(name, Path(path)) for name, path in sorted(job.adapters.items())}
    notes = _model(source, out / FILE, precision, progress)
    dense(source, out / FILE, job.folder / "dense")
    for name, adapter in adapters.items():
        _adapter(source, adapter, out / ADAPTERS / f"{name}.gguf")
    exported = {"adapters": {name: "exported for llama.cpp" for name in adapters}} if adapters else {}
    return {"precision": precision, **notes, **exported, "bytes": (out / FILE).stat().st_size}


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
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)  # of its own: torch may write
        read = torch.from_numpy(values).view(like.shapes[name])
        out.add(name, (_apart(read, name, like.config) if turned else read).bfloat16())
    out.close(like.config)
    return folder


def _wanted(source: Checkpoint) -> list[str]:
    return [name for name in source.entries if not (name == "lm_head.weight" and source.tied)]


def _model(source: Checkpoint, file: Path, precision: str, progress: Progress) -> dict[str, Any]:
    architecture, turned = gguf_metadata.ARCHITECTURES[source.config["architectures"][0]]
    layers = int(source.config["num_hidden_layers"])
    names = _names(architecture, layers)
    out = gguf.GGUFWriter(file, architecture, use_temp_file=True)
    out.add_type("model")
    out.add_name(source.folder.name)
    out.add_string("loradock.manifest", json.dumps({"precision": precision, "made_by": "loradock optimize"}))
    gguf_metadata.write(out, source.config, source.folder)
    types: Counter[str] = Counter()
    wanted = _wanted(source)
    for done, name in enumerate(wanted):
        progress(done, len(wanted), name)
        tensor = source.tensor(name).float()
        moved = _side_by_side(tensor, name, source.config) if turned else tensor
        kind = "F32" if tensor.ndim == 1 else kind_of(_kind(name, precision, layers, source.tied), tensor.shape[1])
        types[kind] += tensor.numel()
        label = gguf.GGMLQuantizationType[kind]
        if tensor.ndim == 1:
            out.add_tensor(_name(names, name), np.ascontiguousarray(moved.numpy()))
        else:
            out.add_tensor(_name(names, name), blocks(moved, kind), raw_dtype=label)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    whole = sum(types.values())
    return {"types": {kind: round(count / whole, 4) for kind, count in types.most_common()}}


def _kind(name: str, precision: str, layers: int, tied: bool) -> str:
    """The type of a matrix, before its sizes have a say."""
    kind = KINDS[precision]
    if precision != "q4_k_m":
        return kind
    if name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight"):
        return "Q6_K"
    found = _LAYER.search(name)
    if found and name.endswith(("v_proj.weight", "down_proj.weight")):
        layer = int(found[1])
        if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
            return "Q6_K"
    return kind


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
