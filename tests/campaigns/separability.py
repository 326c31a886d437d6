"""How well requests of two kinds can be told apart by what the detector looks at, and how soon a mixture could be.

    python -m tests.campaigns.separability [--pairs news,encyclopedia ...]

For each set of features a linear discriminant with ridge is trained on half of the texts of both kinds, whose labels it
is told, calibrated by a logistic regression on a fifth, and looked at on the rest: the area under the ROC curve, the
information on a mixture with a fifth of the second kind (nats a request: the mean of ln(1 - q + q r), r the likelihood
ratio, which no bet exceeds in the mean), and ln(100,000) over it: the requests that evidence of 100,000 takes if the
second kind is known beforehand. A detector that does not know it learns it from the mixture first: the last column
is the area along the direction in which 300 requests, a fifth of them foreign, lie from 1,000 usual ones (whitened mean
difference, the mean of four draws).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from serve.drift.features.features import Scale, prompt_row
from serve.drift.features.token_surprise import BUCKETS, SAMPLED, TokenSurprise, sketch
from serve.models.embedded import ensure
from serve.models.input_embedding import rows
from tests.campaigns import drift_streams

PAIRS = ("news,encyclopedia", "quotations,news", "news,policies", "quotations,stories", "news,spanish")
PAIRS += ("quotations,italian", "general,health", "general,finance", "general,german")
REFERENCE, MOST = 1000, 5000
Texts = Sequence[Sequence[int]]
Features = Callable[[Texts], NDArray]


@cache
def table() -> NDArray[np.float32]:
    return rows(ensure("smollm2"))[:]


def means(texts: Texts) -> NDArray:
    """(n, width): of the rows of the model's own table."""
    return np.array([table()[np.asarray(ids)].mean(axis=0) for ids in texts])


def features(reference: Texts) -> dict[str, Features]:
    """Those of today on one half of a reference, and others."""
    parts = np.array([sketch(ids) for ids in reference[::2]])
    surprise, scores = TokenSurprise.fit(parts)

    def raw(ids: Sequence[int], tokens: NDArray) -> NDArray:
        row = prompt_row(embedding := drift_streams.embedding(), ids)[: 1 + embedding.dimensions]
        return np.concatenate((row, tokens))

    fitting = np.array([raw(ids, tokens) for ids, tokens in zip(reference[::2], scores, strict=True)])
    scale = Scale.fit("prompt", fitting, surprises=2)

    def scored(texts: Texts) -> NDArray:
        return np.array([scale(raw(ids, surprise(sketch(ids)))) for ids in texts])

    return {
        "length": lambda texts: scored(texts)[:, :1],
        "surprise of tokens and pairs": lambda texts: scored(texts)[:, 1:],
        "all scores": scored,
        "vector": lambda texts: np.array([drift_streams.embedding().vector(ids) for ids in texts]),
        "mean row": lambda texts: np.array([drift_streams.embedding().mean_row(ids) for ids in texts]),
        "mean embedding, not projected": means,
    }


def counts(texts: Texts) -> NDArray:
    """(n, BUCKETS + 1): how often each hash of a token comes; nobody's is the last."""
    ids = np.array([sketch(text) for text in texts])[:, :SAMPLED].astype(int)
    rows = np.arange(len(ids))[:, None] * (BUCKETS + 1) + np.where(ids < 0, BUCKETS, ids)
    return np.bincount(rows.ravel(), minlength=len(ids) * (BUCKETS + 1)).reshape(len(ids), -1)[:, :BUCKETS]


def parts(count: int) -> tuple[slice, slice, slice]:
    """To train on, to calibrate with, to look at."""
    half, more = count // 2, count * 7 // 10
    return slice(half), slice(half, more), slice(more, count)


def by_discriminant(usual: NDArray, foreign: NDArray) -> tuple[NDArray, NDArray]:
    """The scores of both, of a linear discriminant trained on the first part of each."""
    first, second = usual[parts(len(usual))[0]], foreign[parts(len(foreign))[0]]
    spread = (np.cov(first.T) + np.cov(second.T)) / 2
    spread += 0.02 * np.trace(spread) / len(spread) * np.eye(len(spread))
    onto = np.linalg.solve(spread, second.mean(axis=0) - first.mean(axis=0))
    return usual @ onto, foreign @ onto


def learned(usual: NDArray, foreign: NDArray, share: float = 0.2, mixed: int = 300, draws: int = 4) -> float:
    """Area along the direction that is learned from a mixture, on other texts than the mixture's."""
    areas = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        ours, theirs = rng.permutation(len(usual)), rng.permutation(len(foreign))
        count = int(share * mixed)
        reference, stream = usual[ours[:1000]], usual[ours[1000 : 1000 + mixed - count]]
        stream = np.concatenate((stream, foreign[theirs[:count]]))
        covariance = np.cov(reference.T)
        covariance += 0.3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        onto = np.linalg.solve(covariance, stream.mean(axis=0) - reference.mean(axis=0))
        low, high = usual[ours[1000 + mixed :]] @ onto, foreign[theirs[count:]] @ onto
        areas.append((low[:, None] < high[None, :]).mean())
    return float(np.mean(areas))


def by_naive_bayes(usual: Texts, foreign: Texts) -> tuple[NDArray, NDArray]:
    """The scores of both by hashed counts of their tokens."""
    first, second = (counts(texts[parts(len(texts))[0]]).sum(axis=0) for texts in (usual, foreign))
    prior = (first + second + 1e-3) / (first + second + 1e-3).sum() * 200
    ratio = np.log((second + prior) / (second.sum() + 200)) - np.log((first + prior) / (first.sum() + 200))
    ids = [np.append(ratio, 0.0)[_hashes(texts)].sum(axis=1) for texts in (usual, foreign)]
    return ids[0], ids[1]


def _hashes(texts: Texts) -> NDArray:
    ids = np.array([sketch(text) for text in texts])[:, :SAMPLED].astype(int)
    return np.where(ids < 0, BUCKETS, ids)


def measured(usual: NDArray, foreign: NDArray, share: float = 0.2) -> str:
    """A line's cells, from scores (n,) of both kinds."""
    slopes = _calibrated(usual[parts(len(usual))[1]], foreign[parts(len(foreign))[1]])
    low, high = (slopes[0] * scores[parts(len(scores))[2]] + slopes[1] for scores in (usual, foreign))
    area = (low[:, None] < high[None, :]).mean()
    ratios = [np.exp(np.minimum(log, 8)) for log in (low, high)]
    bets = [1 - share + share * ratio / ratios[0].mean() for ratio in ratios]
    nats = (1 - share) * float(np.log(bets[0]).mean()) + share * float(np.log(bets[1]).mean())
    return f"{area:.3f} | {nats:.3f} | " + (f"{math.log(1e5) / nats:.0f}" if nats > 1e-3 else "-")


def _calibrated(usual: NDArray, foreign: NDArray) -> NDArray:
    """(2,): ln of the likelihood ratio as a line in the score; Newton's method."""
    x = np.concatenate((usual, foreign))
    centre, width = x.mean(), x.std()
    inputs, target = (
        np.stack(((x - centre) / width, np.ones_like(x))),
        np.repeat((0.0, 1.0), (len(usual), len(foreign))),
    )
    line = np.zeros(2)
    for _ in range(60):
        p = 1 / (1 + np.exp(-np.clip(line @ inputs, -30, 30)))
        line -= np.linalg.solve(
            (inputs * p * (1 - p)) @ inputs.T + 1e-3 * np.eye(2), inputs @ (p - target) + 1e-3 * line
        )
    return np.array([line[0] / width, line[1] - line[0] * centre / width + math.log(len(usual) / len(foreign))])


def main() -> None:
    options = argparse.ArgumentParser(description="how well requests of two kinds can be told apart")
    options.add_argument("--pairs", nargs="*", default=PAIRS)
    print("| usual, foreign | features | area | nats, a fifth | requests | area, learned |\n" + "|---" * 6 + "|")
    for pair in options.parse_args().pairs:
        usual, foreign = (list(drift_streams.questions(kind)) for kind in pair.split(","))
        reference, usual, foreign = usual[:REFERENCE], usual[REFERENCE : REFERENCE + MOST], foreign[:MOST]
        for name, of in features(reference).items():
            rows = of(usual), of(foreign)
            known = measured(*by_discriminant(*rows))
            print(f"| {pair} | {name} | {known} | {learned(*rows):.3f} |", flush=True)
        print(f"| {pair} | hashed tokens, naive Bayes | {measured(*by_naive_bayes(usual, foreign))} | - |", flush=True)


if __name__ == "__main__":
    main()
