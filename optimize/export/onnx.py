"""An ONNX export with KV cache inputs and adapters, checked against PyTorch.

The graph comes from transformers' own exporter, or optimum's, in fp32; int8 and int4 are ONNX Runtime's weight
quantizer over it, a scale for every 32 weights (`optimize.export.blocks`); activations are rounded to 8 bits, 32 at a
time, where they are multiplied. One file, model.onnx, with its weights beside it in model.onnx.data, as optimum lays it
out. An adapter is a file of its own, values for inputs of the graph that are zero without it.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import adapted, logits, opened, settle, tokenizer
from optimize.errors import OptimizeError
from optimize.export import layout, optimum, streamed
from optimize.export.adapters import adaptable, write
from optimize.export.session import ADAPTER_SUFFIX, ADAPTERS, GRAPH, Session
from optimize.job import Job, Progress
from optimize.steps import planning
from optimize.steps.merge.merge import read

GREEDY = 64  # tokens of the parity check
TOLERANCE = 1e-4  # of fp32's logits
PROBE = "The harbour was quiet that morning, and the boats lay still beside the wall while the baker carried bread."
BITS = {"int8": 8, "int4": 4}
STAGES = 20  # the graph takes 16 of them: exporting it is most of the work


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
    folder, out = Path(job.model), job.folder / "model"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    precision = job.options["precision"]
    progress(0, STAGES, "exporting the graph")
    aside = job.folder / "fp32"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    notes = {"exporter": job.options.get("exporter", "transformers")}
    if notes["exporter"] == "optimum":
        notes["validation"] = optimum.export(folder, aside)  # holds the model itself meanwhile
        named: dict[str, str] = {}
    else:
        named = _export(folder, aside / GRAPH)
        layout.named(aside / GRAPH)
    layout.any_empty_cache(aside / GRAPH, Checkpoint(folder).config)
    progress(16, STAGES, f"weights to {precision}")
    _written(folder, named, aside, out, precision)
    shutil.rmtree(aside, ignore_errors=True)
    progress(17, STAGES, "adapters")
    adapters = {name: read(name, Path(path)) for name, path in sorted(job.adapters.items())}
    dtype = adaptable(out / GRAPH, {module for adapter in adapters.values() for module in adapter.lora})
    for name, adapter in adapters.items():
        write(out / ADAPTERS / f"{name}{ADAPTER_SUFFIX}", adapter, dtype)
    layout.side_files(folder, out, precision)
    progress(18, STAGES, "answering in ONNX Runtime")
    ids = tokenizer(folder)(PROBE, add_special_tokens=False).input_ids
    session = Session(out)
    provider, answers = session.provider, {"base": _answer(session, ids)}
    for name in adapters:
        session.choose(name)
        answers[name] = _answer(session, ids)
    del session  # its weights and PyTorch's are never in memory together
    progress(19, STAGES, "checking against PyTorch")
    model = _reference(folder, job.memory)
    checked = {"base": _compared(model, ids, answers["base"])}
    for name in adapters:
        with adapted(model, Path(job.adapters[name])) as both:
            checked[name] = _compared(both, ids, answers[name])
    worst = max(comparison["logits_off"] for comparison in checked.values())
    same = min(comparison["greedy_same"] for comparison in checked.values())
    if precision == "fp32" and (worst > TOLERANCE or same < GREEDY):
        raise OptimizeError(f"the ONNX graph does not compute what PyTorch does: {checked}")
    exported = {"adapters": {name: "exported for ONNX Runtime" for name in adapters}} if adapters else {}
    return {
        "precision": precision, **notes, **exported, "logits_off": worst, "greedy_same": same, "checked": checked,
        "provider": provider, "scores": {"logit_difference": worst},
    }  # fmt: skip


def _reference(folder: Path, memory: int = 0) -> Any:
    """The model in fp32; layer by layer where it does not fit into half of the `memory`."""
    whole = 4 * sum(math.prod(shape) for shape in Checkpoint(folder).shapes.values())
    return _short_rope(opened(folder, torch.float32, by_layer=planning.by_layer(whole, memory)))


def _short_rope(model: Any) -> Any:
    for module in model.modules():
        if getattr(module, "rope_type", "") == "longrope":
            module.rope_type = "default"  # the short factors, as up to `layout.longest`: a graph cannot choose
    return model


def _export(folder: Path, file: Path) -> dict[str, str]:
    """The graph in fp32; the matrices that are left out of it by their names there, with those in the checkpoint."""
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model, named = streamed.ghost(folder) or (opened(folder, torch.float32), {})
    _short_rope(model)
    # Sizes that differ from one another and from the model's own, so that each axis becomes a symbol of its own.
    past = 7
    now = 3
    rows = 2
    with torch.no_grad(), warnings.catch_warnings(), streamed.unfolded(named):
        warnings.simplefilter("ignore")
        cache = DynamicCache()  # without the config: layers with a window keep all, and their masks hold the window
        model(torch.arange(5, 5 + rows * past).view(rows, past), past_key_values=cache, use_cache=True)
        inputs = {
            "input_ids": torch.arange(5, 5 + rows * now).view(rows, now),
            "attention_mask": torch.ones(rows, past + now, dtype=torch.long),
            "position_ids": torch.arange(past, past + now).expand(rows, now).contiguous(),
            "past_key_values": cache,
            "use_cache": True,
        }
        program = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    if named:
        streamed.save(program, named, file)
    else:
        program.save(file, external_data=True)
    return named


def _written(folder: Path, named: dict[str, str], source: Path, out: Path, precision: str) -> None:
    """The graph in `source` with weights of `precision`, in `out`; those that are `named` are the checkpoint's."""
    import onnx

    model = onnx.load(source / GRAPH, load_external_data=False)
    if precision in BITS:
        weights = streamed.matrices(model, Checkpoint(folder), named) if named else streamed.stored(model, source)
        streamed.written(model, weights, out, BITS[precision])
        return
    whole = source
    if named:
        whole = out if precision == "fp32" else source / "whole"
        whole.mkdir(exist_ok=True)
        streamed.written(model, streamed.matrices(model, Checkpoint(folder), named), whole)
    if precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        # Inputs and outputs stay fp32, so that the caller need not know the precision.
        half = convert_float_to_float16(onnx.load(whole / GRAPH), keep_io_types=True, disable_shape_infer=True)
        onnx.save(half, out / GRAPH, save_as_external_data=True, location=f"{GRAPH}.data")
    elif whole is source:
        for file in source.iterdir():
            shutil.copyfile(file, out / file.name)


def _answer(session: Session, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """The prefill's logits, and a greedy decode through the cache."""
    made = session.logits(torch.tensor([ids]))
    start = time.monotonic()
    tokens = list(session.tokens(ids, GREEDY))
    print(f"{GREEDY / (time.monotonic() - start):.1f} tokens/s through ONNX Runtime")
    return made, tokens


def _compared(model: Any, ids: list[int], answer: tuple[torch.Tensor, list[int]]) -> dict[str, Any]:
    """An answer against PyTorch's, which reads it and says what it would have said at each place."""
    made, tokens = answer
    reference = logits(model, torch.tensor([[*ids, *tokens[:-1]]]))
    off = float((made - reference[:, : len(ids)]).abs().max())
    expected = reference[0, len(ids) - 1 :].argmax(-1).tolist()
    same = next((at for at, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), GREEDY)
    return {"logits_off": round(off, 6), "greedy_same": same}
