"""Who asks for how much, and what it costs."""

from __future__ import annotations

from serve.telemetry.rendered.dashboards.queries import ADAPTER, ENGINE, rate
from serve.telemetry.rendered.panels import Json, Panel, Query, Row, Variable, dashboard

_TENANT = Variable("tenant", "Tenant", "label_values(loradock_usage_requests_total, tenant)")
_CHOSEN = 'adapter=~"$adapter",tenant=~"$tenant"'


def board() -> Json:
    content: list[Panel | Row] = [*_usage()]
    says = "Tokens, engine time and cost by adapter and tenant."
    return dashboard("usage", "Usage", says, content, [ADAPTER, _TENANT, ENGINE])


def _per_hour(metric: str, labels: str, by: str) -> str:
    return f"3600 * {rate(metric, labels, by)}"


def _usage() -> list[Panel]:
    return [
        Panel(
            "Tokens by kind",
            "Tokens per second: of prompts as far as they were computed, of prompts from the prefix cache, generated.",
            [Query(rate("loradock_usage_tokens_total", _CHOSEN, "kind"), "{{kind}}")],
            unit="cps",
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
