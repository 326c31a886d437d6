"""What training an adapter needs, and which data, adapters and targets are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.data.examples import FEWEST, Found, checked
from optimize.errors import Refused
from optimize.options import Tune, plain
from optimize.steps.planning import PROCESS, STARTING, Context, Estimate, beyond_low_rank
from optimize.steps.tune.settings import ROW, activations, max_length, settled

TOKEN_BYTES = 4  # of JSON, roughly
TEMPLATE = 256  # tokens that a chat template adds to an example


def estimate(step: Tune, context: Context) -> Estimate:
    base, config = context.base, context.base.config
    found = _found(step.train, step.method)
    adapter = context.adapters.get(step.adapter)
    longest = min(max_length(plain(step), config), found.longest // TOKEN_BYTES)
    settings = settled(plain(step), config, adapter, found.examples, longest)
    tokens = found.bytes // TOKEN_BYTES * settings.epochs
    what = (
        f"{step.name}: {step.method} on {found.examples} examples, rank {settings.rank}, {settings.epochs} epochs of "
    )
    what += f"{-(-found.examples // settings.batch)} steps, learning rate {settings.learning_rate:g}"
    row = max(ROW, longest)
    learned = settings.rank * sum(sum(shape) for name, shape in base.shapes.items() if _linear(name, shape))
    kept = activations(config, row) // (context.layers if settings.gradient_checkpointing else 1)
    logits = row * context.vocabulary * 14
    memory = PROCESS + 2 * base.parameters + 24 * learned + kept + logits
    seconds = STARTING + 6 * tokens * context.token_seconds
    return Estimate("tune", what, memory, 20 * learned, seconds)


def too_long(file: Path, method: str, found: Found, folder: Path) -> Iterator[tuple[int, str]]:
    """(line, why) of examples whose answers the model in `folder` would never see; `found` is what the file holds."""
    from optimize.steps.tune.encoding import Encoder

    longest = max_length({"max_length": 0}, json.loads((folder / "config.json").read_text()))
    # A token has a byte at least, and a chat template adds few: shorter files need no tokenizer.
    if found.longest > longest - TEMPLATE:
        yield from Encoder(folder, longest).too_long(file, method)


def refuse(step: Tune, context: Context) -> None:
    for name in step.files:
        if file := getattr(step, name):
            found = _found(file, step.method, FEWEST if name == "train" else 1)
            if found.problem_count:
                raise Refused(f"{name} {Path(file).name}: {found.message}")
    config = context.adapters.get(step.adapter)
    if config is not None and beyond_low_rank(config):
        raise Refused(
            f"the adapter {step.adapter!r} is more than a low-rank update (DoRA or modules_to_save), which the engine "
            "does not serve: merge it into the base, and train a new one"
        )
    there = {name.rpartition(".")[2] for name in _linears(context.base)}
    if step.targets != "all-linear" and (unknown := sorted(set(step.targets) - there)):
        raise Refused(f"the model has no linear layer {unknown[0]!r}; its layers have {', '.join(sorted(there))}")


def _found(file: str, method: str, fewest: int = FEWEST) -> Found:
    try:
        stamp = Path(file).stat()
    except OSError as error:
        raise Refused(f"the examples in {file} cannot be read: {error.strerror or error}") from error
    return _read(file, method, fewest, stamp.st_mtime_ns, stamp.st_size)


@cache
def _read(file: str, method: str, fewest: int, *_: int) -> Found:
    return checked(Path(file), method, fewest)


def _linears(base: Checkpoint) -> list[str]:
    return [name.removesuffix(".weight") for name, shape in base.shapes.items() if _linear(name, shape)]


def _linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and ".layers." in f".{name}" and name.endswith(".weight")
