"""How batches, fine-tuning and loops come along, which files are kept, and what guards say of requests and answers."""

from __future__ import annotations

from serve.telemetry.rendered.dashboards.queries import ADAPTER, counted, rate
from serve.telemetry.rendered.panels import TOKENS_PER_SECOND, Json, Panel, Query, Row, dashboard

_LINES = "loradock_batch_lines_total"
_GUARDED = "loradock_guarded_total"
_CHOSEN = 'adapter=~"$adapter"'
_FAILED, _ASKED = 'result=~"failed|expired"', 'result=~"completed|failed|expired"'
_VERDICTS, _JUDGED = f'{_CHOSEN},result=~"flagged|refused"', f'{_CHOSEN},result!~"error|skipped"'
_NONE = f'{_CHOSEN},result=~"error|skipped"'
_EACH = "{{adapter}} {{side}} {{result}}"
BY_SIDE = "adapter, side, result"


def board() -> Json:
    content: list[Panel | Row] = [Row("Batches"), *_batches(), Row("Fine-tuning"), *_fine_tuning()]
    content += [Row("Loops"), *_loops(), Row("Files"), *_files(), Row("Guards"), *_guards()]
    says = "Batches, fine-tuning and loops, the files that they read and write, and what guards pass, flag and refuse."
    return dashboard("batches", "Batches and guards", says, content, [ADAPTER])


def _batches() -> list[Panel]:
    return [
        Panel(
            "Lines left",
            "Of all open batches, without an answer yet. Lines are asked in the gaps of traffic: it should fall.",
            [Query("max(loradock_batch_lines_left)", "left")],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Age of the oldest batch",
            "Since the oldest open batch was made. Its completion_window, at most batch_hours, ends it.",
            [Query("max(loradock_batch_oldest_seconds)", "oldest")],
            unit="s",
            quiet=True,
        ),
        Panel(
            "Lines by result",
            "Lines per second. failed: the line's answer is an error, which the error file of its batch has; expired: "
            "its batch's time was over before it was asked.",
            [Query(rate(_LINES, "", "result"), "{{result}}")],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Lines that failed",
            "Share of the lines that got an answer, and of those that were to get one.",
            [Query(f"{rate(_LINES, _FAILED)} / {rate(_LINES, _ASKED)}", "failed")],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
        Panel(
            "Open batches",
            "By status, of all servers that share the registry.",
            [Query("max by (status) (loradock_batches)", "{{status}}")],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Batches that ended",
            "In the last hour, by status. failed: a line of its file is no request, and none was asked.",
            [Query(counted("loradock_batches_ended_total", "", "1h", "status"), "{{status}}")],
            quiet=True,
            decimals=0,
        ),
    ]


def _fine_tuning() -> list[Panel]:
    return [
        Panel(
            "Fine-tuning jobs",
            "Those that are not at their end, by status, of all servers that share the registry; and workers on other "
            "machines that were heard of.",
            [
                Query("max by (status) (loradock_finetune_jobs)", "{{status}}"),
                Query("max(loradock_finetune_workers)", "workers"),
            ],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Jobs that ended",
            "In the last hour, by status. failed: the job's error says why.",
            [Query(counted("loradock_finetune_jobs_ended_total", "", "1h", "status"), "{{status}}")],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Tokens trained",
            "Per second. None while a job is there: it is suspended, because clients are answered, or it is paused.",
            [Query(rate("loradock_finetune_tokens_total", ""), "tokens")],
            unit=TOKENS_PER_SECOND,
            quiet=True,
        ),
        Panel(
            "Training, and suspended",
            "Share of the time in which a job runs, and whether one is suspended now.",
            [
                Query(rate("loradock_finetune_running_seconds_total", ""), "running"),
                Query("max(loradock_finetune_suspended)", "suspended"),
            ],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
    ]


def _loops() -> list[Panel]:
    """What a server says of a loop it has from the registry: all of them say the same."""
    return [
        Panel(
            "Where loops are",
            "Of adapters whose policy has one: waiting for something to open a try, or how far the try is. asking: a "
            "person's yes is waited for, on the dashboard or with `loradock loop approve`.",
            [Query(f"max by (adapter, phase) (loradock_loop_state{{{_CHOSEN}}}) > 0", "{{adapter}} {{phase}}")],
            kind="state-timeline",
            width=24,
            mappings={"1": ("here", "green")},
            least=None,
            quiet=True,
        ),
        Panel(
            "Tries that ended",
            "In the last day, by outcome. rejected: by the gate, the canary or a person; failed: there was no "
            "candidate. The adapter's history says why.",
            [Query(counted("loradock_loop_tries_total", _CHOSEN, "1d", "adapter, outcome"), "{{adapter}} {{outcome}}")],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Candidates that had forgotten",
            "In the last day: worse by more than the tolerance on an earlier reference or on the golden set. The gate "
            "has stopped them; if it happens again and again, the new traffic is at odds with the old.",
            [Query(counted("loradock_loop_forgetting_total", _CHOSEN, "1d", "adapter"), "{{adapter}}")],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Tries in a row for nothing",
            "Since the last one that was promoted. After each the loop waits twice as long as after the one before.",
            [Query(f"max by (adapter) (loradock_loop_failures{{{_CHOSEN}}})", "{{adapter}}")],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Every loop is stopped",
            "1 while an operator has stopped all of them: `loradock loop start` lets them go on.",
            [Query("max(loradock_loop_stopped)", "stopped")],
            quiet=True,
            decimals=0,
            most=1,
        ),
    ]


def _files() -> list[Panel]:
    return [
        Panel(
            "Files",
            "Of all tenants. A tenant keeps batch_tenant_files at most, each for batch_file_days.",
            [Query("max(loradock_files)", "files")],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Size of the files",
            "Of all tenants. A tenant keeps batch_tenant_bytes at most.",
            [Query("max(loradock_files_bytes)", "bytes")],
            unit="bytes",
            quiet=True,
        ),
    ]


def _guards() -> list[Panel]:
    return [
        Panel(
            "Flagged and refused",
            "Prompts and answers per second in which a guard named a category, by adapter and by what its policy does.",
            [Query(rate(_GUARDED, _VERDICTS, BY_SIDE), _EACH)],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Share flagged or refused",
            "Of the prompts and answers that got a verdict. It jumps: what comes in has changed, or the guard has.",
            [
                Query(
                    f"{rate(_GUARDED, _VERDICTS, 'adapter, side')} / {rate(_GUARDED, _JUDGED, 'adapter, side')}",
                    "{{adapter}} {{side}}",
                )
            ],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
        Panel(
            "Without a verdict",
            "Per second. error: the guard did not answer, or not to the question; such a request is refused where the "
            "policy refuses. skipped: more answers at a time than are looked at.",
            [Query(rate(_GUARDED, _NONE, BY_SIDE), _EACH)],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Looked at",
            "Prompts and answers per second that a guard looked at.",
            [Query(rate(_GUARDED, _CHOSEN, "adapter, side"), "{{adapter}} {{side}}")],
            unit="reqps",
            quiet=True,
        ),
    ]
