"""A pruned model learns from the one that it was: KL divergence of its answers on calibration text, through a LoRA.

The LoRA is then merged. A checkpoint every few steps holds the LoRA, the optimizer and the losses, and the text's order
follows from the seed, so that a killed run goes on as if it had not been killed.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax

from optimize import text
from optimize.errors import OptimizeError
from optimize.merge import merged_into, read
from optimize.model import opened, settle, tokenizer
from optimize.worker import Job, Progress

SAVE_EVERY = 20
HELD = 12  # windows of calibration text that are not trained on, to say what was lost and what came back


def run(job: Job, progress: Progress) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    settle(job.seed)
    options = job.options
    words = tokenizer(Path(job.model))
    texts = text.documents(job.calibration, False)
    windows = _all_windows(words, texts, options["tokens"], job.seed, options["samples"])
    held = torch.tensor(windows[:HELD])
    pool = windows[HELD:]
    teacher = opened(Path(job.reference))
    student = opened(Path(job.model))
    lost = _loss(student, held) - _loss(teacher, held)
    alpha = 2 * options["rank"]
    config = LoraConfig(
        r=options["rank"], lora_alpha=alpha, task_type="CAUSAL_LM", target_modules="all-linear", use_rslora=False
    )
    torch.manual_seed(job.seed)
    model = get_peft_model(student, config, autocast_adapter_dtype=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options["learning_rate"], weight_decay=0.0)
    total = options["steps"]
    partial = job.folder / "partial"
    partial.mkdir(exist_ok=True)
    begun, losses = 0, []
    saved = partial / "state.pt"
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        set_peft_model_state_dict(model, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        begun, losses = state["step"], state["losses"]
    model.train()
    for step in range(begun, total):
        for group in optimizer.param_groups:
            group["lr"] = options["learning_rate"] * _schedule(step, total)
        batch = torch.tensor(_batch(pool, step, options["batch"], job.seed))
        with torch.no_grad():
            wanted = log_softmax(teacher(input_ids=batch, use_cache=False).logits.float(), -1)
        said = log_softmax(model(input_ids=batch, use_cache=False).logits.float(), -1)
        loss = (wanted.exp() * (wanted - said)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(loss), 5))
        if not math.isfinite(losses[-1]):
            raise OptimizeError(
                f"healing diverged at step {step}: take a smaller learning_rate than {options['learning_rate']}"
            )
        progress(step + 1, total, f"step {step + 1} of {total}, loss {losses[-1]:.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            state = {
                "lora": get_peft_model_state_dict(model),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "losses": losses,
            }
            torch.save(state, saved.with_suffix(".part"))
            saved.with_suffix(".part").rename(saved)
    folder = partial / "lora"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    merged_into(Path(job.model), [read("healing", folder)], job.folder / "model", Progress(lambda _: None))
    left = _loss(opened(job.folder / "model"), held) - _loss(teacher, held)
    return {
        "losses": losses[:: max(1, len(losses) // 50)],
        "lost": round(lost, 5),
        "left": round(left, 5),
        "scores": {"healed": round(1 - left / lost, 4) if lost > 0 else 1.0},
        "trained_tokens": total * options["batch"] * options["tokens"],
    }


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
    ids = [text._tokens(words, one) for one in texts]
    whole = [one[at : at + tokens] for one in ids for at in range(0, len(one) - tokens + 1, tokens)]
    if len(whole) < 2 * HELD:
        raise OptimizeError(
            f"the calibration text gives {len(whole)} windows of {tokens} tokens; healing needs at least {2 * HELD}"
        )
    random.Random(seed).shuffle(whole)
    return whole[: samples + HELD] if samples else whole


@torch.inference_mode()
def _loss(model: Any, ids: torch.Tensor) -> float:
    total = 0.0
    for row in ids.split(1):
        said = log_softmax(model(input_ids=row, use_cache=False).logits.float()[:, :-1], -1)
        total -= float(said.gather(-1, row[:, 1:, None]).mean())
    return total / len(ids)
