"""What is minimized.

    supervised   - log p(answer)                                        the mean over the tokens of a step
    classify     - log p(label)                                         the mean over the texts of a step
    dpo          - log sigmoid(beta ((w - w0) - (l - l0)))              the mean over the pairs of a step

    kto          1 - sigmoid(beta (y - y0) - z) if good, 1 - sigmoid(z - beta (y - y0)) if not       over the ratings

w and l are the log-probabilities of the better and the worse answer, y of a rated one, w0, l0 and y0 those of the model
as training began (Rafailov et al. 2023, arXiv:2305.18290; Ethayarajh et al. 2024, arXiv:2402.01306). z is beta times
the divergence from that model, estimated in each row on answers to other prompts; good and bad weigh the same.
`hits` are the tokens that are the likeliest, the pairs whose better answer gained more, or the ratings that are so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import logsigmoid

from optimize.steps.tune.encoding import Unit
from optimize.steps.tune.packing import Row


class Objective(Protocol):
    def weight(self, units: Sequence[Unit], numbers: Sequence[int]) -> int:
        """What the sum over these units is divided by."""
        ...

    def total(self, logps: torch.Tensor, likeliest: torch.Tensor, row: Row) -> tuple[torch.Tensor, int]:
        """The sum of a row's losses in nats, and its hits."""
        ...


class Supervised:
    def weight(self, units: Sequence[Unit], numbers: Sequence[int]) -> int:
        return sum(sum(tokens.learned[1:]) for number in numbers for tokens in units[number])

    def total(self, logps: torch.Tensor, likeliest: torch.Tensor, row: Row) -> tuple[torch.Tensor, int]:
        return -logps.sum(), int(likeliest.sum())


class DPO:
    """`began` (units, 2) are the log-probabilities of both answers as training began."""

    def __init__(self, beta: float, began: torch.Tensor) -> None:
        self._beta, self._began = beta, began

    def weight(self, units: Sequence[Unit], numbers: Sequence[int]) -> int:
        return len(numbers)

    def total(self, logps: torch.Tensor, likeliest: torch.Tensor, row: Row) -> tuple[torch.Tensor, int]:
        gained = sums(logps, row) - self._began[list(row.units)].to(logps)
        margins = gained[:, 0] - gained[:, 1]
        return -logsigmoid(self._beta * margins).sum(), int((margins > 0).sum())


class KTO:
    """`began` (units, 2) are the log-probabilities of the rated answer and of another's as training began."""

    def __init__(self, beta: float, began: torch.Tensor, good: Sequence[bool]) -> None:
        self._beta, self._began = beta, began
        self._good = torch.tensor(good)
        share = float(self._good.float().mean())
        self._weights = torch.where(self._good, 0.5 / max(share, 1e-9), 0.5 / max(1 - share, 1e-9)).clamp(max=100.0)

    def weight(self, units: Sequence[Unit], numbers: Sequence[int]) -> int:
        return len(numbers)

    def total(self, logps: torch.Tensor, likeliest: torch.Tensor, row: Row) -> tuple[torch.Tensor, int]:
        numbers = list(row.units)
        gained = self._beta * (sums(logps, row) - self._began[numbers].to(logps))
        apart = gained[:, 1].detach().mean().clamp(min=0)
        good = self._good[numbers].to(logps.device)
        margins = torch.where(good, gained[:, 0] - apart, apart - gained[:, 0])
        losses = (1 - margins.sigmoid()) * self._weights[numbers].to(logps)
        return losses.sum(), int((margins > 0).sum())


def sums(logps: torch.Tensor, row: Row) -> torch.Tensor:
    """The log-probability of every answer of a row of pairs: (units, 2)."""
    total = torch.zeros(len(row.borders) - 1, dtype=logps.dtype, device=logps.device)
    return total.index_add(0, row.owner.to(logps.device), logps).view(-1, 2)
