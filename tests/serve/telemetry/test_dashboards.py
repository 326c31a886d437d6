"""What is rendered is what stands in grafana/, and Grafana's own schema knows every field of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from serve.telemetry.rendered.dashboards import dashboards
from serve.telemetry.rendered.panels import COLUMNS, MAY_BE_ZERO, TAG, TOKENS, TOKENS_PER_SECOND
from serve.telemetry.rendered.render import Places, render
from serve.telemetry.rendered.rules import groups
from serve.telemetry.slo import DEFAULT_SLOS
from tests.support.server import environment

ROOT = Path(__file__).parents[3]
BOARDS = dashboards(DEFAULT_SLOS)
PANELS = [pytest.param(board, panel, id=f"{board['uid']}: {panel['title']}")
          for board in BOARDS for panel in board["panels"] if panel["type"] != "row"]  # fmt: skip

# Fields of an annotation that its data source reads; the schema has only those that Grafana itself does.
OF_PROMETHEUS = re.compile(r"/annotations/list/\d+/(titleFormat|step|useValueForTime) is unknown")

register_default_plugins()


def test_what_stands_in_grafana_is_what_is_rendered():
    said = {name: (ROOT / "grafana" / name).read_text() for name in render(DEFAULT_SLOS, Places())}
    assert said == render(DEFAULT_SLOS, Places()), "run: loradock monitoring render --out grafana"


def test_rendering_needs_nothing_but_what_serving_needs(tmp_path):
    code = (
        "import sys; from serve.cli.main import main\nsys.argv[0] = 'loradock'\ntry: main()\nexcept SystemExit: pass\n"
    )
    code += "print({'vllm', 'torch', 'grafana_foundation_sdk'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "monitoring", "render", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
    again = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert "is up to date" in again.stdout


def test_the_slos_of_the_configuration_come_through(tmp_path):
    (tmp_path / "loradock.yaml").write_text("slos: {tone: {time_to_first_token: {threshold: 1, target: 0.99}}}\n")
    command = [
        sys.executable,
        "-m",
        "serve.cli",
        "monitoring",
        "render",
        "--config",
        str(tmp_path / "loradock.yaml"),
    ]
    command += ["--out", str(tmp_path / "out"), "--server", "127.0.0.1:9000"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "out/prometheus/rules.yml").read_text()
    assert 'adapter="tone",le="1.0"' in " ".join(rules.split())
    assert "127.0.0.1:9000" in (tmp_path / "out/alertmanager/alertmanager.yml").read_text()


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])
def test_grafanas_schema_knows_every_field(board):
    """Read into Grafana's own types and written again, nothing is lost and nothing is of another kind."""
    again = json.loads(json.dumps(Dashboard.from_json(json.loads(json.dumps(board))), cls=JSONEncoder))
    assert [line for line in lost(board, again) if not OF_PROMETHEUS.fullmatch(line)] == []


def lost(given: Any, kept: Any, where: str = "") -> list[str]:
    """Paths in `given` that `kept` does not have, or has otherwise."""
    if isinstance(given, dict):
        if not isinstance(kept, dict):
            return [f"{where}: {given!r} became {kept!r}"]
        unknown = [f"{where}/{key} is unknown" for key in given if key not in kept]
        known = [lost(given[key], kept[key], f"{where}/{key}") for key in given if key in kept]
        return [*unknown, *(line for lines in known for line in lines)]
    if isinstance(given, list):
        if not isinstance(kept, list) or len(kept) != len(given):
            return [f"{where}: {given!r} became {kept!r}"]
        return [line for at, one in enumerate(given) for line in lost(one, kept[at], f"{where}/{at}")]
    return [] if given == kept else [f"{where}: {given!r} became {kept!r}"]


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_every_panel_says_what_it_shows_in_which_unit_and_what_to_do(board, panel):
    assert panel["title"] and len(panel["description"].removesuffix(MAY_BE_ZERO)) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_what_counts_tokens_says_so_in_its_unit(board, panel):
    asked = " ".join(target["expr"] for target in panel["targets"])
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if "tokens_total" not in asked:
        return
    assert unit == (TOKENS if " / " in asked else TOKENS_PER_SECOND)


def test_a_budget_that_is_overspent_is_drawn_below_zero():
    (panel,) = (panel for board in BOARDS for panel in board["panels"] if panel["title"].startswith("Error budget"))
    assert "min" not in panel["fieldConfig"]["defaults"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])
def test_panels_lie_side_by_side_and_variables_are_there(board):
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        taken |= cells
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([board["panels"], board["annotations"]])))
    assert used - {"__rate_interval", "__auto"} <= names
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert board["tags"] == [TAG] and board["links"][0]["tags"] == [TAG]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])
def test_any_grafana_from_11_on_imports_it(board):
    """Nothing in it belongs to one installation: no id of a dashboard, no uid of a data source."""
    assert "id" not in board and board["schemaVersion"] <= 39
    (source,) = (variable for variable in board["templating"]["list"] if variable["type"] == "datasource")
    assert source["current"] == {"text": "default", "value": "default"}
    sources = re.findall(r'"datasource": \{[^}]*"uid": "([^"]*)"', json.dumps(board))
    assert sources and set(sources) == {"${datasource}"}
    assert all({"id", "uid", "iteration"}.isdisjoint(variable) for variable in board["templating"]["list"])


def test_no_two_dashboards_have_one_uid_or_title():
    assert len({board["uid"] for board in BOARDS}) == len({board["title"] for board in BOARDS}) == len(BOARDS)


def test_without_a_gpu_its_panels_say_so():
    panels = [panel for board in BOARDS for panel in board["panels"] if "DCGM" in json.dumps(panel)]
    assert len(panels) == 4
    assert {panel["fieldConfig"]["defaults"]["noValue"] for panel in panels} == {"no GPU"}


def test_every_alert_leads_to_a_dashboard_that_is_there():
    uids = {f"/d/{board['uid']}" for board in BOARDS}
    alerts = [rule for group in groups(DEFAULT_SLOS) for rule in group["rules"] if "alert" in rule]
    for alert in alerts:
        assert alert["annotations"]["dashboard"] in uids
        assert len(alert["annotations"]["description"]) > 60
