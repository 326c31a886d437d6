"""The five dashboards: is it healthy, which adapter, has it drifted, is the new version better, is the engine full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.telemetry.rendered.panels import Annotation, Json, Panel, Query, Row, Variable, dashboard
from serve.telemetry.rendered.rules import BUDGET_LEFT, COUNTED, FAILED, burn, changed
from serve.telemetry.slo import EVERY, Objective, Slo

_I = "[$__rate_interval]"
_CHOSEN = 'adapter=~"$adapter",version=~"$version"'
_ADAPTER = Variable("adapter", "Adapter", "label_values(loradock_requests_total, adapter)")
_VERSION = Variable("version", "Version", 'label_values(loradock_requests_total{adapter=~"$adapter"}, version)')
_ENGINE = Variable("model", "Base model", "label_values(loradock_engine_phase, model)")

_LATE: Sequence[tuple[float | None, str]] = ((None, "green"), (0.5, "orange"), (1, "red"))
_BUDGET: Sequence[tuple[float | None, str]] = ((None, "red"), (0.1, "orange"), (0.5, "green"))


def dashboards(slos: Sequence[Slo]) -> list[Json]:
    """Every dashboard, as Grafana's JSON; the SLOs give some panels their red lines."""
    return [_overview(slos), _adapters(slos), _drift(), _swap(), _engine()]


def _marks(adapter: str) -> list[Annotation]:
    which = f'adapter=~"{adapter}"'
    swaps = f"sum by (adapter, result) (loradock_adapter_swaps_total{{{which}}})"
    rollbacks = f"sum by (adapter, version, reason) (loradock_rollbacks_total{{{which}}})"
    return [
        Annotation("Swaps", changed(swaps, "2m"), "{{adapter}} {{result}}", "blue"),
        Annotation("Rollbacks", changed(rollbacks, "2m"), "{{adapter}}@{{version}} rolled back: {{reason}}", "red"),
    ]


def _rate(metric: str, labels: str, by: str = "") -> str:
    summed = f"sum by ({by})" if by else "sum"
    return f"{summed} (rate({metric}{{{labels}}}{_I}))"


def _quantile(q: float, metric: str, labels: str = "", by: str = "") -> str:
    le = f"le, {by}" if by else "le"
    return f"histogram_quantile({q:g}, sum by ({le}) (rate(loradock_{metric}_bucket{{{labels}}}{_I})))"


def _error_ratio(labels: str = "", by: str = "") -> str:
    """0 where nothing failed and no series says so."""
    more = f",{labels}" if labels else ""
    failed = _rate("loradock_requests_total", FAILED + more, by)
    counted = _rate("loradock_requests_total", COUNTED + more, by)
    return f"({failed} or 0 * {counted}) / {counted}"


def _figure(title: str, says: str, queries: Sequence[Query], **more: Any) -> Panel:
    """One large number."""
    return Panel(title, says, queries, kind="stat", width=4, height=4, **more)


def _limit(slos: Sequence[Slo], objective: Objective) -> Sequence[tuple[float | None, str]]:
    """Green below what the SLO of every adapter allows, red above."""
    for slo in slos:
        if slo.adapter == EVERY and slo.objective is objective and slo.target:
            return ((None, "green"), (slo.threshold or slo.budget, "red"))
    return ((None, "green"),)


def _overview(slos: Sequence[Slo]) -> Json:
    first, between, errors = (_limit(slos, one) for one in Objective)
    content: list[Panel | Row] = [
        _figure(
            "Server",
            "Whether Prometheus can scrape it. If not: does the process live, is the scrape key right?",
            [Query('min(up{job="loradock"})', now=True)],
            levels=((None, "red"), (1, "green")),
            mappings={"0": ("down", "red"), "1": ("up", "green")},
        ),
        _figure(
            "Engine",
            "Whether the engine answers. If not for over two minutes: the server's log says why.",
            [Query('min(max by (model) (loradock_engine_phase{phase="ready"}))', now=True)],
            levels=((None, "red"), (1, "green")),
            mappings={"0": ("not ready", "red"), "1": ("ready", "green")},
        ),
        _figure(
            "Alerts",
            "Alerts that fire now; the table below says which, and each what to do.",
            [Query('count(ALERTS{alertstate="firing"}) or vector(0)', now=True)],
            levels=((None, "green"), (1, "red")),
            quiet=True,
        ),
        _figure(
            "Requests",
            "Requests a second, all adapters and the base.",
            [Query(_rate("loradock_requests_total", ""))],
            unit="reqps",
        ),
        _figure(
            "Errors",
            "The part of requests that failed by the server's fault (5xx). Red: above the error budget.",
            [Query(_error_ratio())],
            unit="percentunit",
            levels=errors,
            quiet=True,
            decimals=2,
        ),
        _figure(
            "First token, p95",
            "95 % of the answers begin within this time. Red: above the SLO.",
            [Query(_quantile(0.95, "time_to_first_token_seconds"))],
            unit="s",
            levels=first,
        ),
        Row("Service level objectives"),
        Panel(
            "Error budget left, 30 days",
            "What is left of each adapter's budget. Below half: look at what burns it. At zero: change nothing else "
            "until it recovers.",
            [Query(f"sort({BUDGET_LEFT})", "{{adapter}} {{slo}}", now=True)],
            unit="percentunit",
            kind="bargauge",
            levels=_BUDGET,
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
        Row("Traffic"),
        Panel(
            "Requests by adapter",
            "Requests a second. `base` is the model without an adapter, `other` what matched none.",
            [Query(_rate("loradock_requests_total", 'adapter=~"$adapter"', "adapter"), "{{adapter}}")],
            unit="reqps",
        ),
        Panel(
            "Errors by adapter",
            "The part that failed (5xx). One adapter alone: look at its versions. All of them: look at the engine.",
            [Query(_error_ratio('adapter=~"$adapter"', "adapter"), "{{adapter}}")],
            unit="percentunit",
            quiet=True,
            levels=errors,
            line=True,
        ),
        Panel(
            "First token",
            "From a request's arrival to its first bytes. The red line is the SLO of every adapter.",
            [
                Query(
                    _quantile(q, "time_to_first_token_seconds", 'adapter=~"$adapter"'),
                    f"p{q * 100:g}",
                    exemplars=q == 0.95,
                )
                for q in (0.5, 0.95, 0.99)
            ],
            unit="s",
            levels=first,
            line=True,
        ),
        Panel(
            "Between tokens",
            "From one token of an answer to the next, on average over the answer. The red line is the SLO.",
            [
                Query(_quantile(q, "inter_token_latency_seconds", 'adapter=~"$adapter"'), f"p{q * 100:g}")
                for q in (0.5, 0.95, 0.99)
            ],
            unit="s",
            levels=between,
            line=True,
        ),
        Panel(
            "Tokens",
            "Tokens a second, in and out.",
            [
                Query(_rate("loradock_prompt_tokens_total", 'adapter=~"$adapter"'), "prompt"),
                Query(_rate("loradock_generation_tokens_total", 'adapter=~"$adapter"'), "generated"),
            ],
            unit="short",
        ),
        Panel(
            "Firing alerts",
            "What to do stands in each alert's description (Prometheus, Alerts).",
            [
                Query(
                    'sum by (alertname, severity, adapter, version, slo) (ALERTS{alertstate="firing"})',
                    now=True,
                )
            ],
            kind="table",
            quiet=True,
        ),
        Row("The watching itself"),
        Panel(
            "Cost of watching",
            "Time that one request costs: on the event loop (tap), and in the worker (watcher). Above 300 us the "
            "watcher takes more than it may.",
            [
                Query(f"sum(rate(loradock_tap_seconds_sum{_I})) / sum(rate(loradock_tap_seconds_count{_I}))", "tap"),
                Query(_quantile(0.99, "tap_seconds"), "tap, p99"),
                Query(
                    f"sum(rate(loradock_watcher_seconds_total{_I})) / sum(rate(loradock_watcher_requests_total{_I}))",
                    "watcher",
                ),
            ],
            unit="s",
            levels=((None, "green"), (0.0003, "red")),
            line=True,
        ),
        Panel(
            "Exchanges that were not looked at",
            "Dropped because the worker was behind. Answers are not touched; drift and latency have gaps.",
            [Query(f"sum(rate(loradock_tap_dropped_total{_I}))", "dropped")],
            unit="reqps",
            quiet=True,
        ),
    ]
    says = "Is it healthy, and how much of the error budget is left."
    return dashboard("overview", "Overview", says, content, [_ADAPTER], _marks("$adapter"))


def _adapters(slos: Sequence[Slo]) -> Json:
    first, between, errors = (_limit(slos, one) for one in Objective)
    each = "{{adapter}}@{{version}}"
    by = "adapter, version"
    content: list[Panel | Row] = [
        Row("Versions"),
        Panel(
            "Where the weights are",
            "slot: in the batch; host: in the engine's memory; disk: loaded when it is asked for; failed: it cannot be "
            "loaded, and its requests fail.",
            [
                Query(
                    f"max by (adapter, version) (loradock_adapter_state{{{_CHOSEN},state='{state}'}} * {code} > 0)",
                    f"{each} {state}",
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
            [Query(f"max by (adapter, version, digest, rank, base) (loradock_adapter_info{{{_CHOSEN}}})", now=True)],
            kind="table",
            width=24,
            height=6,
        ),
        Row("Latency and errors"),
        Panel(
            "Requests",
            "Requests a second, by the version that answered.",
            [Query(_rate("loradock_requests_total", _CHOSEN, by), each)],
            unit="reqps",
        ),
        Panel(
            "Errors",
            "The part that failed (5xx). A version that fails while others answer should be rolled back.",
            [Query(_error_ratio(_CHOSEN, by), each)],
            unit="percentunit",
            quiet=True,
            levels=errors,
            line=True,
        ),
        Panel(
            "First token, p95",
            "From the request's arrival to its first bytes. High for one adapter: is it loaded from disk again and "
            "again? Pin it. High for all: the engine has a queue.",
            [Query(_quantile(0.95, "time_to_first_token_seconds", _CHOSEN, by), each, exemplars=True)],
            unit="s",
            levels=first,
            line=True,
        ),
        Panel(
            "Between tokens, p95",
            "The mean distance of an answer's tokens. A higher rank costs here.",
            [Query(_quantile(0.95, "inter_token_latency_seconds", _CHOSEN, by), each)],
            unit="s",
            levels=between,
            line=True,
        ),
        Panel(
            "Worst gap between tokens, p95",
            "The longest wait inside an answer: prefills of others, or an adapter being loaded.",
            [Query(_quantile(0.95, "max_inter_token_latency_seconds", _CHOSEN, by), each)],
            unit="s",
        ),
        Panel(
            "Whole answer, p95",
            "From the request's arrival to its last byte.",
            [Query(_quantile(0.95, "request_duration_seconds", _CHOSEN, by), each)],
            unit="s",
        ),
        Panel(
            "In the queue, p95",
            "How long a request waits before the engine begins with it.",
            [Query(_quantile(0.95, "queue_time_seconds", _CHOSEN, by), each)],
            unit="s",
        ),
        Panel(
            "Under way",
            "Answers that have begun and not ended.",
            [Query(f"sum by ({by}) (loradock_requests_in_progress{{{_CHOSEN}}})", each)],
            quiet=True,
        ),
        Row("Tokens and endings"),
        Panel(
            "Generated tokens",
            "Tokens a second, by the version that said them.",
            [Query(_rate("loradock_generation_tokens_total", _CHOSEN, by), each)],
        ),
        Panel(
            "How answers end",
            "stop: as the model wanted; length: at max_tokens. More `length` after a swap: the version has forgotten "
            "to stop.",
            [
                Query(
                    _rate("loradock_requests_total", _CHOSEN, "adapter, version, finish_reason"),
                    each + " {{finish_reason}}",
                )
            ],
            unit="reqps",
        ),
        Row("Swaps and slots"),
        Panel(
            "Swaps",
            "Changes of a live version, by what became of them.",
            [
                Query(
                    'sum by (adapter, result) (increase(loradock_adapter_swaps_total{adapter=~"$adapter"}[1h]))',
                    "{{adapter}} {{result}}",
                )
            ],
            quiet=True,
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
    says = "Each version's latency, errors and residency."
    return dashboard("adapters", "Adapters", says, content, [_ADAPTER, _VERSION], _marks("$adapter"))


def _drift() -> Json:
    each = "{{adapter}}@{{version}} {{signal}}"
    by = "adapter, version, signal"
    evidence = f"max by ({by}) (loradock_drift_log_evidence{{{_CHOSEN}}})"
    threshold = f"max by ({by}) (loradock_drift_threshold_log_evidence{{{_CHOSEN}}})"
    content: list[Panel | Row] = [
        Panel(
            "Evidence, as a part of the threshold",
            "At 1 the evidence is what a quiet stream reaches once in 100,000 requests; an alarm needs an effect as "
            "well. Half way is nothing yet: evidence wanders.",
            [Query(f"sort_desc({evidence} / {threshold})", each, now=True)],
            unit="percentunit",
            kind="bargauge",
            levels=_LATE,
            quiet=True,
            most=1,
            width=24,
        ),
        Panel(
            "Evidence over time",
            "The logarithm of the evidence. The level is the threshold; rising steadily is drift, up and down is not.",
            [Query(evidence, each), Query(f"max({threshold})", "threshold")],
            quiet=True,
            least=None,
        ),
        Panel(
            "Effect",
            "How far each statistic has moved: change of the mean log-probability in nats, shift of rank, refusals as "
            "a part, probe as a multiple of its noise. Evidence without an effect is no alarm.",
            [Query(f"max by ({by}, stat) (loradock_drift_effect{{{_CHOSEN}}})", each + " {{stat}}")],
            quiet=True,
            least=None,
        ),
        Panel(
            "What moved most",
            "The statistics by the size of their effect, largest first. GET /v1/adapters/NAME/drift says since when.",
            [Query(f"topk(20, abs(max by ({by}, stat) (loradock_drift_effect{{{_CHOSEN}}})))", now=True)],
            kind="table",
            quiet=True,
        ),
        Panel(
            "Samples",
            "Requests a second that the detectors took, after thinning: repeated prompts and one conversation's many "
            "turns count once. None in spite of traffic: every prompt is the same.",
            [Query(f"sum by ({by}) (rate(loradock_drift_samples_total{{{_CHOSEN}}}{_I}))", each)],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Reference",
            "Requests in each baseline. Small ones make the detector slow, never wrong.",
            [Query(f"max by ({by}) (loradock_drift_reference_requests{{{_CHOSEN}}})", each)],
            quiet=True,
        ),
        Panel(
            "Alarms",
            "Alarms in the last day. Prompt: the users ask other things. Output or probe: the version answers "
            "differently; roll it back, or build a new baseline if that was intended.",
            [Query(f"sum by ({by}) (increase(loradock_drift_alarms_total{{{_CHOSEN}}}[1d]))", each)],
            quiet=True,
            levels=((None, "green"), (1, "red")),
        ),
    ]
    says = "Whether an adapter version still gets and gives what it was approved with."
    return dashboard("drift", "Drift", says, content, [_ADAPTER, _VERSION], _marks("$adapter"))


def _swap() -> Json:
    one = Variable("adapter", "Adapter", 'label_values(loradock_requests_total{version!=""}, adapter)', many=False)
    versions = 'label_values(loradock_requests_total{adapter="$adapter"}, version)'
    old, new = (
        Variable("old", "Old version", versions, many=False),
        Variable("new", "New version", versions, many=False),
    )
    sides = (("old", "$old"), ("new", "$new"))
    answered, cut = _rate("loradock_requests_total", '%,code=~"2.."'), '%,finish_reason="length"'

    def both(expr: str) -> list[Query]:
        """`expr` once a side, % standing for its labels."""
        return [
            Query(
                expr.replace("%", f'adapter="$adapter",version="{version}"'),
                f"{side} ({version})" + (" {{rating}}" if "rating" in expr else ""),
            )
            for side, version in sides
        ]

    content: list[Panel | Row] = [
        Panel(
            "Verdict: evidence against the new version",
            "The logarithm of the evidence in each check of the running comparison. The comparison ends at "
            "log(1/alpha), 4.6 for 1 %: then the new version is worse, and the policy says what happens.",
            [
                Query(
                    'max by (version, check) (loradock_swap_log_evidence{adapter="$adapter"})',
                    "{{version}} {{check}}",
                )
            ],
            quiet=True,
            least=None,
            levels=((None, "green"), (4.6, "red")),
            line=True,
        ),
        Panel(
            "Rolled back",
            "Versions that the server took the traffic from in the last day, and why; the evidence is in the history.",
            [
                Query(
                    'sum by (version, reason) (increase(loradock_rollbacks_total{adapter="$adapter"}[1d]))',
                    "{{version}} {{reason}}",
                )
            ],
            quiet=True,
        ),
        Row("Side by side"),
        Panel(
            "Requests",
            "How the traffic is shared. The new version needs some 200 requests for a clear answer.",
            both(_rate("loradock_requests_total", "%")),
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Errors",
            "The part that failed (5xx).",
            both(_error_ratio("%")),
            unit="percentunit",
            quiet=True,
        ),
        Panel(
            "First token, p50",
            "Compare at the same time only: before and after differ by the hour already.",
            both(_quantile(0.5, "time_to_first_token_seconds", "%")),
            unit="s",
        ),
        Panel(
            "First token, p95",
            "Compare at the same time only.",
            both(_quantile(0.95, "time_to_first_token_seconds", "%")),
            unit="s",
        ),
        Panel(
            "Between tokens, p50",
            "A larger rank shows here first.",
            both(_quantile(0.5, "inter_token_latency_seconds", "%")),
            unit="s",
        ),
        Panel(
            "Between tokens, p95",
            "A larger rank shows here first.",
            both(_quantile(0.95, "inter_token_latency_seconds", "%")),
            unit="s",
        ),
        Panel(
            "Tokens of an answer",
            "Mean length. A version that talks twice as long costs twice as much, and may have forgotten to stop.",
            both(f"{_rate('loradock_generation_tokens_total', '%')} / {answered}"),
        ),
        Panel(
            "Answers cut at max_tokens",
            "The part that ended with finish_reason=length.",
            both(f"({_rate('loradock_requests_total', cut)} or 0 * {answered}) / {answered}"),
            unit="percentunit",
            quiet=True,
        ),
        Panel(
            "Feedback",
            "Ratings a second, good and bad. They are a check of their own in the comparison.",
            both("sum by (rating) (rate(loradock_feedback_total{%}[$__rate_interval]))"),
            unit="reqps",
            quiet=True,
        ),
    ]
    says = "The new version beside the old one, at the same time."
    return dashboard("swap", "Swap", says, content, [one, old, new], _marks("$adapter"))


def _engine() -> Json:
    content: list[Panel | Row] = [
        Panel(
            "KV cache",
            "The part that is in use. Above 90 % requests wait or are preempted: give it more memory, or shorten "
            "max_model_len.",
            [Query("max by (model_name, engine) (vllm:kv_cache_usage_perc)", "{{model_name}} {{engine}}")],
            unit="percentunit",
            quiet=True,
            levels=((None, "green"), (0.9, "red")),
            line=True,
            most=1,
        ),
        Panel(
            "Batch and queue",
            "Requests that are computed, and those that wait. Waiting for long: more comes in than one engine does.",
            [
                Query("sum(vllm:num_requests_running)", "running"),
                Query("sum(vllm:num_requests_waiting)", "waiting"),
            ],
            quiet=True,
        ),
        Panel(
            "Time in the queue",
            "Before the engine begins with a request.",
            [Query(_quantile(q, "queue_time_seconds"), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)],
            unit="s",
            levels=((None, "green"), (5, "red")),
        ),
        Panel(
            "Prefix cache",
            "The part of prompt tokens that were there already. Each adapter version and each tenant has its own part, "
            "so a swap begins at zero.",
            [
                Query(
                    f"sum(rate(vllm:prefix_cache_hits_total{_I})) / sum(rate(vllm:prefix_cache_queries_total{_I}))",
                    "hits",
                )
            ],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
        Panel(
            "Preemptions",
            "Requests thrown out of the batch for want of KV cache, and computed again.",
            [Query(f"sum(rate(vllm:num_preemptions_total{_I}))", "preemptions")],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Tokens",
            "Tokens a second through the engine.",
            [
                Query(f"sum(rate(vllm:prompt_tokens_total{_I}))", "prompt"),
                Query(f"sum(rate(vllm:generation_tokens_total{_I}))", "generated"),
            ],
        ),
        Panel(
            "Tokens of a step",
            "How full the batch is: tokens that one step of the engine computes.",
            [
                Query(
                    f"sum(rate(vllm:iteration_tokens_total_sum{_I})) "
                    f"/ sum(rate(vllm:iteration_tokens_total_count{_I}))",
                    "mean",
                )
            ],
        ),
        Panel(
            "Memory",
            "Of the engine's processes. Rising for hours: restart it before the machine does.",
            [Query('max by (model) (loradock_engine_memory_bytes{model=~"$model"})', "{{model}}")],
            unit="bytes",
        ),
        Panel(
            "Restarts",
            "Engines started anew after a death, in the last hour. Once may happen; the log says why.",
            [Query('sum by (model) (increase(loradock_engine_restarts_total{model=~"$model"}[1h]))', "{{model}}")],
            quiet=True,
            levels=((None, "green"), (1, "red")),
        ),
        Panel(
            "Phase",
            "What the engine is doing, if not answering.",
            [Query('max by (model, phase) (loradock_engine_phase{model=~"$model"}) > 0', "{{model}} {{phase}}")],
            kind="state-timeline",
            width=24,
            mappings={"1": ("here", "green")},
            least=None,
        ),
    ]
    return dashboard("engine", "Engine", "Whether the engine has room.", content, [_ENGINE], _marks(".*"))
