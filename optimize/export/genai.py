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

from optimize.checkpoint.checkpoint import ADAPTER_CONFIG, Checkpoint, write_adapter
from optimize.checkpoint.model import adapted, opened, settle, tokenizer
from optimize.errors import OptimizeError
from optimize.export.adapters import write
from optimize.export.onnx import GREEDY, PROBE, TOLERANCE
from optimize.export.session import ADAPTER_SUFFIX, ADAPTERS, GRAPH
from optimize.job import Job, Progress
from optimize.steps.merge.merge import read


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
    folder = Path(job.model)
    out = job.folder / "model"
    precision = job.options["precision"]
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
        written[name] = out / ADAPTERS / f"{name}{ADAPTER_SUFFIX}"
        write(written[name], adapter, np.float32, parameters)
    shutil.copyfile(folder / "config.json", out / "config.json")
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
    progress(2, 4, "checking against PyTorch")
    checked = _parity(folder, out, {name: Path(path) for name, path in job.adapters.items()}, written)
    worst = max(comparison["logits_off"] for comparison in checked.values())
    same = min(comparison["greedy_same"] for comparison in checked.values())
    if precision == "fp32" and (worst > TOLERANCE or same < GREEDY):
        raise OptimizeError(f"the graph does not compute what PyTorch does: {checked}")
    notes = {name: "exported for onnxruntime-genai" for name in adapters}
    return {"precision": precision, "checked": checked, "adapters": notes, "scores": {"logit_difference": worst}}


def node(module: str) -> str:
    """The builder's name of a module: model.layers.0.attn.q_proj for model.layers.0.self_attn.q_proj."""
    return module.replace(".self_attn.", ".attn.")


def parameters(module: str) -> tuple[str, str]:
    """The builder's names of a module's A and B."""
    return f"{node(module)}.lora_A.MatMul.weight", f"{node(module)}.lora_B.MatMul.weight"


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
    shapes = Checkpoint(folder).shapes
    tensors = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(1, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(rows, 1)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": modules}
    (out / ADAPTER_CONFIG).write_text(json.dumps(config))
    write_adapter(out, tensors)


def _opened_for_adapters(file: Path) -> None:
    """A and B become inputs of any rank; their default is their value in the graph."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for constant in model.graph.initializer:
        if ".lora_A." in constant.name or ".lora_B." in constant.name:
            rank = f"rank of {constant.name.rpartition('.lora_')[0]}"  # one name for all would mean one rank for all
            shape = [rank, constant.dims[1]] if ".lora_B." in constant.name else [constant.dims[0], rank]
            model.graph.input.append(onnx.helper.make_tensor_value_info(constant.name, constant.data_type, shape))
    stale = [value for value in model.graph.value_info if "/lora_A/" in value.name]
    for value in stale:
        model.graph.value_info.remove(value)
    onnx.save(model, file)


def _parity(folder: Path, out: Path, adapters: dict[str, Path], files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The prefill's logits and a greedy answer of onnxruntime-genai, for the base and each adapter, against PyTorch."""
    import onnxruntime_genai

    words, model = tokenizer(folder), opened(folder, torch.float32)
    ids = words(PROBE, add_special_tokens=False).input_ids
    runtime = onnxruntime_genai.Model(str(out))
    loaded = onnxruntime_genai.Adapters(runtime)
    comparisons = {"base": _compared(model, runtime, None, None, ids)}
    for name, path in adapters.items():
        loaded.load(str(files[name]), name)
        with adapted(model, path) as both:
            comparisons[name] = _compared(both, runtime, loaded, name, ids)
    return comparisons


def _compared(model: Any, runtime: Any, loaded: Any, name: str | None, ids: list[int]) -> dict[str, Any]:
    import onnxruntime_genai

    with torch.no_grad():
        made = model(torch.tensor([ids]), use_cache=True)
        reference, expected = made.logits[0, -1], [int(made.logits[0, -1].argmax())]
        while len(expected) < GREEDY:
            made = model(torch.tensor([expected[-1:]]), past_key_values=made.past_key_values, use_cache=True)
            expected.append(int(made.logits[0, -1].argmax()))
    parameters = onnxruntime_genai.GeneratorParams(runtime)
    parameters.set_search_options(max_length=len(ids) + GREEDY, min_length=len(ids) + GREEDY, do_sample=False)
    generator = onnxruntime_genai.Generator(runtime, parameters)
    if name is not None:
        generator.set_active_adapter(loaded, name)
    generator.append_tokens(np.array([ids], np.int32))
    off = float(np.abs(generator.get_logits()[0, -1] - reference.numpy()).max())
    generated: list[int] = []
    while not generator.is_done() and len(generated) < GREEDY:
        generator.generate_next_token()
        generated.append(int(generator.get_next_tokens()[0]))
    different = (at for at, (ours, theirs) in enumerate(zip(generated, expected, strict=False)) if ours != theirs)
    same = next(different, min(len(generated), GREEDY))
    return {"logits_off": round(off, 6), "greedy_same": same}
