"""How fast this machine is with a model, measured before the plan in a process like a step's: one layer of the model's
own shape runs on tokens, and one matrix is rounded.

Seconds are of the thread that waits for the others, without what other programs took of the processor meanwhile.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, log_softmax

from optimize.checkpoint.checkpoint import Checkpoint, adapter_config
from optimize.checkpoint.linears import group
from optimize.checkpoint.model import (
    compute_dtype,
    configured,
    entered,
    for_few_rows,
    layers,
    round_activations,
    settle,
    skeleton,
    skeleton_of,
    threads,
    through,
    tokenizer,
)
from optimize.data import text
from optimize.errors import OptimizeError
from optimize.job import Job, Progress
from optimize.options import Evaluate, Text
from optimize.pipeline.child import resident_bytes
from optimize.pipeline.worker import sentence
from optimize.steps.calibrated import products_of
from optimize.steps.merge.check import off_in_places
from optimize.steps.prune import sparse
from optimize.steps.prune.rules import pattern_of
from optimize.steps.quantize import gptq

AGAIN = 3  # the least of so many counts
ROWS, COLUMNS = 1024, 512  # of the matrix that is rounded
FEW = 3  # rows of a step of answers
MERGED, RANK = 1 << 23, 16  # weights that are merged into at a time: no cache holds them
READ = 100_000  # characters of a text
WORDS = 64  # the vocabulary of the layer that is tried


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The fields of `planning.Machine`."""
    process = resident_bytes(os.getpid())
    settle(job.seed)
    folder = Path(job.model)
    words = tokenizer(folder)
    found = {
        "process": process,
        "opening": taken(lambda: skeleton(folder, compute_dtype())),
        "calibration_text": reading(words, job.calibration, False),
        "evaluation_text": reading(words, job.evaluate, True),
    }
    if job.options["tune"]:
        found |= learning(folder, job)
    if job.options["format"] == "onnx":
        found |= tracing(folder) | in_onnx(folder, job)
    with torch.inference_mode():
        width = int(configured(folder).hidden_size)
        if zeros := job.options["zeros"]:
            found["zero"] = zeroed(zeros, width)
        if job.options["merges"]:
            found["merging"] = merged(width)
        return found | layer(folder, job.calibration.tokens) | matrices(folder)


def reading(words: Any, part: Text | Evaluate, held_out: bool) -> float:
    """Seconds in which a recipe's text becomes tokens, by its first documents."""
    start = time.thread_time()
    try:
        documents = text.documents(part, held_out)
        drawn = text.enough(documents, part.samples * part.tokens, 0)
        sizes = list(accumulate(len(str(document)) for document in drawn))
        few = next((at for at, size in enumerate(sizes, 1) if size >= READ), len(sizes))
        begun = time.thread_time()
        for document in drawn[:few]:
            text.tokens_of(words, document if isinstance(document, list) else document[:READ])
    except OptimizeError:  # the step says what is wrong with it
        return time.thread_time() - start
    read = sum(min(READ, len(str(document))) for document in drawn[:few])
    return begun - start + (time.thread_time() - begun) * sizes[-1] / read


def layer(folder: Path, tokens: int) -> dict[str, Any]:
    """Seconds that a layer takes for each token of a window, and for each row of an answer's next token. A family of
    which no layer runs alone goes by its matrices, with a note that says why."""
    config = configured(folder)
    width = int(config.hidden_size)
    try:
        model: Any = one_layer(folder)
        begun = entered(model, torch.zeros(1, tokens, dtype=torch.long), 1)
        asked = entered(model, torch.zeros(FEW, 1, dtype=torch.long), FEW)
        first = list(layers(model))
        read = taken(lambda: through(first, begun)) / tokens
        with threads(for_few_rows(model)):
            return {"layer": read, "answering": taken(lambda: through(first, asked))}
    except Exception as error:  # of any kind: the code of the family raises it
        base = Checkpoint(folder)
        weight = filled(ROWS, width)
        share = base.parameters / int(base.config.get("num_hidden_layers") or 1) / weight.numel()
        window, few = filled(tokens, width), filled(FEW, width)
        return {
            "layer": taken(lambda: linear(window, weight)) * share / tokens,
            "answering": taken(lambda: linear(few, weight)) * share,
            "note": f"times are those of the model's matrices: no layer of it runs alone ({sentence(error)})",
        }


def learning(folder: Path, job: Job) -> dict[str, Any]:
    """Seconds that a layer takes there and back, for each token and for each step of the optimizer, in the step `tune`
    whose options the job has; or a note that says why not."""
    from optimize.steps.tune.encoding import Tokens
    from optimize.steps.tune.learner import Learner, Start
    from optimize.steps.tune.packing import row
    from optimize.steps.tune.settings import ROW, settled

    options = job.options["tune"]
    kind = {name: options[name] for name in ("targets", "rslora", "dora", "dtype")}
    start = Start(base=folder, parent=None, seed=job.seed, device="cpu", **kind)
    parent = adapter_config(Path(job.adapters[options["adapter"]])) if options["adapter"] else None
    try:
        learner = Learner(start, settled(options, Checkpoint(folder).config, parent, 1, 1), model=one_layer(folder))
        optimizer = torch.optim.AdamW(learner.parameters, weight_decay=0.0)

        def step(count: int) -> None:
            tokens = Tokens(array("i", [1] * count), array("b", [0] * (count - 1) + [1]))
            learner.logps(row([(tokens,)], [0]))[0].sum().backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        few, many = taken(lambda: step(FEW)), taken(lambda: step(ROW))
    except Exception as error:
        return {"note": f"training is planned by a forward pass: no layer learns alone ({sentence(error)})"}
    each = max(0.0, many - few) / (ROW - FEW)
    return {"learning": each, "updating": max(0.0, few - FEW * each)}


@torch.no_grad()
def tracing(folder: Path) -> dict[str, Any]:
    """Seconds in which torch makes a graph of a layer, or a note that says why not."""
    inputs = {"input_ids": torch.zeros(1, FEW, dtype=torch.long), "use_cache": False}
    try:
        model = one_layer(folder).float()
        return {"tracing": taken(lambda: torch.export.export(model, (), inputs, strict=False))}
    except Exception as error:
        return {"note": f"the graph is planned by another machine's time: no layer is traced alone ({sentence(error)})"}


def in_onnx(folder: Path, job: Job) -> dict[str, Any]:
    """Seconds in which a weight is rounded for ONNX Runtime, and in which it opens one, and multiplies with one over a
    window and for one token."""
    from onnxruntime import InferenceSession

    from optimize.export import blocks
    from optimize.export.onnx import BITS

    weight = torch.full((4 * ROWS, int(configured(folder).hidden_size)), 0.01)
    bits, count = BITS.get(job.options["precision"], 0), weight.numel()
    graph = blocks.product(weight, bits)
    session = InferenceSession(graph, providers=["CPUExecutionProvider"])
    window = torch.ones(job.evaluate.tokens, weight.shape[1]).numpy()
    return {
        "onnx_rounding": taken(lambda: blocks.product(weight, bits)) / count,
        "onnx_opening": taken(lambda: InferenceSession(graph, providers=["CPUExecutionProvider"])) / count,
        "onnx_reading": taken(lambda: session.run(None, {"x": window})) / count / len(window),
        "onnx_answering": taken(lambda: session.run(None, {"x": window[:1]})) / count,
    }


def one_layer(folder: Path) -> nn.Module:
    """The model with its first layer alone and hardly any words; its numbers are all the same."""
    config = configured(folder)
    config.num_hidden_layers = 1
    config.vocab_size, config.pad_token_id = WORDS, None
    if vars(config).get("layer_types"):  # else it follows from the number of layers
        config.layer_types = config.layer_types[:1]
    model = skeleton_of(config, compute_dtype()).eval()
    weights = {name: filled(*parameter.shape) for name, parameter in model.named_parameters()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def matrices(folder: Path) -> dict[str, float]:
    """Seconds of products, for each multiplication, and of rounding, for each weight."""
    checkpoint = Checkpoint(folder)
    dtype, width = compute_dtype(), int(configured(folder).hidden_size)
    rows, weight = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    head = filled(8 * ROWS, width)
    hessian = rows.T @ rows
    size = group(checkpoint, 0)
    columns = COLUMNS // size * size
    scales = gptq.scales(weight[:, :columns], 4, size)
    with products_of(dtype):
        given = rows.to(dtype).float()
        products = taken(lambda: torch.zeros(COLUMNS, COLUMNS).addmm_(given.T, given))
    square = torch.randn(ROWS, ROWS)
    wide = torch.randn(16, 16 * ROWS)
    return {
        "head": taken(lambda: linear(filled(256, width), head)) / 256 / head.numel(),
        "reading": taken(lambda: linear(filled(FEW, width), head)) / head.numel(),
        "product": products / ROWS / COLUMNS**2,
        "product32": taken(lambda: square @ square) / ROWS**3,
        "scale": taken(lambda: gptq.scales(weight[:, :columns], 4, size)) / ROWS / columns,
        "round": taken(
            lambda: gptq.gptq(weight[:, :columns], gptq.damped(hessian[:columns, :columns].clone(), ROWS), scales, 4)
        )
        / ROWS
        / columns,
        "number": taken(lambda: log_softmax(wide, -1)) / wide.numel(),
        "rounded_input": taken(lambda: round_activations(head[:ROWS])) / ROWS / width,
    }


def zeroed(options: dict[str, Any], width: int) -> float:
    """Seconds in which a step `prune` with these options makes zeros, for each weight of a matrix of `width` rows."""
    rows, weight = torch.randn(ROWS, COLUMNS), torch.randn(width, COLUMNS)
    how = options["method"], options["sparsity"], pattern_of(options["pattern"])
    return taken(lambda: sparse.sparse(weight, *how, rows.T @ rows)) / weight.numel()


def merged(width: int) -> float:
    """Seconds in which an adapter is merged and compared with PEFT's merge of it, for each weight."""
    weight = torch.full((MERGED // width, width), 0.01, dtype=torch.bfloat16)
    up, down = torch.full((len(weight), RANK), 0.01), torch.full((RANK, width), 0.01)

    def both() -> None:
        ours = (weight.float() + 1.0 * (up @ down)).to(weight.dtype)
        assert ours.isfinite().all()
        off_in_places(ours, weight.float().add_((up @ down) * 1.0))

    return taken(both) / weight.numel()


def filled(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.01, dtype=compute_dtype())


def taken(work: Callable[[], Any], again: int = AGAIN) -> float:
    """The least of its seconds."""
    seconds = []
    for _ in range(again):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return min(seconds)
