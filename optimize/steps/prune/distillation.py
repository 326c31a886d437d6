"""The pruned model learns the original's answers through a LoRA on its layers from the first changed one on.

The layers before are the same in both models: they run once, and nothing is learned in them. Only hidden states pass
through autograd; the output layer's gradient is written out, a block of tokens at a time, since logits in fp32 for a
whole batch cost more memory traffic than the layers do.

A checkpoint every few steps holds the LoRA, the optimizer and the losses, and the text's order follows from the seed,
so that a killed run goes on as if it had not been killed.
"""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimize.checkpoint import artifact
from optimize.checkpoint.model import answered, entered, layers, opened, prefix, through
from optimize.errors import OptimizeError
from optimize.job import Job, Progress

SAVE_EVERY = 10
BLOCK = 128  # tokens whose logits are held at a time


def distilled(
    job: Job, pool: list[list[int]], teacher: Any, start: Path, pairs: list[int], first: int, progress: Progress
) -> tuple[Path, list[float]]:
    """The LoRA over the model in `start`, and the losses of every step. `pairs` are the original's layers that the
    pruned model's are, and `first` is the first of those that learns."""
    partial, total = job.folder / "partial", job.options["steps"]
    distillation = Distillation(job, teacher, start, pairs, first)
    state = partial / "state.pt"
    if state.is_file():
        distillation.load(state)
    for step in range(len(distillation.losses), total):
        batch = torch.tensor(_batch(pool, step, job.options["batch"], job.seed))
        loss = distillation.learn(batch, step)
        progress(step + 1, total, f"step {step + 1} of {total}, loss {loss:.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            distillation.save(state)
    lora = partial / "lora"
    shutil.rmtree(lora, ignore_errors=True)
    distillation.model.save_pretrained(lora)
    return lora, distillation.losses


class Distillation:
    """A student with its LoRA and optimizer, the teacher, and the losses so far."""

    def __init__(self, job: Job, teacher: Any, start: Path, pairs: list[int], first: int) -> None:
        from peft import LoraConfig, get_peft_model

        self.options = job.options
        self.teacher = teacher
        self.losses: list[float] = []
        self._shared = pairs[first]
        self._first = first
        self._pairs = pairs
        student: Any = opened(start)
        linears = [name for name, part in layers(student).named_modules() if isinstance(part, nn.Linear)]
        config = LoraConfig(
            r=self.options["rank"], lora_alpha=2 * self.options["rank"], task_type="CAUSAL_LM",
            target_modules=sorted({name.rpartition(".")[2] for name in linears}),
            layers_to_transform=list(range(first, len(layers(student)))),
        )  # fmt: skip
        torch.manual_seed(job.seed)
        self.model = get_peft_model(student, config, autocast_adapter_dtype=True)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=self.options["learning_rate"], weight_decay=0.0)
        self._ours, self._theirs = list(layers(student)), list(layers(teacher))
        self._norm, self._teacher_norm = _norm(student), _norm(teacher)
        self._head = Head.of(teacher)
        self._half = next(iter(teacher.parameters())).dtype is torch.bfloat16
        self.model.train()

    def learn(self, batch: torch.Tensor, step: int) -> float:
        """One step; its loss, in nats a token."""
        from peft.helpers import disable_input_dtype_casting

        for group in self._optimizer.param_groups:
            group["lr"] = self.options["learning_rate"] * _schedule(step, self.options["steps"])
        with torch.no_grad():
            common = through(self._theirs[: self._shared], entered(self.teacher, batch, len(batch)))
            (theirs,) = through(self._theirs[self._shared :], common).states
            theirs = self._teacher_norm(theirs)
        with (
            disable_input_dtype_casting(self.model),
            torch.autocast(batch.device.type, torch.bfloat16, enabled=self._half),
        ):
            lent = common.lent(self._ours, [self._theirs[at] for at in self._pairs])
            (ours,) = through(self._ours[self._first :], lent).states
            ours = self._norm(ours)
        loss, gradient = distance(self._head, ours.detach(), theirs)
        if not math.isfinite(loss):
            rate = self.options["learning_rate"]
            raise OptimizeError(f"healing diverged at step {step}: take a smaller learning_rate than {rate}")
        ours.backward(gradient)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(round(loss, 5))
        return loss

    def save(self, file: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        state = {
            "lora": get_peft_model_state_dict(self.model), "optimizer": self._optimizer.state_dict(),
            "step": len(self.losses), "losses": self.losses,
        }  # fmt: skip
        with artifact.replaced(file) as out:
            torch.save(state, out)

    def load(self, file: Path) -> None:
        from peft.utils import set_peft_model_state_dict

        state = torch.load(file, weights_only=True)
        set_peft_model_state_dict(self.model, state["lora"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"]


def _norm(model: Any) -> Any:
    """The norm after the last layer."""
    return model.get_submodule(prefix(model).rpartition(".")[0]).norm


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer: its weight (vocabulary, hidden), what logits are multiplied with, and their soft cap."""

    weight: torch.Tensor
    scale: float = 1.0
    cap: float = 0.0

    @staticmethod
    @torch.no_grad()
    def of(model: Any) -> Head:
        """The model's, held against what its own forward answers."""
        config = model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        head = Head(model.get_output_embeddings().weight, scale, cap)
        dice = torch.Generator("cpu").manual_seed(0)
        state = torch.randn(1, 4, head.weight.shape[1], generator=dice, device="cpu").to(head.weight)
        ours, own = head.logits(_norm(model)(state)), answered(model, state).float()
        if not torch.allclose(ours, own, rtol=0.02, atol=0.02 * float(own.abs().max())):
            raise OptimizeError(f"healing does not know how models of type {config.model_type!r} make logits")
        return head

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        made = (states @ self.weight.T).float() * self.scale
        return self.cap * (made / self.cap).tanh() if self.cap else made


@torch.no_grad()
def distance(head: Head, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean KL(theirs || ours) in nats of the answers that hidden states (rows, tokens, hidden) give through the output
    layer, and its gradient by `ours`: (softmax(ours) - softmax(theirs)) head / tokens, through scale and soft cap."""
    flat, right = ours.flatten(0, -2), theirs.flatten(0, -2)
    total, parts = 0.0, []
    for mine, other in zip(flat.split(BLOCK), right.split(BLOCK), strict=True):
        a, b = head.logits(mine), head.logits(other)
        slope: torch.Tensor | float = head.scale
        if head.cap:
            slope = head.scale * (1 - (a / head.cap).square())
        a -= a.logsumexp(-1, keepdim=True)
        b -= b.logsumexp(-1, keepdim=True)
        odds = b.exp()
        total += float(torch.sub(b, a).mul_(odds).sum())
        parts.append(a.exp_().sub_(odds).mul_(slope).to(head.weight.dtype) @ head.weight)
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
