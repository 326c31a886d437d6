"""The rendered files at work: Prometheus scrapes a server under traffic, and Alertmanager calls it back."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve.telemetry.rendered.dashboards import dashboards
from serve.telemetry.rendered.panels import MAY_BE_ZERO
from serve.telemetry.rendered.render import ALERT_KEY, Places, write
from serve.telemetry.slo import DEFAULT_SLOS
from tests.support.prometheus import ask, filled, running, says_something
from tests.support.prometheus import prometheus as in_a_hurry
from tests.support.server import ADMIN, Server, free_port
from tests.support.waiting import eventually

PROGRAMS = ("prometheus", "prometheus-alertmanager")
METRIC = re.compile(r"(?:loradock_|vllm:|adapter_slo:)[\w:]+|\bup\b|\bALERTS\b")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason=f"Debian's {' and '.join(PROGRAMS)} are missing"),
]


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus on the rendered files, in a hurry."""
    with in_a_hurry(tmp_path_factory.mktemp("watchers"), server.port, ADMIN, every="1s") as client:
        yield client


@pytest.fixture
def alertmanager(server: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """Alertmanager on the rendered files."""
    address = f"127.0.0.1:{free_port()}"
    write(tmp_path, DEFAULT_SLOS, Places(f"127.0.0.1:{server.port}", f"127.0.0.1:{free_port()}", address))
    (tmp_path / "alertmanager" / ALERT_KEY).write_text(ADMIN)
    command = ("prometheus-alertmanager", "--config.file=alertmanager.yml", f"--web.listen-address={address}")
    with running(
        tmp_path / "alertmanager", f"http://{address}", *command, "--cluster.listen-address=", "--storage.path=data"
    ) as client:
        yield client


def known(server: Server, prometheus: httpx.Client) -> set[str]:
    """Every metric there is: what has samples, and what the server says there might be."""
    names = set(prometheus.get("/api/v1/label/__name__/values").json()["data"])
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", server.http.get("/metrics").text, re.MULTILINE):
        names |= {name} | ({f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else set())
    rules = yaml.safe_load((Path(__file__).parents[2] / "grafana/prometheus/rules.yml").read_text())
    return names | {rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule}


@pytest.fixture
def traffic(server: Server, name: str, adapters: dict[str, Path]) -> Iterator[None]:
    """Two versions and the base are asked all the time; version 2 has been promoted and rolled back."""
    server.upload(name, adapters["alpha"]).raise_for_status()
    server.upload(name, adapters["bravo"], promote=False).raise_for_status()
    server.promote(name, 2)
    server.http.post(f"/v1/adapters/{name}/rollback").raise_for_status()
    stop = threading.Event()

    def go(model: str) -> None:
        while not stop.is_set():
            server.ask(model, tokens=6)

    threads = [threading.Thread(target=go, args=(model,)) for model in (f"{name}@v1", f"{name}@v2", "smollm2")]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


def may_be_empty(panel: dict[str, Any]) -> bool:
    """Its description says so, or what it shows in that case, such as "no GPU"."""
    return panel["description"].endswith(MAY_BE_ZERO) or "noValue" in panel["fieldConfig"]["defaults"]


def test_every_panel_and_every_rule_speaks_to_a_live_prometheus(server, name, traffic, prometheus):
    choices = {"__rate_interval": "30s", "adapter": name, "version": ".*", "old": "v1", "new": "v2"}
    choices |= {"model": ".*", "tenant": ".*"}
    asked, silent = {}, {}
    for board in dashboards(DEFAULT_SLOS):
        annotations = [(one["name"], one["expr"], True) for one in board["annotations"]["list"]]
        panels = [(panel["title"], target["expr"], may_be_empty(panel))
                  for panel in board["panels"] for target in panel.get("targets", [])]  # fmt: skip
        for title, expr, quiet in annotations + panels:
            where = f"{board['uid']}: {title}: {filled(expr, choices)}"
            asked[where] = filled(expr, choices)
            if not quiet:
                silent[where] = asked[where]

    def all_speak() -> bool:  # some need two samples of what has just begun
        for where in [where for where, expr in silent.items() if says_something(prometheus, expr)]:
            del silent[where]
        return not silent

    assert eventually(all_speak), "\n".join(silent)
    there = known(server, prometheus)
    wrong = [
        f"{at}: there is no {one}" for at, expr in asked.items() for one in METRIC.findall(expr) if one not in there
    ]
    for board in dashboards(DEFAULT_SLOS):
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
                selector = filled(found[1], choices)
                values = {sample["metric"].get(found[2]) for sample in ask(prometheus, selector)}
                assert values - {None}, f"{board['uid']}: {variable['name']} offers nothing"
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    for rule in rules:
        assert rule["health"] == "ok", f"{rule['name']}: {rule.get('lastError')}"
        wrong += [
            f"{rule['name']}: there is no {metric}" for metric in METRIC.findall(rule["query"]) if metric not in there
        ]
    assert not wrong, "\n".join(sorted(set(wrong)))
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert firing <= {"LoradockRolledBack"}, "a healthy server under traffic raises nothing"
    burns = ask(prometheus, f'adapter_slo:loradock_burn:rate5m{{adapter="{name}"}}')
    assert {sample["metric"]["slo"] for sample in burns} == {slo.objective.value for slo in DEFAULT_SLOS}


def test_alertmanager_calls_the_server_and_the_version_goes_back(server, name, adapters, alertmanager):
    server.upload(name, adapters["alpha"]).raise_for_status()
    server.upload(name, adapters["bravo"]).raise_for_status()
    assert server.adapter(name)["live"] == 2
    alert = {
        "labels": {"alertname": "LoradockNewVersionFails", "severity": "page", "action": "rollback",
                   "adapter": name, "version": "v2"},
        "annotations": {"summary": f"{name}@v2: 31 % of the answers fail"},
    }  # fmt: skip
    alertmanager.post("/api/v2/alerts", json=[alert]).raise_for_status()
    assert eventually(lambda: server.adapter(name)["live"] == 1)
    last = server.adapter(name)["history"][-1]
    assert (last["who"], last["what"]) == ("wayback", "rollback") and "31 %" in last["why"]
    assert server.ask(name).word == "alpha"
    counted = f'loradock_rollbacks_total{{adapter="{name}",reason="alert",version="v2"}} 1.0'
    assert counted in server.http.get("/metrics").text
    lines = [json.loads(line) for line in (server.data / "audit.jsonl").read_text().splitlines()]
    assert [line["subject"] for line in lines if line["who"] == "wayback"][-1] == f"{name}@v2"
