"""Alerts about batches that do not come along, and about guards that give no verdict."""

from __future__ import annotations

from collections.abc import Iterator

from serve.telemetry.rendered.alerts import TICKET, Rule, alert, changed, grown

# Of a batch's lines, or of what a guard looked at: so many at least, and this part of them failed.
LINES, FAILING = 20, 0.2
VERDICTS, UNJUDGED = 10, 0.1
DASHBOARD = "loradock-batches"


def batches() -> Iterator[Rule]:
    """Lines that wait for nothing, that fail, and that were too late."""
    lines = "sum(loradock_batch_lines_total)"
    yield alert(
        "LoradockBatchStuck",
        f"max(min_over_time(loradock_batch_lines_left[15m])) > 0 and {grown(lines, '15m')} == 0",
        TICKET,
        '{{ $value | printf "%.0f" }} lines of batches wait, and none was answered for a quarter of an hour',
        "On a busy server a line still goes every few seconds. The engine of their model is down or is being swapped, "
        "the rate limit of the batch's key is used up, or the batch's file is on a server that is gone (several "
        "servers need `blobs`). The log says which; GET /v1/batches lists a tenant's.",
        wait="5m",
        dashboard=DASHBOARD,
    )
    failed = grown('sum(loradock_batch_lines_total{result="failed"})', "1h")
    asked = grown('sum(loradock_batch_lines_total{result=~"completed|failed"})', "1h")
    yield alert(
        "LoradockBatchLinesFail",
        f"{failed} / {asked} > {FAILING} and {asked} >= {LINES}",
        TICKET,
        "{{ $value | humanizePercentage }} of the lines of batches failed within an hour",
        "The error file of a batch (error_file_id) has each line with the status and message that a client would have "
        "got: a model's name that is gone, a key that was revoked, a request that is refused.",
        dashboard=DASHBOARD,
    )
    yield alert(
        "LoradockBatchExpired",
        changed('sum(loradock_batches_ended_total{status="expired"})', "1h"),
        TICKET,
        "a batch's time was over before all of its lines were asked",
        "Its error file has a line with the code batch_expired for each of them. Clients go first: give the server "
        "more room, raise batch_concurrency on a GPU, or let clients ask for a longer completion_window.",
        dashboard=DASHBOARD,
    )


def guards() -> Iterator[Rule]:
    """A guard without a verdict refuses what it should pass, or passes what it should see, by policy."""
    every = "sum by (adapter, side) (loradock_guarded_total)"
    without = 'sum by (adapter, side) (loradock_guarded_total{result=~"error|skipped"})'
    yield alert(
        "LoradockGuardFails",
        f"{grown(without, '10m')} / {grown(every, '10m')} > {UNJUDGED} and {grown(every, '10m')} >= {VERDICTS}",
        TICKET,
        "{{ $labels.adapter }}: its guard gives no verdict on {{ $value | humanizePercentage }} of what it looks at "
        "({{ $labels.side }})",
        "Where its policy refuses, these requests are refused; else they pass unseen. The log names the guard and why: "
        "it is not served, its engine is down or overloaded, or its answer is none. Of answers that are only counted, "
        "more come at a time than are looked at.",
        wait="5m",
        dashboard=DASHBOARD,
    )
