"""Requests to a version whose answers follow from their parameters: how long, how likely, how varied."""

from __future__ import annotations

import itertools

import numpy as np

from serve.asgi.exchange import Exchange, Generation, Parameters
from serve.drift.features.embedding import Embedding

VOCABULARY, TOPICS, DIMENSIONS = 400, 8, 32
# Of an answer that nobody cuts.
MEAN_TOKENS = 20


class SampledAnswers:
    """`request(parameters)` is one exchange; `broken` answers are shorter and of other words, whatever is asked."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        fixed = np.random.default_rng(7)
        table = fixed.standard_normal((VOCABULARY, DIMENSIONS)).astype(np.float32)
        self.embedding = Embedding(table, np.ones(VOCABULARY, np.float32), "of a test")
        self.logits = 2 * fixed.standard_normal((TOPICS, VOCABULARY))
        self.numbers = itertools.count()

    def request(self, parameters: Parameters, *, broken: bool = False, told: bool = True) -> Exchange:
        """`told`: the engine says which parameters it was asked with."""
        rng = self.rng
        topic = int(rng.integers(TOPICS))
        prompt = np.concatenate(([topic], rng.integers(0, VOCABULARY, int(rng.integers(10, 40)))))
        logits = self.logits[(topic + 3) % TOPICS if broken else topic] / max(parameters.temperature, 0.2)
        share = np.exp(logits - logits.max())
        share /= share.sum()
        wanted = int(rng.geometric(1 / (MEAN_TOKENS / 3 if broken else MEAN_TOKENS)))
        size = min(wanted, parameters.max_tokens)
        tokens = np.minimum(np.searchsorted(share.cumsum(), rng.random(size)), VOCABULARY - 1)
        reason = "length" if wanted > size else "stop"
        logprobs = np.log(share[tokens]).tolist()
        generation = Generation(
            prompt, tokens, reason, "word " * size, logprobs=logprobs, parameters=parameters if told else None
        )
        began = 60.0 * next(self.numbers)
        return Exchange("tone", "v1", 200, 0.1, 0.2, "tone@1", began=began, generations=(generation,))
