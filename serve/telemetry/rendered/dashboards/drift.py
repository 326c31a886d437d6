"""Does a version still get and give what it was approved with?"""

from __future__ import annotations

from serve.telemetry.rendered.dashboards.queries import (
    ADAPTER,
    CHOSEN,
    INTERVAL,
    LATE,
    VERSION,
    counted,
    marks,
)
from serve.telemetry.rendered.panels import Json, Panel, Query, Row, dashboard

EACH = "{{adapter}}@{{version}} {{signal}}"
BY = "adapter, version, signal"
EVIDENCE = f"max by ({BY}) (loradock_drift_log_evidence{{{CHOSEN}}})"
THRESHOLD = f"max by ({BY}) (loradock_drift_threshold_log_evidence{{{CHOSEN}}})"


def board() -> Json:
    content: list[Panel | Row] = [
        *_evidence(),
        *_effects(),
    ]
    says = "Whether an adapter version still gets and gives what it was approved with."
    return dashboard("drift", "Drift", says, content, [ADAPTER, VERSION], marks("$adapter"))


def _evidence() -> list[Panel]:
    return [
        Panel(
            "Evidence, as a part of the threshold",
            "At 1 the evidence is what a quiet stream reaches once in 100,000 requests; an alarm needs twenty times "
            "as much, which is 1.26, and an effect. Half way is nothing yet: evidence wanders.",
            [Query(f"sort_desc({EVIDENCE} / {THRESHOLD})", EACH, now=True)],
            unit="percentunit",
            kind="bargauge",
            levels=LATE,
            quiet=True,
            most=1,
            width=24,
        ),
        Panel(
            "Evidence over time",
            "The logarithm of the evidence. The level is the threshold; rising steadily is drift, up and down is not.",
            [Query(EVIDENCE, EACH), Query(f"max({THRESHOLD})", "threshold")],
            quiet=True,
            least=None,
        ),
    ]


def _effects() -> list[Panel]:
    return [
        Panel(
            "Effect",
            "How far each statistic has moved: change of the mean log-probability in nats, shift of rank, refusals as "
            "a part, probe as a multiple of its noise. Evidence without an effect is no alarm.",
            [Query(f"max by ({BY}, stat) (loradock_drift_effect{{{CHOSEN}}})", EACH + " {{stat}}")],
            quiet=True,
            least=None,
        ),
        Panel(
            "What moved most",
            "The statistics by the size of their effect, largest first. GET /v1/adapters/NAME/drift says since when.",
            [Query(f"topk(20, abs(max by ({BY}, stat) (loradock_drift_effect{{{CHOSEN}}})))", now=True)],
            kind="table",
            quiet=True,
        ),
        Panel(
            "Samples",
            "Requests a second that the detectors took, after thinning: repeated prompts and one conversation's many "
            "turns count once. None in spite of traffic: every prompt is the same.",
            [Query(f"sum by ({BY}) (rate(loradock_drift_samples_total{{{CHOSEN}}}{INTERVAL}))", EACH)],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Reference",
            "Requests in each baseline. Small ones make the detector slow, never wrong.",
            [Query(f"max by ({BY}) (loradock_drift_reference_requests{{{CHOSEN}}})", EACH)],
            quiet=True,
        ),
        Panel(
            "Alarms",
            "Alarms in the last day. Prompt: the users ask other things. Output or probe: the version answers "
            "differently; roll it back, or build a new baseline if that was intended.",
            [Query(counted("loradock_drift_alarms_total", CHOSEN, "1d", BY), EACH)],
            quiet=True,
            decimals=0,
            levels=((None, "green"), (1, "red")),
        ),
    ]
