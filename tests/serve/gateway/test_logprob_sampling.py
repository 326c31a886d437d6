"""Log-probabilities cost the whole batch: who gets them is drawn for all that come together."""

from __future__ import annotations

import itertools

from serve.gateway.logprob_sampling import LogprobSampling
from tests.support.watched_traffic import Engine, ask, drift, push


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


def test_an_adapter_without_a_reference_is_sampled_more_unless_nobody_is():
    now = [0.0]

    def share(configured, gathering):
        sampling = LogprobSampling(configured, clock=lambda: now[0])
        drawn = []
        for _ in range(3000):
            now[0] += 2.0
            drawn.append(sampling.sampled(gathering))
        return sum(drawn) / len(drawn)

    assert abs(share(0.05, True) - 0.3) < 0.03 and abs(share(0.05, False) - 0.05) < 0.02
    assert share(0.6, True) > 0.55 and share(0.0, True) == 0


async def test_log_probabilities_are_watched_after_as_many_requests_as_prompts_are(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    async with connect(watched) as client:
        await push(client, make_adapter, 0)
        parts = client._transport.app.state.parts
        assert not parts.drift_monitor.lacks_logprobs("tone"), "nobody has asked it"
        await ask(client, 20)
        signal = (await drift(client))["versions"][0]["signals"]["logprob"]
        assert signal["phase"] == "gathering" and parts.drift_monitor.lacks_logprobs("tone")
        await ask(client, 150)
        signal = (await drift(client))["versions"][0]["signals"]["logprob"]
        assert signal["phase"] == "watching" and not parts.drift_monitor.lacks_logprobs("tone")


def test_on_a_gpu_each_request_is_drawn_by_itself():
    sampling = LogprobSampling(0.05, clock=lambda: 0.0, by_request=True)  # all within one slot
    drawn = [sampling.sampled() for _ in range(20_000)]
    assert 0.04 < sum(drawn) / len(drawn) < 0.06
    in_slots = LogprobSampling(0.05, clock=lambda: 0.0)
    assert len({in_slots.sampled() for _ in range(1000)}) == 1
