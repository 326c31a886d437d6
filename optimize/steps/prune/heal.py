"""A pruned model learns from the one that it was: first by least squares, then by KL divergence of its answers.

The least squares are in repair.py. What is left is learned through a LoRA on the layers from the first change on, which
is then merged. The layers before are the same in both models: they run once, and nothing is learned in them. Only
hidden states pass through autograd; the output layer's gradient is written out, a block of tokens at a time, since
logits in fp32 for a whole batch cost more memory traffic than the layers do.

A checkpoint every few steps holds the LoRA, the optimizer and the losses, and the text's order follows from the seed,
so that a killed run goes on as if it had not been killed.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from optimize.checkpoint.checkpoint import Checkpoint, Writer
from optimize.checkpoint.model import entered, layers, opened, prefix, settle, through, tokenizer
from optimize.data import text
from optimize.errors import OptimizeError
from optimize.job import Job, Progress
from optimize.steps.merge.merge import merged_into, read
from optimize.steps.prune import repair

SAVE_EVERY = 10
HELD = 16  # windows of evaluation text, to say what was lost and what came back
BLOCK = 128  # tokens whose logits are held at a time


def run(job: Job, progress: Progress) -> dict[str, Any]:
    settle(job.seed)
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
    start, told = Path(job.model), partial / "repair.json"
    if options["repair"]:
        start = partial / "repaired"
        if not told.is_file():
            told_now = _repaired(job, pool, teacher, pairs, first, start, progress)
            told_now["left"] = round(_loss(opened(start), measured) - original, 5)
            told.with_suffix(".part").write_text(json.dumps(told_now))
            told.with_suffix(".part").rename(told)
        notes["repair"] = json.loads(told.read_text())
    if options["steps"]:
        lora = partial / "lora"
        notes["losses"] = _trained(job, pool, teacher, start, pairs, first, lora, progress)
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
    student = opened(Path(job.model))
    rows = min(len(pool), max(4, job.calibration.samples * job.calibration.tokens // job.options["tokens"]))
    batch = max(1, min(1024 // job.options["tokens"], rows // 8))
    begin = entered(teacher, torch.tensor(pool[-rows:]), batch)
    lacked = repair.repaired(list(layers(student)), list(layers(teacher)), pairs, first, begin, progress)
    checkpoint = Checkpoint(Path(job.model))
    shutil.rmtree(out, ignore_errors=True)
    writer = Writer(out, Path(job.model))
    state = dict(student.named_parameters())
    for name in checkpoint.entries:
        value = checkpoint.tensor(name)
        writer.add(name, state[name].to(value.dtype) if "down_proj" in name else value)
    writer.close(checkpoint.config)
    return {"first_layer": first, "tokens": rows * job.options["tokens"], "lacked": lacked}


def _trained(
    job: Job, pool: list[list[int]], teacher: Any, start: Path, pairs: list[int], first: int, out: Path,
    progress: Progress,
) -> list[float]:  # fmt: skip
    """The losses of every step; the LoRA is in `out`."""
    from peft import LoraConfig, get_peft_model
    from peft.helpers import disable_input_dtype_casting
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    options, saved = job.options, job.folder / "partial" / "state.pt"
    student = opened(start)
    leaves = {name.rpartition(".")[2] for name, part in layers(student).named_modules() if isinstance(part, nn.Linear)}
    config = LoraConfig(
        r=options["rank"], lora_alpha=2 * options["rank"], task_type="CAUSAL_LM", target_modules=sorted(leaves),
        layers_to_transform=list(range(first, len(layers(student)))),
    )  # fmt: skip
    torch.manual_seed(job.seed)
    model = get_peft_model(student, config, autocast_adapter_dtype=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options["learning_rate"], weight_decay=0.0)
    begun, losses = 0, []
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        set_peft_model_state_dict(model, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        begun, losses = state["step"], state["losses"]
    model.train()
    total = options["steps"]
    ours, theirs = list(layers(student)), list(layers(teacher))
    norm = student.get_submodule(prefix(student).rpartition(".")[0]).norm
    right = teacher.get_submodule(prefix(teacher).rpartition(".")[0]).norm
    half = next(iter(teacher.parameters())).dtype is torch.bfloat16
    for step in range(begun, total):
        for group in optimizer.param_groups:
            group["lr"] = options["learning_rate"] * _schedule(step, total)
        batch = torch.tensor(_batch(pool, step, options["batch"], job.seed))
        with torch.no_grad():
            common = through(theirs[: pairs[first]], entered(teacher, batch, len(batch)))
            (wanted,) = through(theirs[pairs[first] :], common).states
            wanted = right(wanted)
        with disable_input_dtype_casting(model), torch.autocast("cpu", torch.bfloat16, enabled=half):
            (said,) = through(ours[first:], common).states
            said = norm(said)
        loss, gradient = distance(teacher.get_output_embeddings().weight, said.detach(), wanted)
        if not math.isfinite(loss):
            raise OptimizeError(
                f"healing diverged at step {step}: take a smaller learning_rate than {options['learning_rate']}"
            )
        said.backward(gradient)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss, 5))
        progress(step + 1, total, f"step {step + 1} of {total}, loss {losses[-1]:.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            state = {
                "lora": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict(), "step": step + 1,
                "losses": losses,
            }  # fmt: skip
            torch.save(state, saved.with_suffix(".part"))
            saved.with_suffix(".part").rename(saved)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    return losses


@torch.no_grad()
def distance(head: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean KL(theirs || ours) in nats of the answers that hidden states (rows, tokens, hidden) give through the output
    layer's weight (vocabulary, hidden), and its gradient by `ours`: (softmax(ours) - softmax(theirs)) head / tokens."""
    flat, right = ours.flatten(0, -2), theirs.flatten(0, -2)
    total, parts = 0.0, []
    for mine, wanted in zip(flat.split(BLOCK), right.split(BLOCK), strict=True):
        a, b = (mine @ head.T).float(), (wanted @ head.T).float()
        a -= a.logsumexp(-1, keepdim=True)
        b -= b.logsumexp(-1, keepdim=True)
        odds = b.exp()
        total += float(torch.sub(b, a).mul_(odds).sum())
        parts.append(a.exp_().sub_(odds).to(head.dtype) @ head)
    return total / len(flat), (torch.cat(parts).float() / len(flat)).view(ours.shape).to(ours.dtype)


def _schedule(step: int, total: int) -> float:
    """A short warm-up, then a half cosine down to a twentieth."""
    warm = max(1, total // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _batch(pool: list[list[int]], step: int, size: int, seed: int) -> list[list[int]]:
    """The rows of a step: the pool in a new order each time through."""
    rows = []
    for at in range(step * size, (step + 1) * size):
        epoch, place = divmod(at, len(pool))
        order = random.Random(f"{seed}/{epoch}").sample(range(len(pool)), len(pool))
        rows.append(pool[order[place]])
    return rows


def _all_windows(words: Any, texts: list[Any], tokens: int, seed: int, samples: int) -> list[list[int]]:
    """Every window that the text gives, or `samples` of them, in an order that the seed decides."""
    ids = [text.tokens_of(words, one) for one in texts]
    whole = [one[at : at + tokens] for one in ids for at in range(0, len(one) - tokens + 1, tokens)]
    if len(whole) < HELD:
        raise OptimizeError(f"the text gives {len(whole)} windows of {tokens} tokens; healing needs at least {HELD}")
    random.Random(seed).shuffle(whole)
    return whole[:samples] if samples else whole


@torch.inference_mode()
def _loss(model: Any, ids: torch.Tensor) -> float:
    total = 0.0
    for row in ids.split(1):
        said = log_softmax(model(input_ids=row, use_cache=False).logits.float()[:, :-1], -1)
        total -= float(said.gather(-1, row[:, 1:, None]).mean())
    return total / len(ids)
