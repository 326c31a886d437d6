"""The loop: steps, held-out loss, checkpoints, an early end; killed at any moment it goes on as if it had not been.

Which examples a step sees follows from the seed, nothing is drawn at random beside it, and a checkpoint holds the LoRA,
the optimizer, and what the loop counts. So on one number of threads the bytes are those of an undisturbed run.
"""

from __future__ import annotations

import math
import random
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from optimize.checkpoint import artifact
from optimize.errors import OptimizeError, Stopped
from optimize.steps.tune.encoding import Unit
from optimize.steps.tune.learner import Learner
from optimize.steps.tune.objectives import Objective
from optimize.steps.tune.packing import Row, rows
from optimize.steps.tune.settings import Settings, evaluated_every

SAVE_SECONDS = 15.0
RECENT = 32  # steps whose durations say how long the others will take

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Examples:
    """Units with what is minimized over them; sequences share rows of up to `row_tokens`, or have rows of their own."""

    units: Sequence[Unit]
    objective: Objective
    row_tokens: int

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        return list(rows(self.units, numbers, self.row_tokens))

    def tokens(self, numbers: Sequence[int]) -> int:
        return sum(len(tokens.ids) for number in numbers for tokens in self.units[number])


@dataclass(slots=True)
class Course:
    """How far a training is; all of it is in a checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    worse: int = 0  # evaluations since the best

    @property
    def best_loss(self) -> float:
        """The least held-out loss after a step; that of the beginning is no adapter's."""
        return min((loss for step, loss in self.valid if step), default=math.inf)


Told = Callable[[dict[str, Any]], None]


class Training:
    """One training; `tell` hears of every step, `publish` gets the adapter at the end of each epoch."""

    def __init__(
        self,
        learner: Learner,
        settings: Settings,
        train: Examples,
        valid: Examples | None,
        seed: int,
        patience: int,
        tell: Told,
        publish: Callable[[int, State], str | None],
    ) -> None:
        self.course = Course()
        self._learner = learner
        self._settings = settings
        self._train = train
        self._valid = valid
        self._seed = seed
        self._patience = patience
        self._tell = tell
        self._publish = publish
        self._optimizer = torch.optim.AdamW(learner.groups(settings.loraplus_ratio), weight_decay=0.0)
        self._best: State | None = None
        self.epoch_steps = math.ceil(len(train.units) / settings.batch)
        self.steps = self.epoch_steps * settings.epochs
        self._evaluate_every = evaluated_every(self.epoch_steps, self.steps)
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._stopped = False

    def run(self, file: Path) -> State:
        """The adapter's weights: the last, or those of the least held-out loss. `file` is the checkpoint; Stopped after
        SIGTERM."""
        if file.is_file():
            self._load(file)
        before = signal.signal(signal.SIGTERM, self._stop)
        try:
            if self._valid is not None and not self.course.valid:
                self._evaluate()
            self._loop(file)
        finally:
            signal.signal(signal.SIGTERM, before)
        return self._best if self._best is not None else self._learner.state()

    def _loop(self, file: Path) -> None:
        saved = time.monotonic()
        while self.course.step < self.steps and not self.ended_early:
            began = time.monotonic()
            line = self._learn()
            evaluated = self._valid is not None and self._due(self._evaluate_every)
            if evaluated:
                line["valid_loss"], line["valid_accuracy"] = self._evaluate()
            self._durations.append(time.monotonic() - began)
            self.course.seconds += self._durations[-1]
            line |= {"tokens": self.course.tokens, "seconds": round(self.course.seconds, 1)}
            line["seconds_left"] = self._seconds_left()
            line["ended"] = self.ended_early or self.course.step == self.steps
            epoch_over = self._due(self.epoch_steps)
            stopped = self._stopped  # a signal that comes later is for the next step, which is saved then
            if evaluated or epoch_over or stopped or time.monotonic() - saved > SAVE_SECONDS:
                if epoch_over:
                    line["checkpoint"] = self._publish(self.course.step, self._learner.state())
                self._save(file)
                saved = time.monotonic()
            self._tell(line)
            if stopped and self.course.step < self.steps:
                raise Stopped(f"stopped after step {self.course.step} of {self.steps}; start again to go on from there")

    @property
    def ended_early(self) -> bool:
        return bool(self._patience) and self.course.worse >= self._patience

    def _due(self, every: int) -> bool:
        return self.course.step % every == 0 or self.course.step == self.steps

    def _learn(self) -> dict[str, Any]:
        """One optimizer's step."""
        numbers = self._batch(self.course.step)
        rate = self._settings.learning_rate * _schedule(self.course.step, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("ratio", 1.0)
        weight = self._train.objective.weight(self._train.units, numbers)
        loss, hits = 0.0, 0
        for row in self._train.rows(numbers):
            total, right = self._train.objective.total(*self._learner.logps(row), row)
            (total / weight).backward()
            loss, hits = loss + float(total.detach()), hits + right
        loss /= weight
        self._check_finite(loss, self.course.step + 1)
        torch.nn.utils.clip_grad_norm_(self._learner.parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.course.step += 1
        self.course.tokens += self._train.tokens(numbers)
        self.course.losses.append(round(loss, 5))
        return {
            "step": self.course.step, "steps": self.steps, "epoch": round(self.course.step / self.epoch_steps, 4),
            "train_loss": round(loss, 5), "train_accuracy": round(hits / weight, 5),
            "valid_loss": None, "valid_accuracy": None, "learning_rate": float(f"{rate:.4g}"), "checkpoint": None,
        }  # fmt: skip

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise OptimizeError(
                f"training diverged at step {step}: take a smaller learning_rate than {self._settings.learning_rate:g}"
            )

    def _batch(self, step: int) -> list[int]:
        """The examples of a step: all of them in a new order each epoch."""
        epoch, place = divmod(step, self.epoch_steps)
        order = random.Random(f"{self._seed}/{epoch}").sample(range(len(self._train.units)), len(self._train.units))
        size = self._settings.batch
        return order[place * size : (place + 1) * size]

    def _evaluate(self) -> tuple[float, float]:
        """The held-out loss and accuracy; the adapter is kept when no earlier one was better."""
        assert self._valid is not None
        everything = range(len(self._valid.units))
        weight = self._valid.objective.weight(self._valid.units, everything)
        loss = 0.0
        hits = 0
        with torch.no_grad():
            for row in self._valid.rows(everything):
                total, right = self._valid.objective.total(*self._learner.logps(row), row)
                loss, hits = loss + float(total), hits + right
        self._check_finite(loss, self.course.step)
        loss = round(loss / weight, 5)
        if self.course.step and loss < self.course.best_loss:
            self._best = self._learner.state()
            self.course.best_step = self.course.step
            self.course.worse = 0
        elif self.course.step:
            self.course.worse += 1
        self.course.valid.append((self.course.step, loss))
        return loss, round(hits / weight, 5)

    def _seconds_left(self) -> float:
        # The median: a step in which the process was suspended says nothing of the others.
        return round(statistics.median(self._durations) * (self.steps - self.course.step), 1)

    def _save(self, file: Path) -> None:
        state = {
            "lora": self._learner.state(), "optimizer": self._optimizer.state_dict(), "course": asdict(self.course),
            "best": self._best,
        }  # fmt: skip
        with artifact.replaced(file) as out:
            torch.save(state, out)

    def _load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        self._learner.load(state["lora"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.course, self._best = Course(**state["course"]), state["best"]

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._stopped = True


def _schedule(step: int, total: int) -> float:
    """A short warm-up, then a half cosine down to a twentieth."""
    warm = max(1, total // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
