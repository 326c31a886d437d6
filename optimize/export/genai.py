"""An export for onnxruntime-genai, with adapters that are chosen at run time: `genai_config.json`, `model.onnx` and
`adapters/NAME.onnx_adapter`.

The graph is onnxruntime-genai's own builder's. Where any adapter changes a module, the graph has the module's A and B
as inputs whose default is zero; an adapter file holds values for them, of its own rank, with the scale in B. A
generator has one adapter at a time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimize.checkpoint.checkpoint import ADAPTER, Checkpoint
from optimize.checkpoint.model import adapted, opened, settle, tokenizer
from optimize.errors import OptimizeError
from optimize.export.onnx import GRAPH, GREEDY, PROBE, TOLERANCE
from optimize.job import Job, Progress
from optimize.steps.merge.merge import read


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
    folder, out, precision = Path(job.model), job.folder / "model", job.options["precision"]
    shutil.rmtree(out, ignore_errors=True)
    adapters = {name: read(name, Path(path)) for name, path in sorted(job.adapters.items())}
    modules = sorted({module for adapter in adapters.values() for module in adapter.lora})
    progress(0, 4, "building the graph")
    _built(folder, out, precision, modules, job.folder)
    progress(1, 4, "adapters")
    if modules:
        _opened_for_adapters(out / GRAPH)
    written = {}
    for name, adapter in adapters.items():
        written[name] = out / "adapters" / f"{name}.onnx_adapter"
        _write(written[name], {
            module: ((parts["A"].float()).T, parts["B"].float().T * adapter.scale(module))
            for module, parts in adapter.lora.items()
        })  # fmt: skip
    shutil.copyfile(folder / "config.json", out / "config.json")
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
    progress(2, 4, "checking against PyTorch")
    checked = _parity(folder, out, {name: Path(path) for name, path in job.adapters.items()}, written)
    worst = max(one["logits_off"] for one in checked.values())
    if precision == "fp32" and (worst > TOLERANCE or min(one["greedy_same"] for one in checked.values()) < GREEDY):
        raise OptimizeError(f"the graph does not compute what PyTorch does: {checked}")
    notes = {name: "exported for onnxruntime-genai" for name in adapters}
    return {"precision": precision, "checked": checked, "adapters": notes, "scores": {"logit_difference": worst}}


def node(module: str) -> str:
    """The builder's name of a module: model.layers.0.attn.q_proj for model.layers.0.self_attn.q_proj."""
    return module.replace(".self_attn.", ".attn.")


def _built(folder: Path, out: Path, precision: str, modules: list[str], work: Path) -> None:
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    options = []
    nothing = work / "nothing"
    if modules:
        _adapter_of_zeros(folder, nothing, modules)
        options.append(f"adapter_path={nothing}")
        if precision == "int4":
            products = [f"{_path(module)}/{part}/MatMul" for module in modules for part in ("lora_A", "lora_B")]
            options.append(f"nodes_to_exclude={','.join(products)}")
    if precision == "int4":
        options.append("int4_accuracy_level=4")
    where = ("", str(folder), str(out), precision, "cpu", str(work / "cache"))
    create_model(*where, **parse_extra_options(*where, options))
    shutil.rmtree(nothing, ignore_errors=True)
    shutil.rmtree(work / "cache", ignore_errors=True)


def _path(module: str) -> str:
    """/model/layers.0/attn/q_proj: what the builder's nodes of a module are called."""
    model, layers, number, *rest = node(module).split(".")
    return "/".join(["", model, f"{layers}.{number}", *rest])


def _adapter_of_zeros(folder: Path, out: Path, modules: list[str]) -> None:
    """An adapter of rank 1 that changes nothing, on every module that any adapter changes."""
    from safetensors.torch import save_file

    shapes = Checkpoint(folder).shapes
    tensors = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(1, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(rows, 1)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": modules}
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / ADAPTER, {"format": "pt"})


def _opened_for_adapters(file: Path) -> None:
    """A and B become inputs of any rank, with what they hold as their default."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for held in model.graph.initializer:
        if ".lora_A." in held.name or ".lora_B." in held.name:
            rank = f"rank of {held.name.rpartition('.lora_')[0]}"  # one name for all would mean one rank for all
            shape = [rank, held.dims[1]] if ".lora_B." in held.name else [held.dims[0], rank]
            model.graph.input.append(onnx.helper.make_tensor_value_info(held.name, held.data_type, shape))
    stale = [value for value in model.graph.value_info if "/lora_A/" in value.name]
    for value in stale:
        model.graph.value_info.remove(value)
    onnx.save(model, file)


def _write(file: Path, parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    import onnxruntime

    file.parent.mkdir(exist_ok=True)
    values = {}
    for module, (down, up) in sorted(parts.items()):
        for part, tensor in (("lora_A", down), ("lora_B", up)):
            name = f"{node(module)}.{part}.MatMul.weight"
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    adapter.export_adapter(str(file))


def _parity(folder: Path, out: Path, adapters: dict[str, Path], files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The prefill's logits and a greedy answer of onnxruntime-genai, for the base and each adapter, against PyTorch."""
    import onnxruntime_genai

    words, model = tokenizer(folder), opened(folder, torch.float32)
    ids = words(PROBE, add_special_tokens=False).input_ids
    runtime = onnxruntime_genai.Model(str(out))
    held = onnxruntime_genai.Adapters(runtime)
    found = {"base": _compared(model, runtime, None, None, ids, out)}
    for name, path in adapters.items():
        held.load(str(files[name]), name)
        with adapted(model, path) as both:
            found[name] = _compared(both, runtime, held, name, ids, out)
    return found


def _compared(model: Any, runtime: Any, held: Any, name: str | None, ids: list[int], out: Path) -> dict[str, Any]:
    import onnxruntime_genai

    with torch.no_grad():
        made = model(torch.tensor([ids]), use_cache=True)
        right, wanted = made.logits[0, -1], [int(made.logits[0, -1].argmax())]
        while len(wanted) < GREEDY:
            made = model(torch.tensor([wanted[-1:]]), past_key_values=made.past_key_values, use_cache=True)
            wanted.append(int(made.logits[0, -1].argmax()))
    parameters = onnxruntime_genai.GeneratorParams(runtime)
    parameters.set_search_options(max_length=len(ids) + GREEDY, min_length=len(ids) + GREEDY, do_sample=False)
    generator = onnxruntime_genai.Generator(runtime, parameters)
    if name is not None:
        generator.set_active_adapter(held, name)
    generator.append_tokens(np.array([ids], np.int32))
    off = float(np.abs(generator.get_logits()[0, -1] - right.numpy()).max())
    said: list[int] = []
    while not generator.is_done() and len(said) < GREEDY:
        generator.generate_next_token()
        said.append(int(generator.get_next_tokens()[0]))
    same = next((at for at, (a, b) in enumerate(zip(said, wanted, strict=False)) if a != b), min(len(said), GREEDY))
    return {"logits_off": round(off, 6), "greedy_same": same}
