"""How batches and fine-tuning come along, which files are kept, and what guards say of requests and answers."""

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
    content += [Row("Files"), *_files(), Row("Guards"), *_guards()]
    says = "Batches and fine-tuning, the files that they read and write, and what guards pass, flag and refuse."
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
            "Those that are not at their end, by status, of all servers that share the registry. One runs on a server.",
            [Query("max by (status) (loradock_finetune_jobs)", "{{status}}")],
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
