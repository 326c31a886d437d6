"""Recording and alerting rules for Prometheus.

Burn rates follow Google's SRE workbook ("Alerting on SLOs", multi-window, multi-burn-rate): a burn rate of 1 uses up
the error budget of 30 days in 30 days. A long window says that it matters, a short one that it still goes on, and a
minimum of requests that it is no accident of two requests at night.

What the server refuses because it is overloaded (429), cannot begin (503) or answers too late for the client's deadline
counts as failed, by the adapter that was asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.utils import floatToGoString

from serve.telemetry.rendered.alerts import PAGE, TICKET, Rule, alert, changed, grown
from serve.telemetry.rendered.batch_rules import batches, guards
from serve.telemetry.slo import EVERY, Slo, exempt

# 499 is a client that left, and other 4xx are its own mistakes: neither counts for or against the server. The 429 of an
# overloaded server does, but not that of a key which asks more than it may; so it comes from another counter.
COUNTED = 'code!~"4.."'
OVERLOADED = 'reason="overloaded"'
# What may be the version's own fault: what failed before the engine began is not.
OWN_FAILURES = 'reason=~"deadline|error"'
# Seconds in the queue, or refused requests in a minute, from which on somebody is told.
QUEUE_SECONDS, REFUSED = 5, 5
# A version may fail by itself, or with everything else; only the first is a reason to go back.
FAILING, OTHERS_FAILING = 0.2, 0.05
ENOUGH = 20
# The live version's golden score fell when it lost more than this part of 1 within a day.
SCORE_FELL = 0.05
# Failed attempts within half an hour from which on a golden set is said not to run; it is tried every 30 s.
GOLDEN_FAILURES = 10


@dataclass(frozen=True, slots=True)
class Burn:
    """One alert: `rate` times too fast over both windows, with at least `requests` in the long one."""

    name: str
    rate: float
    long: str
    short: str
    requests: int
    severity: str
    gone: str


BURNS = (
    Burn("LoradockBudgetBurnsFast", 14.4, "1h", "5m", 30, PAGE, "2 % of the budget of 30 days went in one hour"),
    Burn("LoradockBudgetBurns", 6, "6h", "30m", 50, PAGE, "5 % of the budget of 30 days went in six hours"),
    Burn("LoradockBudgetBurnsSlowly", 1, "3d", "6h", 100, TICKET, "the budget of 30 days will not last 30 days"),
)
WINDOWS = ("5m", "30m", "1h", "6h")
LONG_WINDOW = "3d"


def burn(window: str) -> str:
    """The series that says how fast the budget burns."""
    return f"adapter_slo:loradock_burn:rate{window}"


def events(window: str) -> str:
    """The series that counts what was judged."""
    return f"adapter_slo:loradock_events:increase{window}"


BUDGET_LEFT = "adapter_slo:loradock_budget_left:ratio30d"
_EVENTS, _BAD = "adapter_slo:loradock_events:rate5m", "adapter_slo:loradock_bad:rate5m"


def groups(slos: Sequence[Slo]) -> list[dict[str, Any]]:
    """All rule groups, as Prometheus takes them."""
    with_target = [slo for slo in slos if slo.target]
    short = [rule for slo in with_target for window in WINDOWS for rule in _burns(slo, slos, window)]
    long = [rule for slo in with_target for rule in (*_burns(slo, slos, LONG_WINDOW), *_left(slo, slos))]
    return [
        {
            "name": "loradock-slo",
            "interval": "30s",
            "rules": [*(r for slo in with_target for r in _rates(slo, slos)), *short],
        },
        {"name": "loradock-slo-long", "interval": "2m", "rules": long},
        {"name": "loradock-slo-alerts", "rules": [*map(_burning, BURNS), *_stale(slos)]},
        {"name": "loradock-adapters", "rules": list(_adapters())},
        {"name": "loradock-golden", "rules": list(_golden())},
        # Often enough that an overload is told within a minute.
        {"name": "loradock-queue", "interval": "5s", "rules": [_queue()]},
        {"name": "loradock-server", "rules": [*_server(), *_upkeep()]},
        {"name": "loradock-batches", "rules": [*batches(), *guards()]},
    ]


def of(slo: Slo, slos: Sequence[Slo]) -> str:
    """The label matcher of the adapters that an SLO is about."""
    if slo.adapter != EVERY:
        return f'adapter="{slo.adapter}"'
    others = exempt(slos, slo.objective)
    return "adapter!~" + json.dumps("|".join(map(re.escape, others))) if others else 'adapter!=""'


def judged(function: str, window: str, labels: str = "", by: str = "") -> str:
    """What was answered or failed: a function of a counter, as rate, by labels."""
    summed = f"sum by ({by})" if by else "sum"
    more = f"{labels}," if labels else ""
    answered = f"{summed} ({function}(loradock_requests_total{{{more}{COUNTED}}}{window}))"
    refused = f"{summed} ({function}(loradock_requests_failed_total{{{more}{OVERLOADED}}}{window}))"
    return f"({answered} + {refused})"


def failed(function: str, window: str, labels: str = "", by: str = "") -> str:
    """The part of `judged` that failed."""
    summed = f"sum by ({by})" if by else "sum"
    return f"{summed} ({function}(loradock_requests_failed_total{{{labels}}}{window}))"


def _all(slo: Slo, slos: Sequence[Slo], function: str, window: str) -> str:
    who = of(slo, slos)
    if slo.threshold is None:
        return judged(function, f"[{window}]", who, "adapter")
    return f"sum by (adapter) ({function}({_histogram(slo)}_count{{{who}}}[{window}]))"


def _bad(slo: Slo, slos: Sequence[Slo], window: str) -> str:
    who = of(slo, slos)
    if slo.threshold is None:
        return failed("rate", f"[{window}]", who, "adapter")
    le = floatToGoString(slo.threshold)
    good = f'sum by (adapter) (rate({_histogram(slo)}_bucket{{{who},le="{le}"}}[{window}]))'
    return f"({_all(slo, slos, 'rate', window)} - {good})"


def _histogram(slo: Slo) -> str:
    return f"loradock_{slo.objective}_seconds"


def _rates(slo: Slo, slos: Sequence[Slo]) -> Iterator[Rule]:
    labels = _labels(slo)
    yield {"record": _EVENTS, "expr": _all(slo, slos, "rate", "5m"), "labels": labels}
    yield {"record": _BAD, "expr": _bad(slo, slos, "5m"), "labels": labels}


def _burns(slo: Slo, slos: Sequence[Slo], window: str) -> Iterator[Rule]:
    every = _all(slo, slos, "rate", window)
    bad = _bad(slo, slos, window)
    labels = _labels(slo)
    yield {"record": burn(window), "expr": f"{bad} / {every} / {slo.budget:g}", "labels": labels}
    if window in {burn_rate.long for burn_rate in BURNS}:
        yield {"record": events(window), "expr": _all(slo, slos, "increase", window), "labels": labels}


def _left(slo: Slo, slos: Sequence[Slo]) -> Iterator[Rule]:
    which = f'{{{of(slo, slos)},slo="{slo.objective}"}}'
    lost = f"sum_over_time({_BAD}{which}[30d]) / (sum_over_time({_EVENTS}{which}[30d]) > 0)"
    yield {"record": BUDGET_LEFT, "expr": f"1 - {lost} / {slo.budget:g}", "labels": _labels(slo)}


def _labels(slo: Slo) -> dict[str, str]:
    return {"slo": slo.objective.value}


def _burning(one: Burn) -> Rule:
    return alert(
        one.name,
        f"({burn(one.long)} > {one.rate:g} and {burn(one.short)} > {one.rate:g}) "
        f"and {events(one.long)} >= {one.requests}",
        one.severity,
        '{{ $labels.adapter }}: {{ $labels.slo }} burns its budget {{ $value | printf "%.1f" }} times too fast',
        f"{one.gone[0].upper()}{one.gone[1:]}. Look at the adapter's versions on the Adapters dashboard: if one of "
        "them alone is slow or fails, roll it back (loradock adapters rollback NAME); if all are slow, look at the "
        "Engine dashboard for a queue or a full KV cache, and give the engine less traffic or more room.",
        dashboard="loradock-adapters",
    )


def _stale(slos: Sequence[Slo]) -> Iterator[Rule]:
    """The server was given other objectives than these rules were written from."""
    rendered = " or ".join(
        f'label_replace(label_replace(vector({slo.target:g}), "slo", "{slo.objective}", "", ""), '
        f'"adapter", "{slo.adapter}", "", "")'
        for slo in slos
    )
    target = "max by (adapter, slo) (loradock_slo_target)"
    yield alert(
        "LoradockRulesStale",
        f"({target} != on (adapter, slo) ({rendered})) or ({target} unless on (adapter, slo) ({rendered}))",
        TICKET,
        "the objective {{ $labels.slo }} of {{ $labels.adapter }} is not the one that the rules were rendered from",
        "The server's configuration says another objective than these rules. Render them again from the server's "
        "own configuration: loradock monitoring render --config loradock.yaml --out DIR, and reload Prometheus.",
        wait="10m",
        dashboard="loradock-overview",
    )


def _adapters() -> Iterator[Rule]:
    who = "sum by (adapter, version)"
    fails = f'{who} (rate(loradock_requests_failed_total{{{OWN_FAILURES},version!=""}}[5m]))'
    counted = f'{who} (rate(loradock_requests_total{{{COUNTED},version!=""}}[5m]))'
    every_fails = f"scalar(sum(rate(loradock_requests_failed_total{{{OWN_FAILURES}}}[5m])))"
    every = f"scalar(sum(rate(loradock_requests_total{{{COUNTED}}}[5m])))"
    promoted = changed('sum by (adapter) (loradock_adapter_swaps_total{result="promoted"})', "1h")
    yield alert(
        "LoradockNewVersionFails",
        f"({fails} / {counted} > {FAILING}) and {counted} * 300 >= {ENOUGH} and on (adapter) ({promoted}) "
        f"unless ({every_fails} - {fails}) / ({every} - {counted}) > {OTHERS_FAILING}",
        PAGE,
        "{{ $labels.adapter }}@{{ $labels.version }}: {{ $value | humanizePercentage }} of the answers fail",
        "A version was promoted within the last hour and fails while everything else answers. The server was told to "
        "roll it back; see in the adapter's history whether it has, and push a repaired version.",
        action="rollback",
        dashboard="loradock-swap",
    )
    yield alert(
        "LoradockRolledBack",
        changed("sum by (adapter, version, reason) (loradock_rollbacks_total)", "1h"),
        TICKET,
        "{{ $labels.adapter }}@{{ $labels.version }} lost its traffic: {{ $labels.reason }}",
        "The server took the traffic from this version by itself. The evidence is in the adapter's history "
        "(loradock adapters show NAME) and in the audit log. Repair the version and push it again.",
        dashboard="loradock-swap",
    )
    yield alert(
        "LoradockDrift",
        # Until somebody acknowledges it; a server that does not say so is believed for a day.
        f"({changed('sum by (adapter, version, signal) (loradock_drift_alarms_total)', '1d')} "
        "unless on (adapter, version, signal) loradock_drift_alarmed == 0) "
        "or max by (adapter, version, signal) (loradock_drift_alarmed) == 1",
        TICKET,
        "{{ $labels.adapter }}@{{ $labels.version }}: the {{ $labels.signal }} signal has drifted",
        "What comes in or goes out is not what the version was approved with. GET /v1/adapters/NAME/drift says what "
        "moved, since when and how strongly (loradock drift show NAME). If the version has changed, roll it back; if "
        "the traffic has, and for good, make it the reference (loradock drift accept NAME --version N); else "
        "acknowledge the alarm (loradock drift acknowledge NAME --version N).",
        dashboard="loradock-drift",
    )
    yield alert(
        "LoradockAdapterFailed",
        'max by (adapter, version) (loradock_adapter_state{state="failed"}) == 1',
        TICKET,
        "{{ $labels.adapter }}@{{ $labels.version }} takes traffic and cannot be loaded",
        "Requests for it are answered with an error. The server's log says why; promote another version, or push "
        "this one again.",
        wait="2m",
        dashboard="loradock-adapters",
    )


def _golden() -> Iterator[Rule]:
    """Answer quality: a score that fell, and a set that gives none."""
    score = "loradock_golden_live_score"
    yield alert(
        "LoradockGoldenScoreFell",
        f"max by (adapter, set) (max_over_time({score}[1d]) - {score}) > {SCORE_FELL}",
        TICKET,
        "{{ $labels.adapter }}: the live version scores {{ $value | humanizePercentage }} less on its golden set than "
        "within the last day",
        "The same cases were answered better, by this version or by the one that was live before it. GET "
        "/v1/adapters/NAME/golden/results shows which cases fail (loradock golden show NAME). If another version "
        "was promoted, roll it back; if it is the same one, look at what changed under it: base model, judge, engine.",
        dashboard="loradock-quality",
    )
    unscored = "loradock_golden_unscored_cases"
    by = "max by (adapter, version)"
    stuck = f"{by} ({unscored}) > 0 and {by} ({unscored}) == {by} (max_over_time({unscored}[30m]))"
    failing = f"{grown('sum by (adapter) (loradock_golden_run_failures_total)', '30m')} >= {GOLDEN_FAILURES}"
    # A case that had a score keeps it when it ends in an error later.
    errors = f"""{grown('sum by (adapter, version) (loradock_golden_cases_total{result="error"})', "2h")} > 0"""
    causes = {"unscored": stuck, "errors": errors, "failing": failing}
    yield alert(
        "LoradockGoldenStuck",
        " or ".join(f'label_replace({expr}, "cause", "{cause}", "", "")' for cause, expr in causes.items()),
        TICKET,
        '{{ $labels.adapter }}{{ with $labels.version }}@{{ . }}{{ end }}: {{ if eq $labels.cause "unscored" }}'
        '{{ $value | printf "%.0f" }} golden cases get no score{{ else if eq $labels.cause "errors" }}'
        '{{ $value | printf "%.0f" }} golden cases ended in an error{{ else }}the golden set cannot be run{{ end }}',
        "For half an hour no further case got a score, or cases ended in an error. GET "
        "/v1/adapters/NAME/golden/results says what became of each case (loradock golden show NAME): a judge that is "
        "not served or does not grade, a prompt that the engine refuses, a regex that takes too long. If none was "
        "asked, the engine has no gap or does not answer: the log says so. A push or canary that waits for its score "
        "waits until then.",
        wait="30m",
        dashboard="loradock-quality",
    )


def _queue() -> Rule:
    """Whoever waits in the server's own queue, or is refused there, by adapter and tenant."""
    waits = f"max by (adapter, tenant) (loradock_queue_oldest_seconds) > {QUEUE_SECONDS}"
    counter = "sum by (adapter, tenant) (loradock_queue_refused_total)"
    refused = f"{grown(counter, '1m')} >= {REFUSED}"
    return alert(
        "LoradockQueue",
        f'label_replace({waits}, "cause", "waiting", "", "") or label_replace({refused}, "cause", "refused", "", "")',
        TICKET,
        "{{ $labels.adapter }}, tenant {{ $labels.tenant }}: "
        '{{ if eq $labels.cause "waiting" }}requests wait {{ $value | printf "%.0f" }} s for their turn'
        '{{ else }}{{ $value | printf "%.0f" }} requests were refused within a minute{{ end }}',
        "More comes in than the engine computes. The Engine dashboard shows who waits, by adapter and tenant. If one "
        "tenant sends too much, limit its keys (requests_per_minute); if all wait, shorten answers, raise max_num_seqs "
        "if the KV cache has room, or start another server.",
        wait="20s",
        dashboard="loradock-engine",
    )


def _server() -> Iterator[Rule]:
    yield alert(
        "LoradockDown",
        'up{job="loradock"} == 0 or absent(up{job="loradock"})',
        PAGE,
        "the server cannot be scraped",
        "Nothing answers at its /metrics, or the scrape key is wrong (Prometheus: Status, Targets says which). See "
        "whether the process lives: curl SERVER/health; its log says why it ended.",
        wait="2m",
        dashboard="loradock-overview",
    )
    yield alert(
        "LoradockEngineDown",
        'max by (model) (loradock_engine_phase{phase="ready"}) == 0',
        PAGE,
        "the engine of {{ $labels.model }} does not answer",
        "The server lives and its engine is not ready: GET /v1/engines says its phase, the log why. It starts within "
        "two minutes; if it does not, restart the server.",
        wait="5m",
        dashboard="loradock-engine",
    )
    yield alert(
        "LoradockEngineRestarts",
        "sum by (model) (increase(loradock_engine_restarts_total[1h])) > 2",
        TICKET,
        "the engine of {{ $labels.model }} dies again and again",
        "It was started anew more than twice within an hour. The server's log says of what it died: out of memory is "
        "the usual cause, so give it less KV cache or fewer adapters.",
        dashboard="loradock-engine",
    )
    yield alert(
        "LoradockEngineQueue",
        f"histogram_quantile(0.95, sum by (le) (rate(loradock_engine_queue_seconds_bucket[5m]))) > {QUEUE_SECONDS} "
        f"and sum(increase(loradock_engine_queue_seconds_count[5m])) >= {ENOUGH}",
        TICKET,
        '5 % of the requests wait {{ $value | printf "%.0f" }} seconds or longer inside the engine',
        "The engine has taken more requests than it computes at once. Look at the Engine dashboard: if the KV cache is "
        "full, give it more memory or shorten max_model_len; else lower max_num_seqs.",
        wait="10m",
        dashboard="loradock-engine",
    )


def _upkeep() -> Iterator[Rule]:
    """What is kept of the answers, and what goes on beside them."""
    yield alert(
        "LoradockTapDrops",
        changed("sum(loradock_tap_dropped_total)", "15m"),
        TICKET,
        "the monitoring loses exchanges",
        "The worker that eats what the tap has seen is too slow, so drift and latency figures have gaps; answers are "
        "not touched. See loradock_tap_seconds, and give the server a CPU more.",
        wait="5m",
        dashboard="loradock-overview",
    )
    yield alert(
        "LoradockAuditFails",
        changed("sum(loradock_audit_failures_total)", "1h"),
        PAGE,
        "changes are not written to the audit log",
        "The disk of the data directory is full, or audit.jsonl is not writable. The lines stand in the server's log.",
        dashboard="loradock-overview",
    )
    yield alert(
        "LoradockDegraded",
        "max by (what) (loradock_degraded) > 0",
        TICKET,
        "a server answers, and {{ $labels.what }} does not work",
        "The disk is full, the registry cannot be reached, or a task in the background fails: /ready and the server's "
        "log say why.",
        wait="10m",
        dashboard="loradock-overview",
    )
