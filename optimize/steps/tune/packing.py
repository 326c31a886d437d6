"""Several sequences in one row, each with positions of its own, so that none attends to another.

transformers sees from the positions where a sequence begins and masks what is before it. No token is padding: an
optimizer's step over examples of any length is one row, or several when it holds more tokens than a row takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from optimize.steps.tune.encoding import Unit


@dataclass(frozen=True, slots=True)
class Row:
    """ids and positions (tokens,); `at` are the places whose next token is learned, `right` those tokens, `owner` the
    sequence that each belongs to; `borders` (sequences + 1,) are where sequences begin and the last one ends; `units`
    are the numbers of the examples in the row."""

    ids: torch.Tensor
    positions: torch.Tensor
    at: torch.Tensor
    right: torch.Tensor
    owner: torch.Tensor
    borders: torch.Tensor
    units: tuple[int, ...]


def rows(units: Sequence[Unit], numbers: Sequence[int], longest: int) -> Iterator[Row]:
    """The units with these numbers in rows of up to `longest` tokens; a longer unit has a row of its own."""
    held: list[int] = []
    size = 0
    for number in numbers:
        length = sum(len(tokens.ids) for tokens in units[number])
        if held and size + length > longest:
            yield row(units, held)
            held, size = [], 0
        held.append(number)
        size += length
    if held:
        yield row(units, held)


def row(units: Sequence[Unit], numbers: Sequence[int]) -> Row:
    ids: list[int] = []
    positions: list[int] = []
    at: list[int] = []
    owner: list[int] = []
    borders = [0]
    for number in numbers:
        for tokens in units[number]:
            learned = [place for place in range(1, len(tokens.ids)) if tokens.learned[place]]
            at += [len(ids) + place - 1 for place in learned]
            owner += [len(borders) - 1] * len(learned)
            positions += range(len(tokens.ids))
            ids += tokens.ids
            borders.append(len(ids))
    whole, places = torch.tensor(ids), torch.tensor(at)
    return Row(
        whole, torch.tensor(positions), places, whole[places + 1], torch.tensor(owner),
        torch.tensor(borders, dtype=torch.int32), tuple(numbers),
    )  # fmt: skip
