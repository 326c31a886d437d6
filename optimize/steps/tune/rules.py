"""What training an adapter needs, and which data, adapters and targets are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.checkpoint import architectures
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.data.examples import FEWEST, Found, checked
from optimize.errors import RecipeError, Refused
from optimize.options import Step, check_name, plain
from optimize.steps.kind import StepKind
from optimize.steps.planning import Context, Estimate, beyond_low_rank, weight_bytes
from optimize.steps.tune.settings import ROW, Settings, activations, evaluated_every, max_length, settled

TOKEN_BYTES = 4  # of JSON, roughly
TEMPLATE = 256  # tokens that a chat template adds to an example
VALIDATED = 30_000  # tokens of its own that a validation reads, roughly
REREAD = 64  # examples that it reads
ANSWERS = 0.5  # of the tokens are learned, roughly
PASSES = 5  # over the logits of a token
WRITTEN = 3e8  # bytes a second


class Tune(Step, frozen=True, kw_only=True, tag="tune"):
    """A LoRA adapter called `name`, trained on the examples in `train`: by their answers (`supervised`), by which of
    two answers is better (`dpo`), or by which answers are good (`kto`); or with a head that tells the labels of texts
    (`classify`). `adapter` is one to go on from, with its rank,
    alpha and targets. `loraplus_ratio` is how many times the learning rate the B of a LoRA take, as LoRA+ has it.

    With `validation` the adapter of the least held-out loss is kept, and `patience` evaluations without a better one
    end the training. `alpha` 0 is twice the rank; `max_length` 0 is the model's, up to 2,048 tokens; `threads` 0 is
    every core. `validate` reports what the adapter did to the base, and which examples it says again.
    """

    reads_text: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = ("train", "validation")
    train: str
    validation: str = ""
    name: str = "adapter"
    adapter: str = ""
    method: Literal["supervised", "dpo", "kto", "classify"] = "supervised"
    rank: int = 16
    alpha: float = 0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False
    loraplus_ratio: float = 1.0
    learning_rate: float | Literal["auto"] = "auto"
    learning_rate_multiplier: float = 1.0
    epochs: int | Literal["auto"] = "auto"
    batch: int | Literal["auto"] = "auto"
    max_length: int = 0
    beta: float = 0.1
    patience: int = 3
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    threads: int = 0
    validate: bool = True

    @property
    def consumed(self) -> tuple[str, ...]:
        return (self.adapter,) if self.adapter else ()

    @property
    def makes(self) -> str:
        return self.name

    @property
    def measures(self) -> tuple[str, ...]:
        return ("valid_loss",) if self.validation else ()

    def check(self, where: str) -> None:
        check_name(self.name, where)
        if not self.train:
            raise RecipeError(f"{where}: train names a .jsonl file of examples")
        if self.train == self.validation:
            raise RecipeError(f"{where}: train and validation are the same file; hold out examples of their own")
        if self.method == "classify" and self.adapter:
            raise RecipeError(f"{where}: a head is trained with a new adapter: leave `adapter` out")
        for key in ("rank", "batch", "epochs", "learning_rate", "learning_rate_multiplier", "beta"):
            value = getattr(self, key)
            if value != "auto" and not 0 < value < float("inf"):
                raise RecipeError(f"{where}: {key} is above 0, not {value:g}")
        if not 1 <= self.loraplus_ratio < float("inf"):
            raise RecipeError(f"{where}: loraplus_ratio is at least 1, not {self.loraplus_ratio:g}")
        for key in ("alpha", "max_length", "patience", "threads"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise RecipeError(f"{where}: {key} is at least 0, not {getattr(self, key):g}")
        if not self.targets:
            raise RecipeError(f"{where}: targets is all-linear, or names modules such as [q_proj, v_proj]")


def estimate(step: Tune, context: Context) -> Estimate:
    base, config = context.base, context.base.config
    found = _found(step.train, step.method)
    adapter = context.adapters.get(step.adapter)
    longest = min(max_length(plain(step), config), found.longest // TOKEN_BYTES)
    settings = settled(plain(step), config, adapter, found.examples, longest)
    what = (
        f"{step.name}: {step.method} on {found.examples} examples, rank {settings.rank}, {settings.epochs} epochs of "
    )
    what += f"{-(-found.examples // settings.batch)} steps, learning rate {settings.learning_rate:g}"
    row = max(ROW, longest)
    learned = settings.rank * sum(sum(shape) for name, shape in base.shapes.items() if _linear(name, shape))
    kept = activations(config, row) // (context.layers if settings.gradient_checkpointing else 1)
    logits = row * (len(found.labels) or context.vocabulary) * 14
    memory = context.machine.process + weight_bytes() * base.parameters + 24 * learned + kept + logits
    return Estimate("tune", what, memory, 20 * learned, _seconds(step, context, found, settings, 16 * learned))


def _seconds(step: Tune, context: Context, found: Found, settings: Settings, saved: int) -> float:
    """An optimizer's step takes its time however few tokens it has, and a state of `saved` bytes is written with each
    evaluation."""
    machine, heads = context.machine, step.method == "classify"
    size = 0 if heads else context.vocabulary * context.hidden
    tokens = found.bytes // TOKEN_BYTES * (2 if step.method == "kto" else 1)
    epoch = math.ceil(found.examples / settings.batch)
    steps = settings.epochs * epoch
    evaluations = 1 + math.ceil(steps / evaluated_every(epoch, steps)) if step.validation else 0
    logits = 0.0 if heads else machine.head * size + PASSES * machine.number * context.vocabulary
    read = context.layers_seconds + logits
    learned = (context.layers * machine.learning or 3 * context.layers_seconds) + 2 * ANSWERS * logits
    learned += context.layers_seconds if settings.gradient_checkpointing else 0.0
    seconds = steps * (context.layers * machine.updating + 2 * machine.reading * size)
    seconds += settings.epochs * tokens * learned + (evaluations + settings.epochs) * saved / WRITTEN
    held_out = _found(step.validation, step.method, 1) if step.validation else Found()
    seconds += evaluations * held_out.bytes // TOKEN_BYTES * read
    if step.method in ("dpo", "kto"):
        seconds += (tokens + held_out.bytes // TOKEN_BYTES) * read  # as they are in the beginning
    if step.validate and not heads:
        again = sum(min(1, REREAD / max(1, of.examples)) * of.bytes // TOKEN_BYTES for of in (found, held_out))
        seconds += machine.opening + (VALIDATED + 2 * again) * read
    return seconds + 2 * machine.opening


def too_long(file: Path, method: str, found: Found, folder: Path) -> Iterator[tuple[int, str]]:
    """(line, why) of examples whose answers the model in `folder` would never see; `found` is what the file holds."""
    longest = max_length({"max_length": 0}, json.loads((folder / "config.json").read_text()))
    # A token has a byte at least, and a chat template adds few: shorter files need no tokenizer, nor torch with it.
    if method != "classify" and found.longest > longest - TEMPLATE:
        from optimize.steps.tune.encoding import Encoder

        yield from Encoder(folder, longest).too_long(file, method)


def refuse(step: Tune, context: Context) -> None:
    for name in step.files:
        if file := getattr(step, name):
            found = _found(file, step.method, FEWEST if name == "train" else 1)
            if found.problem_count:
                raise Refused(f"{name} {Path(file).name}: {found.message}")
    if step.validation and (new := _labels(step.validation, step) - _labels(step.train, step)):
        raise Refused(
            f"validation {Path(step.validation).name} has the label {min(new)!r}, which no example of train has"
        )
    architectures.readable(context.base.config, context.base.shapes, "tune")
    config = context.adapters.get(step.adapter)
    if config is not None and beyond_low_rank(config):
        raise Refused(
            f"the adapter {step.adapter!r} is more than a low-rank update (DoRA or modules_to_save), from which no "
            "training goes on: merge it into the base, and train a new one"
        )
    if step.method == "classify" and not context.recipe.trains_alone:
        raise Refused(
            "a head classifies beside its base, as an adapter: say `export: {format: adapter}`, and tune alone"
        )
    if step.dora:
        _refuse_after_dora(step, context)
    there = {name.rpartition(".")[2] for name in _linears(context.base)}
    if step.targets != "all-linear" and (unknown := sorted(set(step.targets) - there)):
        raise Refused(f"the model has no linear layer {unknown[0]!r}; its layers have {', '.join(sorted(there))}")


def _refuse_after_dora(step: Tune, context: Context) -> None:
    """A DoRA scales the base's own outputs: what changes the base, or writes other formats, does not follow it."""
    recipe = context.recipe
    later = recipe.steps[recipe.steps.index(step) + 1 :]
    if other := next((other for other in later if other.kind != "merge" or step.name not in other.consumed), None):
        raise Refused(f"{other.kind} does not follow a DoRA adapter: tune {step.name!r} after it, or say `dora: false`")
    if recipe.export.format not in ("vllm", "adapter"):
        raise Refused(f"the format {recipe.export.format} takes no DoRA adapter: say `dora: false`, or merge it")


def _found(file: str, method: str, fewest: int = FEWEST) -> Found:
    try:
        stamp = Path(file).stat()
    except OSError as error:
        raise Refused(f"the examples in {file} cannot be read: {error.strerror or error}") from error
    return _read(file, method, fewest, stamp.st_mtime_ns, stamp.st_size)


def _labels(file: str, step: Tune) -> set[str]:
    return _found(file, step.method, 1).labels


@cache
def _read(file: str, method: str, fewest: int, *_: int) -> Found:
    return checked(Path(file), method, fewest)


def _linears(base: Checkpoint) -> list[str]:
    return [name.removesuffix(".weight") for name, shape in base.shapes.items() if _linear(name, shape)]


def _linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and ".layers." in f".{name}" and name.endswith(".weight")


def sentence(options: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    data = ", ".join(f"{of['examples']} {name} examples ({of['sha256'][:12]})" for name, of in notes["data"].items())
    early = f" of {notes['planned_steps']}: the held-out loss rose" if notes.get("ended_early") else ""
    best = f"; the adapter is that of step {notes['best_step']}" if "best_step" in notes else ""
    cut = sum(of["cut"] for of in notes["data"].values())
    longer = f" {cut} examples were cut at {notes['max_length']} tokens." if cut else ""
    if report := notes.get("validation"):
        longer += f" Validation: {report['verdict']}."
    return (
        f"{options['name']}: {options['method']}, {data}; {notes['steps']} steps{early}, "
        f"{notes['trained_tokens']:,} tokens, rank {notes['rank']}, "
        f"learning rate {notes['learning_rate']:g}; loss {notes['losses'][0]:.3f} to "
        f"{notes['train_loss']:.3f}{best}.{longer}"
    )


STEP = StepKind(Tune, "optimize.steps.tune.tune", estimate, refuse, sentence)
