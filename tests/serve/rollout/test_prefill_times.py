"""First tokens are compared by the tokens that were computed for them."""

from __future__ import annotations

import numpy as np
import pytest

from serve.rollout.prefill_times import PrefillTimes


def seconds(rng, computed, load=1.0, slower=1.0):
    return (0.02 + 0.001 * computed) * load * slower * rng.lognormal(0, 0.1)


def geometric(values):
    return float(np.exp(np.mean(np.log([value for value in values if value is not None]))))


def relative(slower, requests=4000, seed=0):
    """The canary, whose prompts are mostly cold, against the live version, whose are mostly warm, at equal load."""
    rng, times = np.random.default_rng(seed), PrefillTimes()
    values = {False: [], True: []}
    for at in range(requests):
        canary = rng.random() < 0.1
        warm = rng.random() < (0.3 if canary else 0.9)
        computed = int(rng.integers(20, 80)) + (0 if warm else int(rng.integers(200, 600)))
        load = 1 + 0.8 * np.sin(at / 300)
        took = seconds(rng, computed, load, slower if canary else 1.0)
        value = times.relative(took, computed, canary=canary)
        values[canary].append(value)
    return geometric(values[True]) / geometric(values[False])


@pytest.mark.parametrize("slower", [1.0, 1.25, 3.0])
def test_a_version_is_as_slow_as_it_is_however_cold_its_cache(slower):
    ratios = [relative(slower, seed=seed) / slower for seed in range(4)]
    print(f"{slower}: {ratios}")
    assert all(0.95 < ratio < 1.05 for ratio in ratios)


def test_nothing_is_compared_that_the_live_version_has_not_done_often_enough():
    times = PrefillTimes()
    while times.relative(0.1, 50, canary=True) is None:
        assert times.relative(0.1, 50, canary=False) is None
    assert times.relative(0.2, 50, canary=True) == pytest.approx(2.0)
    assert times.relative(0.2, 5000, canary=True) is None
    assert times.relative(0.0, 50, canary=True) is None


def test_restored_it_goes_on_as_it_was():
    rng, times, twin = np.random.default_rng(0), PrefillTimes(), PrefillTimes()
    twin.restore(times.state())
    for at in range(400):
        computed = int(rng.integers(10, 400))
        took = seconds(rng, computed)
        if at == 200:
            twin = PrefillTimes()
            twin.restore(times.state())
        expected = times.relative(took, computed, canary=False)
        if at >= 200:
            assert twin.relative(took, computed, canary=False) == expected
