"""A model reads rows of tokens, and says of each token how likely it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LOGITS = 1 << 25  # numbers that are there at a time
TOKENS = 2048  # of prompts that share a pass
# A prompt, and answers to it.
Asked: TypeAlias = tuple[Sequence[int], Sequence[Sequence[int]]]
# What a model keeps of a prompt that several answers may go on with.
SHARED = (DynamicLayer, DynamicSlidingWindowLayer)


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


@torch.inference_mode()
def likelihoods(model: Any, asked: Sequence[Asked], alive: Callable[[], None] = lambda: None) -> list[list[float]]:
    """Of each prompt's answers the log-probability in nats, a token. A prompt is read once where the model keeps keys
    and values that its answers can share, and words are weighed behind it alone; prompts of about one length share a
    forward pass."""
    made: dict[int, list[float]] = {}
    vocabulary = int(model.config.get_text_config().vocab_size)
    order = sorted(range(len(asked)), key=lambda at: len(asked[at][0]))
    while order:
        count = _together([asked[at] for at in reversed(order)], vocabulary)
        some, order = order[-count:], order[:-count]
        alive()
        scores = _behind_prompts(model, [asked[at] for at in some])
        if scores is None:
            return _behind_each(model, asked, alive)
        made.update(zip(some, scores, strict=True))
    return [made[at] for at in range(len(asked))]


def _together(asked: Sequence[Asked], vocabulary: int) -> int:
    """How many of them, from the first on, share a pass: what is computed of their words and tokens is bounded."""
    rows = longest = 0
    for count, (_, answers) in enumerate(asked):
        rows += len(answers)
        longest = max(longest, *(len(answer) for answer in answers))
        if count and (rows * longest * vocabulary > LOGITS or (count + 1) * len(asked[0][0]) > TOKENS):
            return count
    return len(asked)


def _behind_prompts(model: Any, asked: Sequence[Asked]) -> list[list[float]] | None:
    """None where the answers cannot share what the model keeps. Prompts end at the same place, as windows of attention
    have it."""
    ids, mask = _aligned([prompt for prompt, _ in asked], at_end=True)
    takes = inspect.signature(model.get_base_model().forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    said = model(input_ids=ids, attention_mask=mask, position_ids=_places(mask), use_cache=True, **last)
    kept = said.get("past_key_values")
    if kept is None or any(type(layer) not in SHARED for layer in kept.layers):
        return None
    prompt = torch.tensor([number for number, (_, answers) in enumerate(asked) for _ in answers])
    words, there = _aligned([answer for _, answers in asked for answer in answers])
    first = said.logits[:, -1].float().log_softmax(-1)
    logps = first[prompt].gather(-1, words[:, :1])
    if words.shape[1] > 1:
        kept.batch_select_indices(prompt)
        mask = torch.cat([mask[prompt], there[:, :-1]], 1)
        places = _places(mask)[:, ids.shape[1] :]
        said = model(
            input_ids=words[:, :-1], attention_mask=mask, position_ids=places, past_key_values=kept, use_cache=True
        )
        behind = said.logits.float().log_softmax(-1)
        logps = torch.cat([logps, behind.gather(-1, words[:, 1:, None])[:, :, 0]], 1)
    means = iter(((logps * there).sum(1) / there.sum(1)).tolist())
    return [[next(means) for _ in answers] for _, answers in asked]


def _behind_each(model: Any, asked: Sequence[Asked], alive: Callable[[], None]) -> list[list[float]]:
    """Each answer with its prompt anew."""
    rows = [[*prompt, *answer] for prompt, answers in asked for answer in answers]
    said = iter(read(model, rows, alive))
    return [[float(next(said).logps[len(prompt) - 1 :].mean()) for _ in answers] for prompt, answers in asked]


def _aligned(rows: Sequence[Sequence[int]], at_end: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and where there are some, (rows, longest) each."""
    side = "left" if at_end else "right"
    ids = pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True, padding_side=side)
    there = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side=side)
    return ids, there


def _places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)
