"""Does the engine have room?"""

from __future__ import annotations

from serve.telemetry.rendered.dashboards.queries import (
    ENGINE,
    INTERVAL,
    counted,
    marks,
    quantiles,
    rate,
    ratio,
)
from serve.telemetry.rendered.panels import TOKENS, TOKENS_PER_SECOND, Json, Panel, Query, Row, dashboard
from serve.telemetry.rendered.rules import QUEUE_SECONDS


def board() -> Json:
    content: list[Panel | Row] = [
        Row("The server's own queue"),
        *_queue(),
        Row("The engine"),
        *_room(),
        *_work(),
    ]
    return dashboard("engine", "Engine", "Whether the engine has room.", content, [ENGINE], marks(".*"))


def _queue() -> list[Panel]:
    """What waits before the engine: it takes no more requests than it has seats, so that it stays fair."""
    return [
        Panel(
            "Waiting for a seat",
            "Requests of clients in the server's own queue, by adapter and tenant; all: also what no client waits for.",
            [
                Query("sum(loradock_line_waiting)", "all"),
                Query("sum by (adapter, tenant) (loradock_queue_waiting)", "{{adapter}} {{tenant}}"),
            ],
            quiet=True,
        ),
        Panel(
            "Longest wait now",
            "How long the request at the front has waited already, by adapter and tenant. At 5 s an alert says so.",
            [Query("max by (adapter, tenant) (loradock_queue_oldest_seconds)", "{{adapter}} {{tenant}}")],
            unit="s",
            quiet=True,
            levels=((None, "green"), (QUEUE_SECONDS, "red")),
            line=True,
        ),
        Panel(
            "Time in the queue",
            "From the moment that a request has been read to its seat, or until its client gave up.",
            quantiles("queue_time_seconds"),
            unit="s",
            levels=((None, "green"), (QUEUE_SECONDS, "red")),
        ),
        Panel(
            "Refused",
            "Requests a second that got 429 because they would have waited longer than max_wait, by adapter and "
            "tenant. One tenant alone: limit its keys. All: start another server.",
            [Query(rate("loradock_queue_refused_total", "", "adapter, tenant"), "{{adapter}} {{tenant}}")],
            unit="reqps",
            quiet=True,
        ),
    ]


def _room() -> list[Panel]:
    return [
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
            "Batch and its queue",
            "Requests that are computed, and those that wait inside the engine, for KV cache or a slot.",
            [
                Query("sum(vllm:num_requests_running)", "running"),
                Query("sum(loradock_engine_waiting)", "waiting"),
            ],
            quiet=True,
        ),
        Panel(
            "Time in the engine's queue",
            "From the moment that the engine takes a request until it computes on it.",
            quantiles("engine_queue_seconds"),
            unit="s",
            levels=((None, "green"), (QUEUE_SECONDS, "red")),
        ),
        Panel(
            "Prefix cache",
            "The part of prompt tokens that were there already. Each adapter version and each tenant has its own part, "
            "so a swap begins at zero.",
            [
                Query(
                    ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
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
            [Query(f"sum(rate(vllm:num_preemptions_total{INTERVAL}))", "preemptions")],
            unit="reqps",
            quiet=True,
        ),
    ]


def _work() -> list[Panel]:
    return [
        Panel(
            "Tokens",
            "Tokens a second through the engine.",
            [
                Query(f"sum(rate(vllm:prompt_tokens_total{INTERVAL}))", "prompt"),
                Query(f"sum(rate(vllm:generation_tokens_total{INTERVAL}))", "generated"),
            ],
            unit=TOKENS_PER_SECOND,
        ),
        Panel(
            "Tokens of a step",
            "How full the batch is: tokens that one step of the engine computes.",
            [
                Query(
                    ratio("vllm:iteration_tokens_total_sum", "vllm:iteration_tokens_total_count"),
                    "mean",
                )
            ],
            unit=TOKENS,
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
            [Query(counted("loradock_engine_restarts_total", 'model=~"$model"', "1h", "model"), "{{model}}")],
            quiet=True,
            decimals=0,
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
