"""The features of one request, as rows of numbers for `serve.drift.detector.detector`.

    row = prompt_row(embedding, own_tokens)                # log length, then the prompt's vector
    rows = answer_rows(embedding, answer)                  # {"output": row}, and "logprob" where there are any

    prompt    log length; the pooled vector of the prompt: of the last message of the user's (`features.last_turn`),
              and of that the tokens which it does not share with those around it (`features.shared_ends`)
    follow_up the same of a block of messages that go on with one conversation; the length is the mean of a message
    output    log length; ended by length; refused; distinct-1, distinct-2
    logprob   mean, minimum and standard deviation of the sampled tokens' logprobs, and the prompt's row to regress on

Behind a prompt's and an output's row comes the sketch of their tokens (`features.token_surprise`), of which two more
scores are made once there is a reference. Behind the sketch comes the mean row (`detector.mean_rows`).

A `Scale` is fitted on one half of the reference and turns such raw rows into scores of unit scale: of a prompt's row
its length and its surprises, and the mean logprob becomes what is left of it after a regression on prompt and length.
The other half is what new requests are ranked among: a row that the scale was fitted on lies nearer to its centre than
any new one, so it may not be there. No number of a prompt's vector is a score: the vector says what a prompt is about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.asgi.exchange import Generation
from serve.drift.features import token_surprise
from serve.drift.features.embedding import Embedding
from serve.models.refusals import refuses

Floats: TypeAlias = NDArray[np.floating]

# Counts up when a row of the same request would come out otherwise: a baseline of another version does not fit.
FEATURES = 5
# With 1 a prompt's row is of all its tokens; with 2 frequent wording was cut out of it as if it were an opening; up to
# 3 it is of the whole rendered prompt, and not of the last message. Such a baseline goes on as it began; the next
# version gets one of its own. Up to 4 vectors and frequent tokens were scores too (`earlier_baselines`).
EARLIER_FEATURES = (ALL_TOKENS := 1, 2, WHOLE_PROMPTS := 3, VECTORS := 4)
PROMPT, OUTPUT, LOGPROB, FOLLOW_UP = SIGNALS = ("prompt", "output", "logprob", "follow_up")
# What is said of requests, not of answers.
PROMPTS = frozenset({PROMPT, FOLLOW_UP})
# How far from the centre a score may lie.
CLIP = 8.0
# Shares of the mean variance of what log-probabilities are regressed on, of which the best is added to it.
RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)

_LEADS = {
    PROMPT: ("length",),
    FOLLOW_UP: ("length",),
    OUTPUT: ("length", "ended_by_length", "refusal", "distinct_1", "distinct_2"),
    LOGPROB: ("mean_logprob", "min_logprob", "sd_logprob"),
}


def prompt_row(embedding: Embedding, tokens: ArrayLike, skipped: int = 0) -> Floats:
    """(1 + dimensions,) of a prompt's own tokens, and all that comes behind them; `skipped` more are in its middle that
    were not looked at."""
    ids = np.asarray(tokens, np.int64)
    length = (math.log1p(ids.size + skipped),)
    return np.concatenate((length, embedding.vector(ids), token_surprise.sketch(ids), embedding.mean_row(ids)))


def beginning(answer: Generation, tokens: int) -> Generation:
    """The answer as it would have been with `max_tokens` of `tokens`; all of it where that is 0."""
    size = len(answer.output)
    if not tokens or size <= tokens:
        return answer
    text = answer.text and answer.text[: round(len(answer.text) * tokens / size)]
    logprobs = None if answer.logprobs is None else answer.logprobs[:tokens]
    return replace(answer, output=answer.output[:tokens], finish_reason="length", text=text, logprobs=logprobs)


def answer_rows(embedding: Embedding, answer: Generation) -> dict[str, Floats]:
    """The rows that an answer has, with all that comes behind them, but for the prompt's that its log-probabilities are
    to be regressed on. Nothing of an answer without a token."""
    ids = np.asarray(answer.output, np.int64)
    n = ids.size
    if not n:
        return {}
    length, refused = math.log1p(n), refuses(answer.text)
    pairs = _distinct(ids[:-1] << 32 | ids[1:]) if n > 1 else 1.0
    leads = (length, answer.finish_reason == "length", refused, _distinct(ids), pairs)
    row = np.concatenate((leads, token_surprise.sketch(ids), embedding.mean_row(ids)))
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


def names(signal: str) -> tuple[str, ...]:
    """What each score of a signal is called, in order, without those of its tokens."""
    return _LEADS[signal]


def columns(signal: str, dimensions: int) -> int:
    """Numbers of a raw row, without those of its tokens: scores, and what they are regressed on or explained by."""
    behind = {PROMPT: dimensions, FOLLOW_UP: dimensions, OUTPUT: 0, LOGPROB: dimensions + 2}
    return len(_LEADS[signal]) + behind[signal]


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """Raw rows of one signal -> scores of about unit scale: (row - centre) @ matrix, clipped.

    Every step of it is linear: standard scores, and ridge regression for the mean logprob. centre: (columns,), matrix:
    (columns, scores).
    """

    centre: Floats
    matrix: Floats

    @classmethod
    def fit(cls, signal: str, rows: ArrayLike, *, surprises: int = 0) -> Self:
        """On raw rows (n, columns) of the fitting half; the last `surprises` columns are scores of tokens already."""
        raw = np.asarray(rows, np.float64)
        lead, last = len(_LEADS[signal]), raw.shape[1] - surprises
        centre = raw.mean(axis=0)
        centred = raw - centre
        centre[last:] = 0
        matrix = np.zeros((raw.shape[1], lead + surprises))
        matrix[:lead, :lead], matrix[last:, lead:] = np.eye(lead), np.eye(surprises)
        if signal == LOGPROB:
            matrix[lead:, 0] = -_ridge(centred[:, lead:], centred[:, 0])
        # A constant stays one: its ranks are ties, which say nothing.
        matrix[:, :lead] /= np.maximum((centred @ matrix[:, :lead]).std(axis=0), 1e-3)
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


def _distinct(ids: NDArray[np.int64]) -> float:
    return len(set(ids.tolist())) / ids.size


def _ridge(inputs: Floats, target: Floats) -> Floats:
    """Of RIDGES the one whose regression predicts each row best from the others (Allen's PRESS, 1974): with as many
    numbers as rows the least one fits noise."""
    n, d = inputs.shape
    values, vectors = np.linalg.eigh(inputs.T @ inputs)
    turned = inputs @ vectors
    along, squares = turned.T @ target, turned**2
    best, errors = np.zeros(d), math.inf
    for ridge in RIDGES:
        shrunk = 1 / (np.maximum(values, 0) + ridge * values.mean() + 1e-9)
        # Each row is also in the means that were taken off.
        leverage = squares @ shrunk + 1 / n
        left = (target - turned @ (shrunk * along)) / np.maximum(1 - leverage, 1e-6)
        if (error := float(left @ left)) < errors:
            best, errors = vectors @ (shrunk * along), error
    return best
