"""A pruned model learns from the one that it was: first by least squares, then by KL divergence of its answers.

The least squares are in repair.py. What is left is learned through a LoRA, in distillation.py, which is then merged.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from optimize.checkpoint import artifact
from optimize.checkpoint.checkpoint import Checkpoint, Writer
from optimize.checkpoint.model import entered, layers, opened, prefix, settle, tokenizer
from optimize.data import text
from optimize.job import Job, Progress
from optimize.steps.merge.merge import merged_into, read
from optimize.steps.prune import repair
from optimize.steps.prune.distillation import distilled
from optimize.steps.prune.heal_rules import HELD


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed, job.device)
    options = job.options
    words = tokenizer(Path(job.model))
    pool = _all_windows(words, text.documents(job.calibration, False), options["tokens"], job.seed, options["samples"])
    held = _all_windows(words, text.documents(job.evaluate, True), options["tokens"], job.seed, HELD)
    measured = torch.tensor(held[:HELD])
    partial = job.folder / "partial"
    partial.mkdir(exist_ok=True)
    teacher = opened(Path(job.reference))
    original = _loss(teacher, measured)
    lost = _loss(opened(Path(job.model)), measured) - original
    pruned, whole = Checkpoint(Path(job.model)), Checkpoint(Path(job.reference))
    pairs = repair.origins(pruned, whole, prefix(teacher))
    first = repair.first_changed(pairs, pruned.config["intermediate_size"] != whole.config["intermediate_size"])
    notes: dict[str, Any] = {"lost": round(lost, 5)}
    start = Path(job.model)
    if options["repair"]:
        start, repaired = partial / "repaired", partial / "repair.json"
        if not repaired.is_file():
            repair_notes = _repaired(job, pool, teacher, pairs, first, start, progress)
            repair_notes["left"] = round(_loss(opened(start), measured) - original, 5)
            artifact.write_json(repaired, repair_notes)
        notes["repair"] = json.loads(repaired.read_text())
    if options["steps"]:
        lora, notes["losses"] = distilled(job, pool, teacher, start, pairs, first, progress)
        merged_into(start, [read("healing", lora)], job.folder / "model", Progress(lambda _: None))
    else:
        shutil.copytree(start, job.folder / "model")
    left = _loss(opened(job.folder / "model"), measured) - original
    return {
        **notes,
        "left": round(left, 5),
        "scores": {"healed": round(1 - left / lost, 4) if lost > 0 else 1.0},
        "trained_tokens": options["steps"] * options["batch"] * options["tokens"],
    }


def _repaired(
    job: Job, pool: list[list[int]], teacher: nn.Module, pairs: list[int], first: int, out: Path, progress: Progress
) -> dict[str, Any]:
    """The pruned checkpoint after the least squares, in `out`."""
    student: Any = opened(Path(job.model))
    rows = min(len(pool), max(4, job.calibration.samples * job.calibration.tokens // job.options["tokens"]))
    batch = max(1, min(1024 // job.options["tokens"], rows // 8))
    begin = entered(teacher, torch.tensor(pool[-rows:]), batch)
    multiplier = float(getattr(student.config, "residual_multiplier", 1.0))
    both = list(layers(student)), list(layers(teacher))
    lacked = repair.repaired(*both, pairs, first, begin, progress, multiplier)
    checkpoint = Checkpoint(Path(job.model))
    shutil.rmtree(out, ignore_errors=True)
    writer = Writer(out, Path(job.model))
    state = dict(student.named_parameters())
    for name in checkpoint.entries:
        value = checkpoint.tensor(name)
        writer.add(name, state[name].to(value.dtype) if "down_proj" in name else value)
    writer.close(checkpoint.config)
    return {"first_layer": first, "tokens": rows * job.options["tokens"], "lacked": lacked}


def _all_windows(words: Any, texts: list[Any], tokens: int, seed: int, samples: int) -> list[list[int]]:
    """Every window that the text gives, or `samples` of them, in an order that the seed decides."""
    texts = list(text.enough(texts, samples * tokens, seed)) if samples else texts
    every = text.every_window(words, texts, tokens, HELD)
    random.Random(seed).shuffle(every)
    return every[:samples] if samples else every


@torch.inference_mode()
def _loss(model: Any, ids: torch.Tensor) -> float:
    total = 0.0
    for row in ids.split(1):
        now = log_softmax(model(input_ids=row, use_cache=False).logits.float()[:, :-1], -1)
        total -= float(now.gather(-1, row[:, 1:, None]).mean())
    return total / len(ids)
