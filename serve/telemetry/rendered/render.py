"""The files that Prometheus, Alertmanager and Grafana read, rendered from the server's own configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve.telemetry.gateway_series import REQUESTS
from serve.telemetry.rendered.dashboards import dashboards
from serve.telemetry.rendered.receivers import EXAMPLE, PEOPLE, Receivers
from serve.telemetry.rendered.rules import BURNS, groups
from serve.telemetry.slo import Slo

HEADER = "# Rendered by `loradock monitoring render`; change the configuration and render again.\n"
# Files with an API key each, beside the configuration that names them.
SCRAPE_KEY, ALERT_KEY = "scrape-key", "alert-key"
# For gateways: stored, each set of adapters would be one more series.
UNSTORED = [{"source_labels": ["__name__"], "regex": REQUESTS, "action": "drop"}]


@dataclass(frozen=True, slots=True)
class Places:
    """Where they find one another, as HOST:PORT."""

    server: str = "loradock:8000"
    prometheus: str = "prometheus:9090"
    alertmanager: str = "alertmanager:9093"
    grafana: str = "localhost:3000"
    tls: bool = False
    # Where Grafana reads traces.
    jaeger: str = "jaeger:16686"
    # Where a trace is looked at, by its id; Jaeger's own page by default.
    traces: str = "http://localhost:16686/trace/{trace_id}"

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"


def render(slos: Sequence[Slo], places: Places, receivers: Receivers = Receivers()) -> Mapping[str, str]:
    """Path -> content of every file."""
    files = {
        "prometheus/prometheus.yml": _yaml(_prometheus(places)),
        "prometheus/rules.yml": _yaml({"groups": groups(slos)}),
        "alertmanager/alertmanager.yml": _yaml(_alertmanager(places, receivers)),
        "alertmanager/receivers-example.yml": _yaml(_alertmanager(places, EXAMPLE)),
        "provisioning/datasources/prometheus.yml": _yaml(_datasource(places)),
        "provisioning/datasources/jaeger.yml": _yaml(_traces(places)),
        "provisioning/dashboards/loradock.yml": _yaml(_provider()),
    }
    boards = {f"dashboards/{board['uid']}.json": json.dumps(board, indent=1) + "\n" for board in dashboards(slos)}
    return files | boards


def write(folder: Path, slos: Sequence[Slo], places: Places, receivers: Receivers = Receivers()) -> list[Path]:
    """Write the files below `folder`; what nobody changed is not touched."""
    written = []
    for name, text in render(slos, places, receivers).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            written.append(file)
    return written


def _prometheus(places: Places) -> dict[str, Any]:
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "30s"},
        "rule_files": ["rules.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [places.alertmanager]}]}]},
        "scrape_configs": [
            {
                "job_name": "loradock",
                "scheme": places.scheme,
                "authorization": {"credentials_file": SCRAPE_KEY},
                "static_configs": [{"targets": [places.server]}],
                "metric_relabel_configs": UNSTORED,
            },
            {"job_name": "prometheus", "static_configs": [{"targets": [places.prometheus]}]},
            {"job_name": "alertmanager", "static_configs": [{"targets": [places.alertmanager]}]},
        ],
    }


def _alertmanager(places: Places, receivers: Receivers) -> dict[str, Any]:
    """Who is told: people by `receivers`, and the server by its webhook."""
    fast, slow, slowest = (burn.name for burn in BURNS)
    down = ["LoradockDown", "LoradockEngineDown"]
    return {
        "route": {
            "receiver": PEOPLE,
            "group_by": ["alertname", "adapter"],
            "group_wait": "10s",
            "group_interval": "1m",
            "repeat_interval": "4h",
            "routes": [
                {
                    "receiver": "loradock",
                    "matchers": ['action="rollback"'],
                    "group_by": ["..."],
                    "group_wait": "1s",
                    # While it fires it is sent again: a server that was down or held back gets another chance.
                    "repeat_interval": "10m",
                    "continue": True,
                },
                {"receiver": receivers.of_pages, "matchers": ['severity="page"'], "repeat_interval": "1h"},
            ],
        },
        "inhibit_rules": [
            {
                "source_matchers": [f'alertname=~"{"|".join(down)}"'],
                "target_matchers": [f'alertname=~"{fast}|{slow}|{slowest}|LoradockQueue|LoradockEngineQueue"'],
            },
            {
                "source_matchers": [f'alertname="{fast}"'],
                "target_matchers": [f'alertname=~"{slow}|{slowest}"'],
                "equal": ["adapter", "slo"],
            },
            {
                "source_matchers": [f'alertname="{slow}"'],
                "target_matchers": [f'alertname="{slowest}"'],
                "equal": ["adapter", "slo"],
            },
        ],
        "receivers": [
            *receivers.people(),
            {
                "name": "loradock",
                "webhook_configs": [
                    {
                        "url": f"{places.scheme}://{places.server}/v1/alerts",
                        "send_resolved": False,
                        "max_alerts": 100,
                        "http_config": {"authorization": {"credentials_file": ALERT_KEY}},
                    }
                ],
            },
        ],
    }


def _datasource(places: Places) -> dict[str, Any]:
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "uid": "prometheus",
                "type": "prometheus",
                "access": "proxy",
                "url": f"http://{places.prometheus}",
                "isDefault": True,
                "jsonData": {
                    "timeInterval": "15s",
                    "httpMethod": "POST",
                    "exemplarTraceIdDestinations": [
                        {
                            "name": "trace_id",
                            # Grafana reads $NAME in these files from its environment: $$ is a dollar.
                            "url": places.traces.replace("{trace_id}", "$${__value.raw}"),
                            "urlDisplayLabel": "Trace",
                        }
                    ],
                },
            }
        ],
    }


def _traces(places: Places) -> dict[str, Any]:
    source = {"name": "Jaeger", "uid": "jaeger", "type": "jaeger", "access": "proxy", "url": f"http://{places.jaeger}"}
    return {"apiVersion": 1, "datasources": [source]}


def _provider() -> dict[str, Any]:
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "loradock",
                "folder": "loradock",
                "type": "file",
                "allowUiUpdates": False,
                "updateIntervalSeconds": 30,
                "options": {"path": "/etc/grafana/dashboards"},
            }
        ],
    }


class _Dumper(yaml.SafeDumper):
    """Lists indented below their key, and long texts kept on lines that can be read."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(data: Any) -> str:
    return HEADER + yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=118, allow_unicode=True)
