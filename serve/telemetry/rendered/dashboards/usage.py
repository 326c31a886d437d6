"""Who asks for how much, what it costs, and what the requests are like."""

from __future__ import annotations

from serve.telemetry.rendered.dashboards.queries import ADAPTER, ENGINE, rate
from serve.telemetry.rendered.panels import TOKENS_PER_SECOND, Json, Panel, Query, Row, Variable, dashboard

_TENANT = Variable("tenant", "Tenant", "label_values(loradock_usage_requests_total, tenant)")
_CHOSEN = 'adapter=~"$adapter",tenant=~"$tenant"'
_INPUT = 'adapter=~"$adapter"'
_EACH = "{{adapter}}"


def board() -> Json:
    content: list[Panel | Row] = [Row("Usage"), *_usage(), Row("What comes in"), *_input()]
    says = "Tokens, engine time and cost by adapter and tenant; languages, problems and personal data of requests."
    return dashboard("usage", "Usage", says, content, [ADAPTER, _TENANT, ENGINE])


def _per_hour(metric: str, labels: str, by: str) -> str:
    return f"3600 * {rate(metric, labels, by)}"


def _usage() -> list[Panel]:
    return [
        Panel(
            "Tokens by kind",
            "Tokens per second: of prompts as far as they were computed, of prompts from the prefix cache, generated.",
            [Query(rate("loradock_usage_tokens_total", _CHOSEN, "kind"), "{{kind}}")],
            unit=TOKENS_PER_SECOND,
        ),
        Panel(
            "Engine time by tenant",
            "Of each second, how much the engine computed for a tenant. A step's time is divided among its sequences "
            "by the tokens computed.",
            [Query(rate("loradock_usage_engine_seconds_total", _CHOSEN, "tenant"), "{{tenant}}")],
            unit="percentunit",
        ),
        Panel(
            "Cost an hour",
            "By the prices in the configuration, at the rate of now; in their currency.",
            [
                Query(
                    _per_hour("loradock_usage_cost_total", _CHOSEN, "adapter, tenant, currency"),
                    "{{adapter}} of {{tenant}}, {{currency}}",
                )
            ],
            quiet=True,
        ),
        Panel(
            "Is the engine busy",
            "Of each second, how much the engine computed, for clients and for the server itself (probes, shadows).",
            [Query(rate("loradock_engine_busy_seconds_total", 'model=~"$model"', "model, use"), "{{model}} {{use}}")],
            unit="percentunit",
        ),
    ]


def _input() -> list[Panel]:
    looked_at = rate("loradock_input_requests_total", _INPUT, "adapter")
    return [
        Panel(
            "Languages",
            "Share of the requests by the language that the user's last message is probably in.",
            [
                Query(
                    f"{rate('loradock_input_language_total', _INPUT, 'adapter, language')} / on (adapter) group_left() "
                    f"{looked_at}",
                    "{{adapter}} {{language}}",
                )
            ],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
        Panel(
            "Problems of prompts",
            "Requests per second whose prompt was empty, was refused because the context has no room for it "
            "(over_context), or whose answer ended because the context was full (context_full).",
            [Query(rate("loradock_input_problems_total", _INPUT, "adapter, problem"), "{{adapter}} {{problem}}")],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Personal data",
            "Requests per second that hold personal data of a kind, by pattern: an estimate.",
            [Query(rate("loradock_input_personal_data_total", _INPUT, "adapter, kind"), "{{adapter}} {{kind}}")],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Refused answers",
            "Share of the answers that begin as refusals do.",
            [Query(f"{rate('loradock_answers_refused_total', _INPUT, 'adapter')} / {looked_at}", _EACH)],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
    ]
