"""A model reads rows of tokens, and says of each token how likely it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LOGITS = 1 << 25  # numbers that are there at a time


@dataclass(frozen=True, slots=True)
class Read:
    """Of each token behind a row's first: its log-probability in nats, whether it is the likeliest, and the likeliest's
    probability, (tokens - 1,) each."""

    logps: torch.Tensor
    likeliest: torch.Tensor
    confidence: torch.Tensor


@torch.inference_mode()
def read(model: Any, rows: Sequence[Sequence[int]], alive: Callable[[], None] = lambda: None) -> list[Read]:
    """What `model` says of each row, in the order of the rows; rows of about the same length share a forward pass."""
    made: dict[int, Read] = {}
    vocabulary = int(model.config.get_text_config().vocab_size)
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    while order:
        longest = len(rows[order[-1]])
        count = max(1, LOGITS // (vocabulary * longest))
        some, order = order[-count:], order[:-count]
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, at in enumerate(some):
            ids[place, : len(rows[at])] = torch.tensor(list(rows[at]))
            mask[place, : len(rows[at])] = 1
        alive()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for place, at in enumerate(some):
            end = len(rows[at])
            said = logits[place, : end - 1].float().log_softmax(-1)
            right = ids[place, 1:end]
            best, chosen = said.max(-1)
            made[at] = Read(said.gather(-1, right[:, None])[:, 0].cpu(), (chosen == right).cpu(), best.exp().cpu())
    return [made[at] for at in range(len(rows))]
