"""The new version beside the old one, at the same time."""

from __future__ import annotations

from serve.telemetry.rendered.alerts import grown
from serve.telemetry.rendered.dashboards.queries import (
    counted,
    error_ratio,
    marks,
    quantile,
    rate,
)
from serve.telemetry.rendered.panels import TOKENS, Json, Panel, Query, Row, Variable, dashboard

_ADAPTER = Variable("adapter", "Adapter", 'label_values(loradock_requests_total{version!=""}, adapter)', many=False)
_VERSIONS = 'label_values(loradock_requests_total{adapter="$adapter"}, version)'
_OLD, _NEW = (
    Variable("old", "Old version", _VERSIONS, many=False),
    Variable("new", "New version", _VERSIONS, many=False),
)
_SIDES = (("old", "$old"), ("new", "$new"))
_ANSWERED, _CUT = rate("loradock_requests_total", '%,code=~"2.."'), '%,finish_reason="length"'


def _both(expr: str) -> list[Query]:
    """`expr` for each side; % stands for its labels."""
    return [
        Query(
            expr.replace("%", f'adapter="$adapter",version="{version}"'),
            f"{side} ({version})" + (" {{rating}}" if "rating" in expr else ""),
        )
        for side, version in _SIDES
    ]


def board() -> Json:
    content: list[Panel | Row] = [
        *_verdict(),
        *_requests(),
        *_latency(),
        *_answers(),
    ]
    says = "The new version beside the old one, at the same time."
    return dashboard("swap", "Swap", says, content, [_ADAPTER, _OLD, _NEW], marks("$adapter"))


def _verdict() -> list[Panel]:
    return [
        Panel(
            "Verdict: evidence against the new version",
            "The logarithm of the evidence in each check of the running comparison. At the limit, log(1/alpha) of the "
            "policy, the new version is worse, and the policy says what happens.",
            [
                Query(
                    'max by (version, check) (loradock_swap_log_evidence{adapter="$adapter"})',
                    "{{version}} {{check}}",
                ),
                Query(
                    'max by (version) (loradock_swap_threshold_log_evidence{adapter="$adapter"})',
                    "{{version}} limit",
                ),
            ],
            quiet=True,
            least=None,
        ),
        Panel(
            "Requests until it is proved",
            "Further requests, of both versions together, until the new version has proved itself, from the noise seen "
            "so far: the estimate, and the range that it lies in four times of five. Nothing is drawn while the proof "
            "is not in sight.",
            [
                Query(
                    'max by (version, bound) (loradock_canary_requests_to_proof{adapter="$adapter"} < Inf)',
                    "{{version}} {{bound}}",
                )
            ],
            quiet=True,
        ),
        Panel(
            "Rolled back",
            "How often the server took the traffic from a version in the last day, and from which and why; the "
            "evidence is in the history.",
            [
                Query(counted("loradock_adapter_rollbacks_total", 'adapter="$adapter"', "1d", "adapter"), "all"),
                Query(
                    grown('sum by (version, reason) (loradock_rollbacks_total{adapter="$adapter"})', "1d"),
                    "{{version}} {{reason}}",
                ),
            ],
            quiet=True,
            decimals=0,
        ),
    ]


def _requests() -> list[Panel | Row]:
    return [
        Row("Side by side"),
        Panel(
            "Requests",
            "How the traffic is shared. What it takes until the new version is proved depends on the noise: see above.",
            _both(rate("loradock_requests_total", "%")),
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Errors",
            "The part that failed (5xx, overloaded, too late).",
            _both(error_ratio("%")),
            unit="percentunit",
            quiet=True,
        ),
    ]


def _latency() -> list[Panel]:
    return [
        Panel(
            "First token, p50",
            "Compare at the same time only: before and after differ by the hour already.",
            _both(quantile(0.5, "time_to_first_token_seconds", "%")),
            unit="s",
        ),
        Panel(
            "First token, p95",
            "Compare at the same time only.",
            _both(quantile(0.95, "time_to_first_token_seconds", "%")),
            unit="s",
        ),
        Panel(
            "Between tokens, p50",
            "A larger rank shows here first.",
            _both(quantile(0.5, "inter_token_latency_seconds", "%")),
            unit="s",
        ),
        Panel(
            "Between tokens, p95",
            "A larger rank shows here first.",
            _both(quantile(0.95, "inter_token_latency_seconds", "%")),
            unit="s",
        ),
    ]


def _answers() -> list[Panel]:
    return [
        Panel(
            "Tokens of an answer",
            "Mean length. A version that talks twice as long costs twice as much, and may have forgotten to stop.",
            _both(f"{rate('loradock_generation_tokens_total', '%')} / {_ANSWERED}"),
            unit=TOKENS,
        ),
        Panel(
            "Answers cut at max_tokens",
            "The part that ended with finish_reason=length.",
            _both(f"({rate('loradock_requests_total', _CUT)} or 0 * {_ANSWERED}) / {_ANSWERED}"),
            unit="percentunit",
            quiet=True,
        ),
        Panel(
            "Feedback",
            "Ratings a second, good and bad. They are a check of their own in the comparison.",
            _both("sum by (rating) (rate(loradock_feedback_total{%}[$__rate_interval]))"),
            unit="reqps",
            quiet=True,
        ),
    ]
