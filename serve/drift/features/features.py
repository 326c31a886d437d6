"""The features of one request, as rows of numbers for `serve.drift.detector.detector`.

    row = prompt_row(embedding, own_tokens)                # log length, then the prompt's vector
    rows = answer_rows(embedding, answer)                  # {"output": row}, and "logprob" where there are any

    prompt    log length; the pooled vector of the prompt: of the last message of the user's (`features.last_turn`),
              and of that the tokens which it does not share with those around it (`features.token_runs`)
    follow_up the same of a block of messages that go on with one conversation; the length is the mean of a message
    output    log length; ended by length; refused; distinct-1, distinct-2; the pooled vector of the answer
    logprob   mean, minimum and standard deviation of the sampled tokens' logprobs, and the prompt's row to regress on

Behind a prompt's and an output's row comes the sketch of their tokens (`features.token_surprise`), of which two more
scores are made once there is a reference. Behind a prompt's sketch comes its mean row (`detector.mean_rows`).

A `Scale` is fitted on one half of the reference and turns such raw rows into scores of unit scale: vectors are
whitened, and the mean logprob becomes what is left of it after a regression on prompt and length. The other half is
what new requests are ranked among: a row that the scale was fitted on lies nearer to its centre than any new one, so
it may not be there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from ctypes import addressof
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.features import token_surprise
from serve.drift.features.embedding import Embedding
from serve.drift.features.token_surprise import SKETCH
from serve.drift.native import at, native

Floats: TypeAlias = NDArray[np.floating]

# Counts up when a row of the same request would come out otherwise: a baseline of another version does not fit.
FEATURES = 4
# With 1 a prompt's row is of all its tokens; with 2 frequent wording was cut out of it as if it were an opening; up to
# 3 it is of the whole rendered prompt, and not of the last message. Such a baseline goes on as it began; the next
# version gets one of its own.
EARLIER_FEATURES = (ALL_TOKENS := 1, SINGLE_RUNS := 2, WHOLE_PROMPTS := 3)
PROMPT, OUTPUT, LOGPROB, FOLLOW_UP = SIGNALS = ("prompt", "output", "logprob", "follow_up")
# What is said of requests, not of answers.
PROMPTS = frozenset({PROMPT, FOLLOW_UP})
# How far from the centre a score may lie: one odd request should not turn a learned direction.
CLIP = 8.0
# Share of the mean variance that is added to every direction before whitening; directions with next to none stay small.
RIDGE = 0.02
FREQUENT_RIDGE = 0.1

_LEADS = {
    PROMPT: ("length",),
    FOLLOW_UP: ("length",),
    OUTPUT: ("length", "ended_by_length", "refusal", "distinct_1", "distinct_2"),
    LOGPROB: ("mean_logprob", "min_logprob", "sd_logprob"),
}

_REFUSES = re.compile(
    r"\W*(?:i(?:'|’)?m (?:very |really |so )?sorry|i am sorry|sorry,|my apologies|i apologi[sz]e|unfortunately,? i"
    r"|as an ai\b|i(?:'|’)m (?:not able|unable)"
    r"|i (?:can(?:'|’)?t|cannot|can not|won(?:'|’)?t|will not|am not able|am unable|must decline"
    r"|don(?:'|’)?t feel comfortable)"
    r"|(?:es )?tut mir leid|ich kann (?:ihnen |dir )?(?:das |dabei |hierbei )?(?:leider )?nicht"
    r"|je (?:suis désolé|ne peux pas)|lo siento|no puedo)",
    re.IGNORECASE,
)


class Answer(NamedTuple):
    """What an engine gave: token numbers, and where they were asked for the sampled tokens' logprobs (nat)."""

    tokens: ArrayLike
    finish_reason: str | None = None
    text: str | None = None
    logprobs: ArrayLike | None = None


def prompt_row(embedding: Embedding, tokens: ArrayLike, skipped: int = 0) -> Floats:
    """(1 + dimensions,) of a prompt's own tokens, and all that comes behind them; `skipped` more are in its middle that
    were not looked at."""
    ids = np.asarray(tokens, np.int64)
    row = _row(embedding, ids, 1, mean=True)
    row[0] = math.log1p(ids.size + skipped)
    return row


def beginning(answer: Answer, tokens: int) -> Answer:
    """The answer as it would have been with `max_tokens` of `tokens`; all of it where that is 0."""
    size = len(np.asarray(answer.tokens))
    if not tokens or size <= tokens:
        return answer
    text = answer.text and answer.text[: round(len(answer.text) * tokens / size)]
    logprobs = None if answer.logprobs is None else np.asarray(answer.logprobs)[:tokens]
    return Answer(np.asarray(answer.tokens)[:tokens], "length", text, logprobs)


def answer_rows(embedding: Embedding, answer: Answer) -> dict[str, Floats]:
    """The rows that an answer has, with all that comes behind them, but for the prompt's that its log-probabilities are
    to be regressed on. Nothing of an answer without a token."""
    ids = np.asarray(answer.tokens, np.int64)
    n = ids.size
    if not n:
        return {}
    row = _row(embedding, ids, len(_LEADS[OUTPUT]), distinct=True)
    row[0] = length = math.log1p(n)
    row[1] = answer.finish_reason == "length"
    row[2] = answer.text is not None and refuses(answer.text)
    rows = {OUTPUT: row}
    if answer.logprobs is not None:
        logprobs = np.asarray(answer.logprobs, np.float64)
        if logprobs.size and np.isfinite(logprobs).all():
            # As `mean` and `std` have it, in a third of their time.
            mean = np.add.reduce(logprobs) / logprobs.size
            away = logprobs - mean
            spread = math.sqrt(np.add.reduce(away * away) / logprobs.size)
            rows[LOGPROB] = np.array((mean, np.minimum.reduce(logprobs), spread, length))
    return rows


def refuses(text: str) -> bool:
    """Whether an answer begins as refusals do, in the words of common models."""
    return _REFUSES.match(text) is not None


def names(signal: str, dimensions: int) -> tuple[str, ...]:
    """What each score of a signal is called, in order."""
    if signal == LOGPROB:
        return _LEADS[signal]
    return _LEADS[signal] + tuple(f"vector_{i}" for i in range(dimensions))


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """Raw rows of one signal -> scores of about unit scale: (row - centre) @ matrix, clipped.

    Every step of it is linear: standard scores for the leading numbers, whitening for a vector, ridge regression for
    the mean logprob. centre: (columns,), matrix: (columns, scores).
    """

    centre: Floats
    matrix: Floats

    @classmethod
    def fit(cls, signal: str, rows: ArrayLike, *, surprises: int = 0, common: int = 0) -> Self:
        """On raw rows (n, columns) of the fitting half; behind the vector are `surprises` columns that are scores of
        tokens already, and `common` ones of frequent tokens."""
        raw = np.asarray(rows, np.float64)
        lead = len(_LEADS[signal])
        centre = raw.mean(axis=0)
        centred = raw - centre
        columns = raw.shape[1]
        vector = slice(lead, columns - surprises - common)
        frequent = slice(columns - common, columns)
        if signal == LOGPROB:
            matrix = np.zeros((columns, lead))
            matrix[:lead, :lead] = np.eye(lead)
            matrix[lead:, 0] = -_ridge(centred[:, lead:], centred[:, 0])
        else:
            matrix = np.eye(columns)
            matrix[vector, vector] = _whitening(centred[:, vector])
        if common:
            matrix[frequent, frequent] = _whitening(centred[:, frequent], FREQUENT_RIDGE)
        centre[vector.stop : frequent.start] = 0
        spread = (centred @ matrix).std(axis=0)
        # A constant stays one: its ranks are ties, which say nothing.
        floor = np.full(len(spread), 1e-3)
        matrix[:, :lead] /= np.maximum(spread, floor)[:lead]
        return cls(centre.astype(np.float32), matrix.astype(np.float32))

    def __call__(self, rows: ArrayLike) -> Floats:
        """(scores,) of a raw row, or (n, scores) of many."""
        scores = (np.asarray(rows, np.float32) - self.centre) @ self.matrix
        np.minimum(scores, CLIP, out=scores)
        return np.maximum(scores, -CLIP, out=scores)

    def each(self, rows: NDArray[np.float32]) -> Floats:
        """(n, scores) of raw rows, to the bit as of one by one: a product of many rows may round otherwise."""
        return self(rows[:, None])[:, 0]

    def arrays(self) -> dict[str, NDArray]:
        return {"centre": self.centre, "matrix": self.matrix}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Self:
        return cls(np.asarray(arrays["centre"], np.float32), np.asarray(arrays["matrix"], np.float32))


def _row(
    embedding: Embedding, ids: NDArray[np.int64], lead: int, *, mean: bool = False, distinct: bool = False
) -> Floats:
    """(columns,): `lead` numbers that are free, the vector of these tokens, their sketch, and if asked for their mean
    row. distinct: the last of those that are free are the shares of distinct tokens and pairs."""
    sketch = lead + embedding.dimensions
    behind = sketch + SKETCH
    row = np.empty(behind + (embedding.mean_width if mean else 0))
    if (code := native()) is not None:
        begin, ids = at(row), np.ascontiguousarray(ids)
        code.features(
            addressof(embedding.shown), at(ids), len(ids), begin + 8 * lead, begin + 8 * sketch,
            begin + 8 * behind if len(row) > behind else None, begin + 8 * (lead - 2) if distinct else None,
        )  # fmt: skip
        return row
    row[lead:sketch], row[sketch:behind] = embedding.vector(ids), token_surprise.sketch(ids)
    if mean:
        row[behind:] = embedding.mean_row(ids)
    if distinct:
        row[lead - 2], row[lead - 1] = _distinct(ids), _distinct(ids[:-1] << 32 | ids[1:]) if len(ids) > 1 else 1.0
    return row


def _distinct(ids: NDArray[np.int64]) -> float:
    return len(set(ids.tolist())) / ids.size


def _whitening(centred: Floats, ridge: float = RIDGE) -> Floats:
    """(d, d): symmetric, so that coordinates keep their meaning from one fit to the next."""
    n, d = centred.shape
    covariance = centred.T @ centred / max(n - 1, 1)
    covariance += (ridge * np.trace(covariance) / d + 1e-9) * np.eye(d)
    # With few rows the directions that they do not fill are guessed from the mean variance.
    blend = d / (n + d)
    covariance = (1 - blend) * covariance + blend * np.trace(covariance) / d * np.eye(d)
    values, vectors = np.linalg.eigh(covariance)
    return (vectors / np.sqrt(values)) @ vectors.T


def _ridge(inputs: Floats, target: Floats) -> Floats:
    gram = inputs.T @ inputs
    gram += (1e-3 * np.trace(gram) / len(gram) + 1e-9) * np.eye(len(gram))
    return np.linalg.solve(gram, inputs.T @ target)
