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

_OVERLOADED, _TOO_MANY = rate("loradock_requests_failed_total", 'reason="overloaded"'), 'code="429"'
NO_GPU = "no GPU"


def board() -> Json:
    content: list[Panel | Row] = [
        Row("The server's own queue"),
        *_queue(),
        Row("The engine"),
        *_room(),
        *_work(),
        Row("Requests in the engine"),
        *_requests(),
        Row("GPU, where there is one"),
        *_gpu(),
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
        Panel(
            "Answered with 429",
            "Requests a second. overloaded: more came than the engine computes, see above. over a key's limits: the "
            "key asked more than it may (requests_per_minute and the like).",
            [
                Query(_OVERLOADED, "overloaded"),
                Query(f"{rate('loradock_requests_total', _TOO_MANY)} - {_OVERLOADED}", "over a key's limits"),
            ],
            unit="reqps",
            quiet=True,
            width=24,
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


def _requests() -> list[Panel]:
    """Of each request, when it has ended."""
    return [
        _heat(
            "Prompt lengths",
            "Requests by the tokens of their prompt. A band that moves up: users ask longer, and prefill costs more.",
            "request_prompt_tokens",
        ),
        _heat(
            "Answer lengths",
            "Requests by the tokens of their answer. A band at the top edge: answers are cut at max_tokens.",
            "request_generation_tokens",
        ),
        _phase(
            "Prefill time",
            "From the first step of a request to its first token. It grows with the prompt and with the batch.",
            "request_prefill_time_seconds",
        ),
        _phase(
            "Decode time",
            "From the first token of a request to its last. It grows with the answer and with the batch.",
            "request_decode_time_seconds",
        ),
    ]


def _heat(title: str, says: str, histogram: str) -> Panel:
    """How many requests fell into each bucket of one of vLLM's histograms."""
    expr = f"sum by (le) (increase(vllm:{histogram}_bucket{INTERVAL}))"
    return Panel(title, says, [Query(expr, "{{le}}")], kind="heatmap", quiet=True)


def _phase(title: str, says: str, histogram: str) -> Panel:
    buckets = f"sum by (le) (rate(vllm:{histogram}_bucket{INTERVAL}))"
    shown = [Query(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]
    return Panel(title, says, shown, unit="s", quiet=True)


def _gpu() -> list[Panel]:
    """NVIDIA's DCGM exporter, if Prometheus scrapes one."""
    used, free = (f"max by (gpu) (DCGM_FI_DEV_FB_{part})" for part in ("USED", "FREE"))
    return [
        Panel(
            "GPU use",
            "Part of the time in which a kernel ran, by GPU. Low while requests wait: the batch is too small, or the "
            "CPU keeps it waiting.",
            [Query("max by (gpu) (DCGM_FI_DEV_GPU_UTIL) / 100", "GPU {{gpu}}")],
            unit="percentunit",
            most=1,
            nothing=NO_GPU,
        ),
        Panel(
            "GPU memory",
            "Part of the memory that is taken, by GPU. vLLM takes gpu_memory_utilization of it at the start.",
            [Query(f"{used} / ({used} + {free})", "GPU {{gpu}}")],
            unit="percentunit",
            most=1,
            nothing=NO_GPU,
        ),
        Panel(
            "GPU power",
            "Watts, by GPU. At the card's limit it lowers its clock.",
            [Query("max by (gpu) (DCGM_FI_DEV_POWER_USAGE)", "GPU {{gpu}}")],
            unit="watt",
            nothing=NO_GPU,
        ),
        Panel(
            "GPU temperature",
            "Degrees, by GPU. Above 85 most cards lower their clock.",
            [Query("max by (gpu) (DCGM_FI_DEV_GPU_TEMP)", "GPU {{gpu}}")],
            unit="celsius",
            levels=((None, "green"), (85, "red")),
            line=True,
            nothing=NO_GPU,
        ),
    ]
