"""Log-probabilities cost the whole batch: who gets them is drawn for all that come together."""

from __future__ import annotations

import itertools

from serve.drift.logprob_sampling import LogprobSampling


def test_log_probabilities_are_asked_for_in_short_runs_and_in_the_share_that_was_said():
    now = [0.0]
    sampling = LogprobSampling(0.1, clock=lambda: now[0])
    sampled = []
    for _ in range(40_000):
        now[0] += 0.1
        sampled.append(sampling.sampled())
    assert abs(sum(sampled) / len(sampled) - 0.1) < 0.03
    turns = sum(a != b for a, b in itertools.pairwise(sampled))
    assert turns < 0.02 * len(sampled), "not one by one"


async def test_no_log_probabilities_are_asked_for_while_nobody_looks(client):
    parts = client._transport.app.state.parts
    parts._logprob_sampling = LogprobSampling(1.0)
    assert not parts.exchange_worker.running and not parts.wants_logprobs("tone"), "the model has no embedding table"
