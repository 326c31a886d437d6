"""A job's folder, through which this server and the program that trains speak.

recipe.yaml          what is to be done
parent/              the adapter to go on from, if there is one
progress.jsonl       a line a step; after a kill steps are repeated, and the last line of a step counts
alive                touched with every forward pass, between steps too
settings.json        the hyperparameters as numbers, before the first step
validation.json      what the adapter did to its base, before it is there
checkpoints/step-N/  the adapter at the end of an epoch
adapter/             the result, which appears at once
incoming/            what a worker has sent of its folder so far
error.json           why there is none
"""

from __future__ import annotations

import json
import os
import re
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from serve.adapters.adapter import FILES
from serve.files import write_whole
from serve.jobs.finetuning.objects import Job
from serve.names import shown
from serve.rollout import validation

# OpenAI's names of a method's numbers, and the recipe's.
OPTIONS = {
    "n_epochs": "epochs",
    "batch_size": "batch",
    "learning_rate_multiplier": "learning_rate_multiplier",
    "learning_rate": "learning_rate",
    "beta": "beta",
    "rank": "rank",
    "alpha": "alpha",
}
_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
# A training has no more steps: what says so is no line.
MOST_STEPS = 10_000_000
_CHECKPOINT = re.compile(r"checkpoints/step-[0-9]{6,9}")
# What the database takes as a number.
_MOST = 1e300
_HEADER: Sequence[Any] = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


class JobFolder:
    """All methods block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read, self._touched = 0, 0.0

    @property
    def adapter(self) -> Path | None:
        """The result, once it is there."""
        adapter = self.path / "adapter"
        return adapter if all((adapter / name).is_file() for name in FILES) else None

    def prepare(self, job: Job, model: Path, train: Path, validation: Path | None, parent: Path | None) -> None:
        """Everything that the program needs, as often as it is started."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if parent and not (self.path / "parent").is_dir():
            aside = self.path / "parent.part"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(parent, aside)
            aside.rename(self.path / "parent")
        write_whole(self.path / "recipe.yaml", yaml.safe_dump(_recipe(job, model, train, validation)).encode())

    def new_lines(self, after: int = 0) -> list[Mapping[str, Any]]:
        """Whole lines of progress since the last call, of steps behind this one."""
        try:
            with (self.path / "progress.jsonl").open("rb") as file:
                file.seek(self._read)
                found = [line for line in map(self._next, file) if line and line["step"] > after]
        except FileNotFoundError:
            return []
        return found

    def _next(self, raw: bytes) -> Mapping[str, Any] | None:
        if not raw.endswith(b"\n"):
            return None  # its end is still to come
        self._read += len(raw)
        return _line(raw)

    def is_touched(self) -> bool:
        """The program has computed something since the last call."""
        before = self._touched
        try:
            self._touched = (self.path / "alive").stat().st_mtime
        except FileNotFoundError:
            return False
        return self._touched != before

    def lines(self) -> Iterator[Mapping[str, Any]]:
        """Every step once, as it was measured last; a long training has more of them than memory should hold."""
        with suppress(FileNotFoundError), (self.path / "progress.jsonl").open("rb") as file:
            places = array("q")  # by step, less one: where its last line begins
            place = 0
            for raw in file:
                line = _line(raw)
                if line and line["step"] > len(places):
                    places.extend([-1] * (line["step"] - len(places)))
                if line:
                    places[line["step"] - 1] = place
                place += len(raw)
            for place in places:
                if place >= 0:
                    file.seek(place)
                    if line := _line(file.readline()):
                        yield line

    def checkpoints(self) -> dict[int, Path]:
        """The adapters at the ends of epochs that are there still, by their steps."""
        last = {line["checkpoint"]: line["step"] for line in self.lines() if line.get("checkpoint")}
        there = {step: self.path / name for name, step in last.items()}
        return {step: path for step, path in there.items() if all((path / name).is_file() for name in FILES)}

    def error(self) -> str:
        """What the program said before it gave up."""
        return shown(self._error("message"), 600)

    def lacked_memory(self) -> bool:
        """The program gave up because what it had begun was killed, or took too much memory: another start may do."""
        return self._error("class") == "OutOfMemory"

    def _error(self, key: str) -> str:
        try:
            return str(json.loads((self.path / "error.json").read_text())[key])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def last_words(self) -> str:
        """The end of its log, for one that died without a word."""
        try:
            with (self.path / "log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return shown(next((line.strip() for line in reversed(lines) if line.strip()), ""), 300)

    def settled(self) -> dict[str, Any]:
        """The hyperparameters as numbers, by OpenAI's names, once the program has chosen them."""
        try:
            notes = json.loads((self.path / "settings.json").read_text(), parse_constant=_no_number)
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(notes, dict):
            return {}
        names = {"n_epochs": "epochs", "batch_size": "batch", "rank": "rank", "learning_rate": "learning_rate"}
        return {name: notes[ours] for name, ours in names.items() if _is_number(notes.get(ours))}

    def validation(self) -> dict[str, Any]:
        """What is kept of the adapter's validation report; nothing without one."""
        try:
            report = validation.read((self.path / "validation.json").read_bytes())
        except OSError:
            return {}
        return report.kept() if report else {}

    def results(self) -> Iterator[bytes]:
        """What each step measured, as lines of CSV."""
        for values in chain([_HEADER], ([line.get(name) for name in _COLUMNS] for line in self.lines())):
            yield (",".join("" if value is None else str(value) for value in values) + "\n").encode()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _recipe(job: Job, model: Path, train: Path, validation: Path | None) -> dict[str, Any]:
    asked = job.asked
    options = {OPTIONS[name]: value for name, value in asked.hyperparameters.items() if value != "auto"}
    step: dict[str, Any] = {"method": asked.method, "train": str(train), **options}
    if validation:
        step["validation"] = str(validation)
    # On the processor: a GPU's memory is the engine's.
    recipe: dict[str, Any] = {"model": str(model), "seed": asked.seed, "device": "cpu", "export": {"format": "adapter"}}
    if asked.parent:
        recipe["adapters"] = {"parent": "parent"}
        step["adapter"] = "parent"
    return {**recipe, "steps": [{"tune": step}]}


def _line(raw: bytes) -> Mapping[str, Any] | None:
    """A line of progress; a torn one is none."""
    try:
        line = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and all(type(line.get(name)) is int for name in ("step", "steps"))
    if not whole or not 0 < line["step"] <= MOST_STEPS:
        return None
    # A loss that is no number is none; and a worker's file may say anything.
    if not _CHECKPOINT.fullmatch(str(line.get("checkpoint"))):
        line["checkpoint"] = None
    return {name: value if name not in _COLUMNS or _is_number(value) else None for name, value in line.items()}


def _no_number(constant: str) -> None:
    """NaN and the like."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MOST
