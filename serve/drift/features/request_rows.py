"""The rows of numbers that a request and its answer give, by signal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.asgi.exchange import Generation
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import (
    LOGPROB,
    PROMPT,
    Floats,
    answer_rows,
    beginning,
    prompt_row,
)
from serve.drift.features.shared_ends import Words, own_tokens, skipped


def reference_rows(
    generations: Sequence[Generation],
    prompts: Sequence[NDArray[np.int64]],
    embedding: Embedding,
    tokens: int,
) -> dict[str, list[Floats]]:
    """The rows of each signal that a reference is made of, of answers and the last turns of their `prompts`; what those
    share is left out of them as it is live. tokens: of an answer so many are looked at, all where it is 0."""
    rows: dict[str, list[Floats]] = {}
    for generation, prompt, own in zip(generations, prompts, own_tokens(prompts, embedding.numbers), strict=True):
        each = answer_rows(embedding, beginning(generation, tokens))
        each[PROMPT] = prompt_row(embedding, own, skipped(prompt))
        regress_on(each[PROMPT][: 1 + embedding.dimensions], each)
        for kind, row in each.items():
            rows.setdefault(kind, []).append(row)
    return rows


def follow_up_row(embedding: Embedding, turns: Sequence[NDArray[np.int64]]) -> Floats:
    """Of the messages of one block; its length is the mean length of a message."""
    tokens = np.concatenate([Words.of(turn).tokens for turn in turns])
    row = prompt_row(embedding, tokens)
    row[0] = math.log1p(sum(map(len, turns)) / len(turns))
    return row


def regress_on(prompt: Floats, rows: dict[str, Floats]) -> None:
    """A row of log-probabilities goes on with its prompt's row."""
    if LOGPROB in rows:
        rows[LOGPROB] = np.concatenate((rows[LOGPROB], prompt))
