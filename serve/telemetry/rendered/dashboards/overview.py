"""Is it healthy, and how much of the error budget is left?"""

from __future__ import annotations

from collections.abc import Sequence

from serve.telemetry.rendered.dashboards.queries import (
    ADAPTER,
    BUDGET,
    INTERVAL,
    Levels,
    error_ratio,
    failures,
    figure,
    limit,
    marks,
    quantile,
    quantiles,
    rate,
    ratio,
)
from serve.telemetry.rendered.panels import TOKENS_PER_SECOND, Json, Panel, Query, Row, dashboard
from serve.telemetry.rendered.rules import BUDGET_LEFT, burn
from serve.telemetry.slo import Objective, Slo


def board(slos: Sequence[Slo]) -> Json:
    first, between, errors = (limit(slos, objective) for objective in Objective)
    content: list[Panel | Row] = [
        *_figures(first, errors),
        *_objectives(),
        *_traffic(errors),
        *_overload(),
        *_answers(first, between),
        *_watching(),
    ]
    says = "Is it healthy, and how much of the error budget is left."
    return dashboard("overview", "Overview", says, content, [ADAPTER], marks("$adapter"))


def _figures(first: Levels, errors: Levels) -> list[Panel]:
    return [
        figure(
            "Server",
            "Whether Prometheus can scrape it. If not: does the process live, is the scrape key right?",
            [Query('min(up{job="loradock"})', now=True)],
            levels=((None, "red"), (1, "green")),
            mappings={"0": ("down", "red"), "1": ("up", "green")},
        ),
        figure(
            "Engine",
            "Whether the engine answers. If not for over two minutes: the server's log says why.",
            [Query('min(max by (model) (loradock_engine_phase{phase="ready"}))', now=True)],
            levels=((None, "red"), (1, "green")),
            mappings={"0": ("not ready", "red"), "1": ("ready", "green")},
        ),
        figure(
            "Alerts",
            "Alerts that fire now; the table below says which, and each what to do.",
            [Query('count(ALERTS{alertstate="firing"}) or vector(0)', now=True)],
            levels=((None, "green"), (1, "red")),
            quiet=True,
        ),
        figure(
            "Requests",
            "Requests a second, all adapters and the base.",
            [Query(rate("loradock_requests_total", ""))],
            unit="reqps",
        ),
        figure(
            "Errors",
            "The part of requests that the server failed: 5xx, refused because it is overloaded (429), or too late for "
            "the client's deadline. Red: above the error budget.",
            [Query(error_ratio())],
            unit="percentunit",
            levels=errors,
            quiet=True,
            decimals=2,
        ),
        figure(
            "First token, p95",
            "95 % of the answers begin within this time. Red: above the SLO.",
            [Query(quantile(0.95, "time_to_first_token_seconds"))],
            unit="s",
            levels=first,
        ),
    ]


def _objectives() -> list[Panel | Row]:
    return [
        Row("Service level objectives"),
        Panel(
            "Error budget left, 30 days",
            "What is left of each adapter's budget. Below half: look at what burns it. Below zero: more than the "
            "budget is gone (-100 %: twice of it); change nothing else until it recovers.",
            [Query(f"sort({BUDGET_LEFT})", "{{adapter}} {{slo}}", now=True)],
            unit="percentunit",
            kind="bargauge",
            levels=BUDGET,
            least=None,
            most=1,
        ),
        Panel(
            "Burn rate, 1 hour",
            "How many times faster than sustainable the budget burns. At 14.4 somebody is paged, at 6 too if it lasts.",
            [Query(burn("1h"), "{{adapter}} {{slo}}")],
            quiet=True,
            levels=((None, "green"), (1, "orange"), (14.4, "red")),
            line=True,
        ),
    ]


def _traffic(errors: Levels) -> list[Panel | Row]:
    return [
        Row("Traffic"),
        Panel(
            "Requests by adapter",
            "Requests a second. `other`: what named no model, was over its key's limits, or has no series of its own.",
            [Query(rate("loradock_requests_total", 'adapter=~"$adapter"', "adapter"), "{{adapter}}")],
            unit="reqps",
        ),
        Panel(
            "Errors by adapter",
            "The part that failed (5xx, overloaded, too late). One adapter alone: look at its versions. All of them: "
            "look at the engine.",
            [Query(error_ratio('adapter=~"$adapter"', "adapter"), "{{adapter}}")],
            unit="percentunit",
            quiet=True,
            levels=errors,
            line=True,
        ),
    ]


def _overload() -> list[Panel]:
    return [
        Panel(
            "Waiting for a seat",
            "Requests in the server's own queue, by adapter. More than a few for minutes: more comes in than the "
            "engine computes; the Engine dashboard says whose they are.",
            [Query('sum by (adapter) (loradock_queue_waiting{adapter=~"$adapter|other"})', "{{adapter}}")],
            quiet=True,
        ),
        Panel(
            "Failures by reason",
            "Requests a second that the server failed. overloaded: refused (429); queue_deadline, deadline: too late "
            "for the client, before and after the engine began; unavailable: no engine (503); error: any other 5xx.",
            [Query(failures('adapter=~"$adapter"', "adapter"), "{{adapter}} {{reason}}")],
            unit="reqps",
            quiet=True,
        ),
    ]


def _answers(first: Levels, between: Levels) -> list[Panel]:
    return [
        Panel(
            "First token",
            "From a request's arrival to its first token, with the time in the queue. The red line is the SLO of every "
            "adapter.",
            quantiles("time_to_first_token_seconds", 'adapter=~"$adapter"', exemplars=True),
            unit="s",
            levels=first,
            line=True,
        ),
        Panel(
            "Between tokens",
            "From one token of an answer to the next, on average over the answer. The red line is the SLO.",
            quantiles("inter_token_latency_seconds", 'adapter=~"$adapter"'),
            unit="s",
            levels=between,
            line=True,
        ),
        Panel(
            "Tokens",
            "Tokens a second, in and out.",
            [
                Query(rate("loradock_prompt_tokens_total", 'adapter=~"$adapter"'), "prompt"),
                Query(rate("loradock_generation_tokens_total", 'adapter=~"$adapter"'), "generated"),
            ],
            unit=TOKENS_PER_SECOND,
        ),
        Panel(
            "Firing alerts",
            "What to do stands in each alert's description (Prometheus, Alerts).",
            [
                Query(
                    'sum by (alertname, severity, adapter, version, tenant, cause, slo) (ALERTS{alertstate="firing"})',
                    now=True,
                )
            ],
            kind="table",
            quiet=True,
        ),
    ]


def _watching() -> list[Panel | Row]:
    return [
        Row("The watching itself"),
        Panel(
            "Cost of watching",
            "Time that one request costs: on the event loop (tap), and in the worker (watcher). Above 300 us the "
            "watcher takes more than it may.",
            [
                Query(
                    ratio("loradock_tap_seconds_sum", "loradock_tap_seconds_count"),
                    "tap",
                ),
                Query(quantile(0.99, "tap_seconds"), "tap, p99"),
                Query(
                    ratio("loradock_watcher_seconds_total", "loradock_watcher_requests_total"),
                    "watcher",
                ),
            ],
            unit="s",
            levels=((None, "green"), (0.0003, "red")),
            line=True,
        ),
        Panel(
            "Exchanges that were not looked at",
            "Dropped because a worker was behind; answers are not touched. watcher: drift and latency have gaps. "
            "capture: not kept to learn from. data_quality: not looked at for what is wrong with them.",
            [
                Query(f"sum(rate(loradock_tap_dropped_total{INTERVAL}))", "watcher"),
                Query(f"sum by (worker) (rate(loradock_exchanges_dropped_total{INTERVAL}))", "{{worker}}"),
            ],
            unit="reqps",
            quiet=True,
        ),
    ]
