"""Each alert fires when it should and stays quiet when it should: promtool plays the series."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.telemetry.rendered.rules import BURNS, groups, of
from serve.telemetry.slo import DEFAULT_SLOS, Objective, Slo

pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")

TONE = 'adapter="tone",version="v2"'
FIRST = Objective.FIRST_TOKEN


@dataclass(frozen=True)
class Story:
    """What the server said each minute, and what fires at the end; `labels` is nothing for what stays quiet."""

    name: str
    alert: str
    series: dict[str, str]
    at: str
    labels: str = ""


def requests(good: str, bad: str = "", who: str = TONE) -> dict[str, str]:
    told = {f'loradock_requests_total{{{who},code="200"}}': good}
    if bad:
        told[f'loradock_requests_total{{{who},code="500"}}'] = bad
    return told | failed(error=bad or "0x500", who=who)


def failed(who: str = TONE, **reasons: str) -> dict[str, str]:
    """Every reason has its series from the start."""
    name = "loradock_requests_failed_total"
    every = dict.fromkeys(("overloaded", "unavailable", "queue_deadline", "deadline", "error"), "0x500") | reasons
    return {f'{name}{{{who},reason="{reason}"}}': values for reason, values in every.items()}


def answers(every: str, quick: str, who: str = TONE) -> dict[str, str]:
    name = "loradock_time_to_first_token_seconds"
    return {f"{name}_count{{{who}}}": every, f'{name}_bucket{{{who},le="2.5"}}': quick}


def burning(alert: str, slo: str, adapter: str = "tone") -> str:
    severity = next(one.severity for one in BURNS if one.name == alert)
    return f'{{adapter="{adapter}",slo="{slo}",severity="{severity}"}}'


FAST, SLOW, TICKET = (one.name for one in BURNS)
STALE, BACK, BROKEN = "LoradockRulesStale", "LoradockRolledBack", "LoradockAdapterFailed"
PROMOTED = {'loradock_adapter_swaps_total{adapter="tone",result="promoted"}': "_x60 1x10"}
OTHERS = requests("0+60x90", "0x90", 'adapter="base",version="v1"')
FAILING = requests("0x60 0+5x10", "0x60 0+5x10")
ALARMS = f'loradock_drift_alarms_total{{{TONE},signal="prompt"}}'
ALARMED = f'loradock_drift_alarmed{{{TONE},signal="prompt"}}'
DRIFTED = f'{{{TONE},signal="prompt",severity="ticket"}}'
ENGINE_QUEUE = "loradock_engine_queue_seconds"
OLDEST, REFUSED = "loradock_queue_oldest_seconds", "loradock_queue_refused_total"
ACME, ZETA = 'adapter="tone",tenant="acme"', 'adapter="tone",tenant="zeta"'
CALLS = "loradock_requests_total"
SCORE, UNSCORED = "loradock_golden_live_score", f"loradock_golden_unscored_cases{{{TONE}}}"
FELL, STUCK = "LoradockGoldenScoreFell", "LoradockGoldenStuck"
LEFT, LINES = "loradock_batch_lines_left", "loradock_batch_lines_total"
DEGRADED = "LoradockDegraded"
IDLE, UNANSWERED, LATE = "LoradockBatchStuck", "LoradockBatchLinesFail", "LoradockBatchExpired"
UNSEEN, ASKED = "LoradockGuardFails", 'adapter="tone",side="prompt"'


def guarded(**results: str) -> dict[str, str]:
    return {f'loradock_guarded_total{{{ASKED},result="{result}"}}': values for result, values in results.items()}


def lines(**results: str) -> dict[str, str]:
    every = {"completed": "0x90", "failed": "0x90", **results}
    return {f'{LINES}{{result="{result}"}}': values for result, values in every.items()}


STORIES = [
    # 20 % errors burn a budget of 0.5 % forty times too fast.
    Story("a fifth fails", FAST, requests("0+8x70", "0+2x70"), "65m", burning(FAST, "errors")),
    Story("everything fails", FAST, {k: v for k, v in requests("0", "0+5x70").items() if "200" not in k}, "65m",
          burning(FAST, "errors")),
    Story("a fifth is refused by an overloaded server", FAST,
          {**requests("0+8x70"), **failed(overloaded="0+2x70"), f'{CALLS}{{{TONE},code="429"}}': "0+2x70"}, "65m",
          burning(FAST, "errors")),
    Story("a fifth comes too late", FAST,
          {**requests("0+8x70"), **failed(queue_deadline="0+2x70"), f'{CALLS}{{{TONE},code="504"}}': "0+2x70"}, "65m",
          burning(FAST, "errors")),
    Story("a fifth breaks off in the middle", FAST, {**requests("0+10x70"), **failed(deadline="0+2x70")}, "65m",
          burning(FAST, "errors")),
    Story("a key asks more than it may", FAST, {**requests("0+8x70"), f'{CALLS}{{{TONE},code="429"}}': "0+9x70"},
          "65m"),
    Story("clients' own mistakes", FAST, {'loradock_requests_total{adapter="tone",version="v2",code="404"}': "0+9x70"},
          "65m"),
    Story("it has stopped", FAST, requests("0+8x100", "0+2x70 140x30"), "90m"),
    Story("ten requests at night", FAST, requests("0+1x8 8x60", "0+1x2 2x60"), "65m"),
    Story("within the budget", FAST, requests("0+1000x70", "0+4x70"), "65m"),
    Story("all are slow", FAST, answers("0+10x70", "0x70"), "65m", burning(FAST, FIRST)),
    Story("4 % are slow", FAST, answers("0+100x70", "0+96x70"), "65m"),
    Story("4 % fail for hours", SLOW, requests("0+96x400", "0+4x400"), "380m", burning(SLOW, "errors")),
    Story("2 % fail for hours", SLOW, requests("0+98x400", "0+2x400"), "380m"),
    Story("1 % fails for days", TICKET, requests("0+99x480", "0+1x480"), "73h", burning(TICKET, "errors")),
    Story("0.4 % fail for days", TICKET, requests("0+996x480", "0+4x480"), "73h"),
    Story("another objective", STALE, {'loradock_slo_target{adapter="*",slo="errors"}': "0.99x30"}, "20m",
          '{adapter="*",slo="errors",severity="ticket"}'),
    Story("an objective more", STALE, {'loradock_slo_target{adapter="tone",slo="errors"}': "0.99x30"},
          "20m", '{adapter="tone",slo="errors",severity="ticket"}'),
    Story("the same", STALE, {'loradock_slo_target{adapter="*",slo="errors"}': "0.995x30"}, "20m"),
    Story("a new version fails", "LoradockNewVersionFails", {**OTHERS, **FAILING, **PROMOTED}, "68m",
          f'{{{TONE},severity="page",action="rollback"}}'),
    Story("an old version fails", "LoradockNewVersionFails", {**OTHERS, **FAILING}, "68m"),
    Story("too few to tell", "LoradockNewVersionFails",
          {**OTHERS, **requests("0x60 0+1x10", "0x60 0+1x10"), **PROMOTED}, "68m"),
    Story("a new version is asked by too many", "LoradockNewVersionFails",
          {**OTHERS, **FAILING, **failed(queue_deadline="0x60 0+5x10"), **PROMOTED}, "68m"),
    Story("everything fails at once", "LoradockNewVersionFails",
          {**requests("0+30x90", "0+30x90", 'adapter="base",version="v1"'), **FAILING, **PROMOTED}, "68m"),
    Story("rolled back", BACK, {f'loradock_rollbacks_total{{{TONE},reason="alert"}}': "_x70 1x20"}, "80m",
          f'{{{TONE},reason="alert",severity="ticket"}}'),
    Story("rolled back again", BACK, {f'loradock_rollbacks_total{{{TONE},reason="alert"}}': "1x70 2x20"},
          "80m", f'{{{TONE},reason="alert",severity="ticket"}}'),
    Story("rolled back long ago", BACK, {f'loradock_rollbacks_total{{{TONE},reason="alert"}}': "1x90"},
          "80m"),
    Story("drifted", "LoradockDrift", {ALARMS: "0x30 1x30"}, "50m", DRIFTED),
    Story("born with its first alarm", "LoradockDrift", {ALARMS: "_x30 1x30"}, "50m", DRIFTED),
    Story("nothing moved", "LoradockDrift", {ALARMS: "0x60"}, "50m"),
    Story("nobody acknowledged it", "LoradockDrift", {ALARMS: "1x160", ALARMED: "1x1600"}, "26h", DRIFTED),
    Story("acknowledged", "LoradockDrift", {ALARMS: "0x30 1x60", ALARMED: "0x30 1x20 0x40"}, "70m"),
    Story("drifted days ago", "LoradockDrift", {ALARMS: "1x160"}, "25h"),
    Story("cannot be loaded", BROKEN, {f'loradock_adapter_state{{{TONE},state="failed"}}': "1x20"}, "10m",
          f'{{{TONE},severity="ticket"}}'),
    Story("loaded", BROKEN, {f'loradock_adapter_state{{{TONE},state="failed"}}': "0x20"}, "10m"),
    Story("down", "LoradockDown", {'up{job="loradock",instance="a:1"}': "1x5 0x10"}, "10m",
          '{job="loradock",instance="a:1",severity="page"}'),
    Story("never seen", "LoradockDown", {'up{job="prometheus",instance="b:1"}': "1x10"}, "10m",
          '{job="loradock",severity="page"}'),
    Story("up", "LoradockDown", {'up{job="loradock",instance="a:1"}': "1x20"}, "10m"),
    Story("failed", "LoradockEngineDown",
          {'loradock_engine_phase{model="m",phase="ready"}': "1x5 0x20",
           'loradock_engine_phase{model="m",phase="failed"}': "0x5 1x20"}, "15m", '{model="m",severity="page"}'),
    Story("starting", "LoradockEngineDown", {'loradock_engine_phase{model="m",phase="ready"}': "0x3 1x20"}, "15m"),
    Story("dies again and again", "LoradockEngineRestarts",
          {'loradock_engine_restarts_total{model="m"}': "0x10 1x10 2x10 3x10 4x10"}, "50m",
          '{model="m",severity="ticket"}'),
    Story("died once", "LoradockEngineRestarts", {'loradock_engine_restarts_total{model="m"}': "0x10 1x60"}, "50m"),
    Story("a tenant waits", "LoradockQueue", {f"{OLDEST}{{{ACME}}}": "0x5 20x5", f"{OLDEST}{{{ZETA}}}": "0x5 2x5"},
          "8m", f'{{{ACME},cause="waiting",severity="ticket"}}'),
    Story("a tenant is refused", "LoradockQueue",
          {f"{REFUSED}{{{ACME}}}": "0x5 0+30x5", f"{REFUSED}{{{ZETA}}}": "0x5 0+1x5"}, "8m",
          f'{{{ACME},cause="refused",severity="ticket"}}'),
    Story("refused since it was born", "LoradockQueue", {f"{REFUSED}{{{ACME}}}": "_x5 30+30x5"}, "7m",
          f'{{{ACME},cause="refused",severity="ticket"}}'),
    Story("it has waited", "LoradockQueue", {f"{OLDEST}{{{ACME}}}": "20x5 0x5"}, "8m"),
    Story("it was refused", "LoradockQueue", {f"{REFUSED}{{{ACME}}}": "0x2 0+30x3 120x9"}, "12m"),
    Story("a queue inside", "LoradockEngineQueue",
          {f"{ENGINE_QUEUE}_count": "0+30x30", f'{ENGINE_QUEUE}_bucket{{le="5"}}': "0+15x30",
           f'{ENGINE_QUEUE}_bucket{{le="30"}}': "0+30x30", f'{ENGINE_QUEUE}_bucket{{le="+Inf"}}': "0+30x30"}, "25m",
          '{severity="ticket"}'),
    Story("no queue inside", "LoradockEngineQueue",
          {f"{ENGINE_QUEUE}_count": "0+30x30", f'{ENGINE_QUEUE}_bucket{{le="5"}}': "0+30x30",
           f'{ENGINE_QUEUE}_bucket{{le="30"}}': "0+30x30", f'{ENGINE_QUEUE}_bucket{{le="+Inf"}}': "0+30x30"}, "25m"),
    Story("drops", "LoradockTapDrops", {"loradock_tap_dropped_total": "0x10 0+5x20"}, "25m", '{severity="ticket"}'),
    Story("dropped once at the start", "LoradockTapDrops", {"loradock_tap_dropped_total": "7x60"}, "25m"),
    Story("a version that scores less is live", FELL, {f'{SCORE}{{adapter="tone",set="a1"}}': "0.9x30 0.8x30"}, "50m",
          '{adapter="tone",set="a1",severity="ticket"}'),
    Story("a little less", FELL, {f'{SCORE}{{adapter="tone",set="a1"}}': "0.9x30 0.87x30"}, "50m"),
    Story("another golden set", FELL,
          {f'{SCORE}{{adapter="tone",set="a1"}}': "0.9x30 _x30", f'{SCORE}{{adapter="tone",set="b2"}}': "_x30 0.5x30"},
          "50m"),
    Story("no case gets a score", STUCK, {UNSCORED: "0x10 20x60"}, "60m",
          f'{{{TONE},cause="unscored",severity="ticket"}}'),
    Story("one case after another", STUCK, {UNSCORED: "100-1x90"}, "80m"),
    Story("the last cases have no score", STUCK, {UNSCORED: "40-1x38 2x80"}, "110m",
          f'{{{TONE},cause="unscored",severity="ticket"}}'),
    Story("every case has its score", STUCK, {UNSCORED: "20x5 0x90"}, "80m"),
    Story("the engine takes no golden case", STUCK, {'loradock_golden_run_failures_total{adapter="tone"}': "0+2x90"},
          "80m", '{adapter="tone",cause="failing",severity="ticket"}'),
    Story("the judge answers no more", STUCK, {f'loradock_golden_cases_total{{{TONE},result="error"}}': "0x10 4x80"},
          "60m", f'{{{TONE},cause="errors",severity="ticket"}}'),
    Story("it took none for a moment", STUCK, {'loradock_golden_run_failures_total{adapter="tone"}': "0x30 4x60"},
          "80m"),
    Story("no line", "LoradockAuditFails", {"loradock_audit_failures_total": "0x70 1x10"}, "75m", '{severity="page"}'),
    Story("no line of a batch is asked", IDLE, {LEFT: "0x10 40x60", **lines(completed="0+10x10 100x60")}, "40m",
          '{severity="ticket"}'),
    Story("a line now and then", IDLE, {LEFT: "0x10 40-1x35", **lines(completed="0+1x90")}, "40m"),
    Story("no batch is open", IDLE, {LEFT: "0x60", **lines(completed="9x60")}, "40m"),
    Story("a new batch after an idle hour", IDLE, {LEFT: "0x60 40x60", **lines(completed="9x90")}, "66m"),
    Story("half of the lines fail", UNANSWERED, lines(completed="0+5x60", failed="0+5x60"), "40m",
          '{severity="ticket"}'),
    Story("a line in twenty fails", UNANSWERED, lines(completed="0+19x60", failed="0+1x60"), "40m"),
    Story("two of three lines fail", UNANSWERED, lines(completed="0x10 1x50", failed="0x10 2x50"), "40m"),
    Story("a batch was too late", LATE, {'loradock_batches_ended_total{status="expired"}': "0x30 1x30"}, "50m",
          '{severity="ticket"}'),
    Story("a batch was too late long ago", LATE, {'loradock_batches_ended_total{status="expired"}': "1x90"}, "80m"),
    Story("a guard does not answer", UNSEEN, guarded(passed="0+5x60", error="0x10 0+5x50"), "40m",
          f'{{{ASKED},severity="ticket"}}'),
    Story("a guard refuses", UNSEEN, guarded(passed="0+5x60", error="0x60", refused="0+9x60"), "40m"),
    Story("a guard did not answer once", UNSEEN, guarded(passed="0+5x60", error="0x10 1x50"), "40m"),
    Story("every line", "LoradockAuditFails", {"loradock_audit_failures_total": "0x90"}, "75m"),
    Story("the disk is full", DEGRADED, {'loradock_degraded{what="disk"}': "_x10 1x60"}, "40m",
          '{severity="ticket",what="disk"}'),
    Story("a task failed and is well again", DEGRADED, {'loradock_degraded{what="usage"}': "_x10 1x8 _x60"}, "40m"),
]  # fmt: skip


def play(
    stories: list[Story], slos: tuple[Slo, ...], folder: Path, minutes: int = 1
) -> subprocess.CompletedProcess[str]:
    """`minutes` from one sample to the next; a rule is evaluated as often, or days would take minutes to play."""
    firing, every = "alertstate='firing'", f"{minutes}m"
    rules = [{**group, "interval": every, "rules": _needed(group["rules"], minutes)} for group in groups(slos)]
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": rules}))
    tests = [
        {
            "name": story.name,
            "interval": every,
            "input_series": [{"series": name, "values": values} for name, values in story.series.items()],
            "promql_expr_test": [
                {
                    "expr": f"max without (alertstate, alertname) (ALERTS{{{firing},alertname='{story.alert}'}})",
                    "eval_time": story.at,
                    "exp_samples": [{"labels": story.labels, "value": 1}] if story.labels else [],
                }
            ],
        }
        for story in stories
    ]
    # Without this, promtool evaluates the groups in any order.
    order = [group["name"] for group in rules]
    told = {"rule_files": ["rules.yml"], "evaluation_interval": every, "group_eval_order": order, "tests": tests}
    (folder / "tests.yml").write_text(yaml.safe_dump(told))
    command = ["promtool", "test", "rules", "tests.yml"]
    # It makes much garbage of little: collected less often, it takes less time.
    environ = {**os.environ, "GOGC": os.environ.get("GOGC", "1000")}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=600, check=False)


def _needed(rules: list[dict[str, Any]], minutes: int) -> list[dict[str, Any]]:
    """Without what takes long and is not asked for: with few samples there are days to look at, and otherwise not."""
    days, hours = ("3d", "6h"), ("5m", "30m", "1h", "6h")
    ends = days if minutes > 5 else hours
    return [rule for rule in rules if rule.get("alert") or rule["record"].endswith(ends)]


def test_every_alert_has_a_story_in_which_it_fires_and_one_in_which_it_does_not():
    loud = {story.alert for story in STORIES if story.labels}
    quiet = {story.alert for story in STORIES if not story.labels}
    every = {rule["alert"] for group in groups(DEFAULT_SLOS) for rule in group["rules"] if "alert" in rule}
    assert loud == quiet == every


@pytest.mark.parametrize("minutes", [1, 10])
def test_the_alerts_fire_when_they_should(tmp_path, minutes):
    days = [story for story in STORIES if story.at.endswith("h")]
    stories = days if minutes > 5 else [story for story in STORIES if story not in days]
    played = play(stories, DEFAULT_SLOS, tmp_path, minutes)
    assert played.returncode == 0, played.stdout + played.stderr


def test_a_story_that_is_wrong_is_found_out(tmp_path):
    lie = Story("all is well", FAST, requests("0+8x70"), "65m", burning(FAST, "errors"))
    assert play([lie], DEFAULT_SLOS, tmp_path).returncode == 1


def test_an_adapter_is_judged_by_its_own_objective_alone(tmp_path):
    """2 % slow: too much for every adapter's 99.9 %, well within tone's 95 %; and `free` has no objective at all."""
    slos = (
        Slo("*", FIRST, 0.999, 2.5),
        Slo("tone", FIRST, 0.95, 2.5),
        Slo("free", FIRST),
        Slo("acme/other.one", FIRST, 0.99, 2.5),
    )
    series = {}
    for adapter in ("tone", "free", "plain", "acme/otherxone"):
        series |= answers("0+100x70", "0+98x70", f'adapter="{adapter}",version="v1"')
    fires = [Story("plain", FAST, series, "65m")]
    assert of(slos[0], slos) == r'adapter!~"acme/other\\.one|free|tone"'
    played = play(fires, slos, tmp_path)
    for adapter in ("plain", "acme/otherxone"):
        assert f'adapter="{adapter}"' in played.stdout + played.stderr
    for adapter in ("tone", "free"):
        assert f'adapter="{adapter}"' not in played.stdout + played.stderr


def test_promtool_finds_nothing_to_say_about_the_rules(tmp_path):
    slos = (*DEFAULT_SLOS, Slo("tone", FIRST, 0.99, 1), Slo("acme/free", FIRST))
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups(slos)}))
    command = ["promtool", "check", "rules", "--lint=none", "rules.yml"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
