"""Series of usage are bounded, whoever asks."""

from __future__ import annotations

from serve.telemetry.places import TIDY
from serve.telemetry.usage.usage_ledger import Usage
from serve.telemetry.usage.usage_metrics import UsageMetrics

USED = Usage(1, 30, 10, 5, 0.5, 0.25)


def text(metrics: UsageMetrics) -> str:
    return "".join(family.render(False) for family in metrics.families)


def test_beyond_the_limit_pairs_are_counted_together_and_what_is_gone_gives_its_place():
    known = {"a", "b", "c"}
    now = [0.0]
    metrics = UsageMetrics("EUR", known.__contains__, limit=2, clock=lambda: now[0])
    for adapter in ("a", "b", "c", "c"):
        metrics.take(adapter, "acme", USED)
    assert 'loradock_usage_requests_total{adapter="other",tenant="other"} 2.0' in text(metrics)
    known.remove("a")
    now[0] += TIDY
    metrics.take("c", "acme", USED)
    assert 'adapter="a"' not in text(metrics)
    assert 'loradock_usage_tokens_total{adapter="c",kind="prompt",tenant="acme"} 20.0' in text(metrics)


def test_beyond_the_limit_a_request_does_not_look_for_a_place_each_time():
    looks: list[str] = []

    def known(adapter: str) -> bool:
        looks.append(adapter)
        return True

    metrics = UsageMetrics("EUR", known, limit=2)
    for number in range(100):
        metrics.take(f"adapter-{number}", "acme", USED)
    assert len(looks) == 2
