"""Each version's latency, errors and residency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.telemetry.rendered.dashboards.queries import (
    ADAPTER,
    CHOSEN,
    VERSION,
    Levels,
    counted,
    error_ratio,
    failures,
    limit,
    marks,
    quantile,
    rate,
)
from serve.telemetry.rendered.panels import TOKENS_PER_SECOND, Json, Panel, Query, Row, dashboard
from serve.telemetry.slo import Objective, Slo

EACH = "{{adapter}}@{{version}}"
BY = "adapter, version"


def board(slos: Sequence[Slo]) -> Json:
    first, between, errors = (limit(slos, objective) for objective in Objective)
    content: list[Panel | Row] = [
        *_versions(),
        *_latency_and_errors(first, between, errors),
        *_waiting(),
        *_tokens(),
        *_swaps(),
    ]
    says = "Each version's latency, errors and residency."
    return dashboard("adapters", "Adapters", says, content, [ADAPTER, VERSION], marks("$adapter"))


def _p95(title: str, says: str, metric: str, *, exemplars: bool = False, **more: Any) -> Panel:
    """The 95 % quantile of each version, in seconds."""
    return Panel(title, says, [Query(quantile(0.95, metric, CHOSEN, BY), EACH, exemplars=exemplars)], unit="s", **more)


def _versions() -> list[Panel | Row]:
    return [
        Row("Versions"),
        Panel(
            "Where the weights are",
            "slot: in the batch; host: in the engine's memory; disk: loaded when it is asked for; failed: it cannot be "
            "loaded, and its requests fail.",
            [
                Query(
                    f"max by (adapter, version) (loradock_adapter_state{{{CHOSEN},state='{state}'}} * {code} > 0)",
                    f"{EACH} {state}",
                )
                for code, state in enumerate(("disk", "host", "slot", "failed"), 1)
            ],
            kind="state-timeline",
            width=24,
            quiet=True,
            levels=((None, "text"), (1, "semi-dark-yellow"), (2, "semi-dark-blue"), (3, "green"), (4, "red")),
            mappings={
                "1": ("disk", "semi-dark-yellow"),
                "2": ("host", "semi-dark-blue"),
                "3": ("slot", "green"),
                "4": ("failed", "red"),
            },
            least=None,
        ),
        Panel(
            "Versions that are there",
            "Digest, rank and base of each version.",
            [Query(f"max by (adapter, version, digest, rank, base) (loradock_adapter_info{{{CHOSEN}}})", now=True)],
            kind="table",
            width=24,
            height=6,
        ),
    ]


def _latency_and_errors(first: Levels, between: Levels, errors: Levels) -> list[Panel | Row]:
    return [
        Row("Latency and errors"),
        Panel(
            "Requests",
            "Requests a second, by the version that answered.",
            [Query(rate("loradock_requests_total", CHOSEN, BY), EACH)],
            unit="reqps",
        ),
        Panel(
            "Errors",
            "The part that failed (5xx, overloaded, too late). A version that fails while others answer should be "
            "rolled back.",
            [Query(error_ratio(CHOSEN, BY), EACH)],
            unit="percentunit",
            quiet=True,
            levels=errors,
            line=True,
        ),
        _p95(
            "First token, p95",
            "From the request's arrival to its first bytes. High for one adapter: is it loaded from disk again and "
            "again? Pin it. High for all: the engine has a queue.",
            "time_to_first_token_seconds",
            exemplars=True,
            levels=first,
            line=True,
        ),
        _p95(
            "Between tokens, p95",
            "The mean distance of an answer's tokens. A higher rank costs here.",
            "inter_token_latency_seconds",
            levels=between,
            line=True,
        ),
    ]


def _waiting() -> list[Panel]:
    return [
        _p95(
            "Worst gap between tokens, p95",
            "The longest wait inside an answer: prefills of others, or an adapter being loaded.",
            "max_inter_token_latency_seconds",
        ),
        _p95(
            "Whole answer, p95",
            "From the request's arrival to its last byte.",
            "request_duration_seconds",
        ),
        _p95(
            "In the queue, p95",
            "How long a request waits in the server's own queue for its seat. Seconds: more comes in than the engine "
            "computes.",
            "queue_time_seconds",
        ),
        _p95(
            "In the engine's queue, p95",
            "How long a request that has its seat waits until the engine computes on it.",
            "engine_queue_seconds",
        ),
        Panel(
            "Failures by reason",
            "Requests a second that failed. overloaded, unavailable, queue_deadline: before the engine began; "
            "deadline, error: while it answered.",
            [Query(failures(CHOSEN, BY), EACH + " {{reason}}")],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Under way",
            "Requests that wait for their seat or are being answered.",
            [Query(f"sum by ({BY}) (loradock_requests_in_progress{{{CHOSEN}}})", EACH)],
            quiet=True,
        ),
    ]


def _tokens() -> list[Panel | Row]:
    return [
        Row("Tokens and endings"),
        Panel(
            "Generated tokens",
            "Tokens a second, by the version that said them.",
            [Query(rate("loradock_generation_tokens_total", CHOSEN, BY), EACH)],
            unit=TOKENS_PER_SECOND,
        ),
        Panel(
            "How answers end",
            "stop: as the model wanted; length: at max_tokens. More `length` after a swap: the version has forgotten "
            "to stop.",
            [
                Query(
                    rate("loradock_requests_total", CHOSEN, "adapter, version, finish_reason"),
                    EACH + " {{finish_reason}}",
                )
            ],
            unit="reqps",
        ),
    ]


def _swaps() -> list[Panel | Row]:
    return [
        Row("Swaps and slots"),
        Panel(
            "Swaps",
            "Changes of a live version in the last hour, by what became of them.",
            [
                Query(
                    counted("loradock_adapter_swaps_total", 'adapter=~"$adapter"', "1h", "adapter, result"),
                    "{{adapter}} {{result}}",
                )
            ],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Loading an adapter, p95",
            "From the call to a resident adapter, by where the weights came from.",
            [
                Query(
                    "histogram_quantile(0.95, sum by (le, tier) (rate(loradock_adapter_load_seconds_bucket[5m])))",
                    "{{tier}}",
                )
            ],
            unit="s",
            quiet=True,
        ),
        Panel(
            "Adapters in the engine",
            "How many versions are in a slot, in the engine's memory, or on disk alone. All slots taken and loads "
            "rising: raise max_loras or max_cpu_loras.",
            [Query("sum by (state) (loradock_adapter_state)", "{{state}}")],
            width=24,
        ),
    ]
