"""The rows of numbers that a request and its answer give, by signal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve.asgi.exchange import Generation
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import (
    LOGPROB,
    PROMPT,
    Answer,
    Floats,
    answer_rows,
    beginning,
    prompt_row,
)
from serve.drift.features.parameter_strata import Stratum
from serve.drift.features.token_runs import SharedRuns, own_tokens, skipped


def reference_rows(
    generations: Sequence[Generation], embedding: Embedding, stratum: Stratum, shared: SharedRuns
) -> dict[str, list[Floats]]:
    """The rows of each signal that a reference is made of; what prompts share is left out of them as it is live, and
    learned by `shared`."""
    rows: dict[str, list[Floats]] = {}
    prompts = own_tokens((generation.prompt for generation in generations), shared)
    for generation, own in zip(generations, prompts, strict=True):
        each = rows_of_answer(generation, embedding, stratum)
        each[PROMPT] = prompt_row(embedding, own, skipped(generation.prompt))
        regress_on(each[PROMPT][: 1 + embedding.dimensions], each)
        for kind, row in each.items():
            rows.setdefault(kind, []).append(row)
    return rows


def rows_of_answer(generation: Generation, embedding: Embedding, stratum: Stratum) -> dict[str, Floats]:
    """The rows that as much of an answer gives as the stratum looks at, without its prompt's numbers."""
    tokens = np.asarray(generation.output, np.int64)
    answer = Answer(tokens, generation.finish_reason, generation.text, generation.logprobs)
    counted = beginning(answer, stratum.tokens)
    return answer_rows(embedding, counted)


def regress_on(prompt: Floats, rows: dict[str, Floats]) -> None:
    """A row of log-probabilities goes on with its prompt's row."""
    if LOGPROB in rows:
        rows[LOGPROB] = np.concatenate((rows[LOGPROB], prompt))
