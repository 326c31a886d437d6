"""Examples as lines of a file, and what a candidate is trained on: new ones, and a replay of what was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from serve.adapters.file_thread import rest
from serve.dataset.asked_text import NoText, asked_text
from serve.dataset.examples import question_of
from serve.dataset.near import NearIndex, Sketch, common_shingles, sketch
from serve.errors import BadRequest, LoradockError
from serve.loop.likelihood import Example

# A reference holds so many examples at most, and so many bytes.
MOST, MOST_BYTES = 1000, 4 << 20


@dataclass(frozen=True, slots=True)
class Gathered:
    """Examples of new traffic, split by conversation; `evidence` says where they are from."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    evidence: dict[str, Any]


class Gather(Protocol):
    """Builds them from an adapter's traffic between two times; the same seed splits the same way."""

    async def __call__(self, name: str, *, since: float, until: float, held_out: float, seed: int) -> Gathered: ...


class Short(LoradockError):
    """There are too few examples yet."""

    status = 409


@dataclass(frozen=True, slots=True)
class Training:
    """What a candidate is trained on, and what its gate asks."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    new: int

    @property
    def replayed(self) -> int:
        return len(self.train) - self.new

    def without(self, deleted: Callable[[Example], bool]) -> Training:
        """As if these had never been gathered."""
        new, replayed = (
            [one for one in part if not deleted(one)] for part in (self.train[: self.new], self.train[self.new :])
        )
        held_out = tuple(one for one in self.held_out if not deleted(one))
        return Training((*new, *replayed), held_out, len(new))

    def lines(self) -> bytes:
        rows = (json.dumps(example.fields, ensure_ascii=False) for example in self.train)
        return "".join(f"{row}\n" for row in rows).encode("utf-8", "surrogatepass")


def read(path: Path) -> list[Example]:
    """The examples of a file of JSON lines; BadRequest for what is none."""
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found.append(_example(number, line))
    return found


def _example(number: int, line: str) -> Example:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise BadRequest(f"line {number} of the examples is not JSON: {error}") from error
    if not isinstance(fields, dict) or not ("messages" in fields or {"prompt", "completion"} <= fields.keys()):
        raise BadRequest(f"line {number} of the examples has neither messages nor a prompt with its completion")
    return Example(fields)


def mixed(
    new: Sequence[Example], held_out: Sequence[Example], old: Sequence[Example], kept: Sequence[Example], seed: int
) -> Training:
    """New examples and as many old ones, drawn by lot; none that asks what is held out or a reference holds (`kept`),
    or nearly."""
    apart = _Apart([*held_out, *kept], new)
    train = [example for example in _once(new) if not apart.holds(example)]
    there = apart.digests | {example.digest for example in train}
    others = sorted((example for example in _once(old) if example.digest not in there), key=lambda one: one.digest)
    random.Random(seed).shuffle(others)
    replay = islice((example for example in others if not apart.holds(example)), len(train))
    return Training((*train, *replay), bounded(held_out), len(train))


class _Apart:
    """What nobody may train on. `among` are the texts that say what a template's words are."""

    def __init__(self, examples: Sequence[Example], among: Sequence[Example]) -> None:
        self.digests = {example.digest for example in examples}
        sketches = [one for one in map(_sketch, examples) if one is not None]
        everything = [one for one in map(_sketch, _once([*examples, *among])) if one is not None]
        self._index = NearIndex(common_shingles(everything), sketches)

    def holds(self, example: Example) -> bool:
        """It is one of them, or its question is one's, or nearly."""
        rest()
        one = _sketch(example)
        return example.digest in self.digests or (one is not None and bool(self._index.near(one)))


def question(example: Example) -> str | None:
    """What is asked, if it is text."""
    fields = example.fields
    asked = asked_text({"messages": fields["messages"][:-1]} if "messages" in fields else {"prompt": fields["prompt"]})
    return None if isinstance(asked, NoText) else question_of(asked)


def _sketch(example: Example) -> Sketch | None:
    asked = question(example)
    return None if asked is None else sketch(asked)


def bounded(examples: Sequence[Example]) -> tuple[Example, ...]:
    """As many as a reference may hold, in the order of their digests."""
    found: list[Example] = []
    nbytes = 0
    for example in sorted(_once(examples), key=lambda one: one.digest):
        nbytes += len(json.dumps(example.fields))
        if len(found) >= MOST or nbytes > MOST_BYTES:
            break
        found.append(example)
    return tuple(found)


def split(examples: Sequence[Example], share: float, needed: int) -> tuple[Example, ...]:
    """A first reference out of what the live version was trained on; none where that leaves too little to train on."""
    there = sorted(_once(examples), key=lambda one: one.digest)
    count = max(needed, int(len(there) * share))
    return bounded(there[:count]) if 2 * count <= len(there) else ()


def _once(examples: Sequence[Example]) -> list[Example]:
    return list({example.digest: example for example in examples}.values())
