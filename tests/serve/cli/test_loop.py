"""`loradock loop` against a server whose adapters have no policy: a person may still open a try, and stop it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from serve.cli.loop import _shown, loop_app
from tests.support import tiny
from tests.support.app import upload
from tests.support.zygote import Zygote


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("server")
    learns = '{"*": {"train_on_traffic": true}}'
    zygote = Zygote(folder / "data", tiny_model, "--policies", learns)
    process = zygote.start()
    zygote.client.post("/v1/adapters", **upload(tiny.adapter(folder / "adapter", 0, 2))).raise_for_status()
    yield zygote
    zygote.kill(process)
    zygote.close()


@pytest.fixture(scope="module")
def run(server):
    """`run("list", "--json")`: the result of the command."""
    return lambda *words: CliRunner().invoke(loop_app, [*map(str, words), "--url", str(server.client.base_url)])


def test_a_loop_is_stopped_and_started_and_asked(run):
    assert run("list").stdout == "no adapter has a loop\n"
    assert run("show", "tone").stdout == "tone has no loop: give it a policy with `loop`\n"
    assert run("stop", "tone").stdout == "the loop of tone is stopped\n"
    page = run("show", "tone").stdout
    assert "tone: waiting for " in page and "stopped by anonymous" in page and "0 of 4 tries this month" in page
    refused = run("run", "tone")
    assert refused.exit_code == 1 and "was stopped by anonymous: start it first" in refused.stderr
    assert run("start", "tone").exit_code == 0
    assert run("run", "tone").stdout == "the loop of tone opens a try\n"
    again = run("approve", "tone", "--json")
    assert again.exit_code == 1 and "asks nothing now" in json.loads(again.stderr)["error"]["message"]
    (row,) = json.loads(run("list", "--json").stdout)["data"]
    assert row["name"] == "tone" and row["phase"] in ("waiting", "gathering")
    assert run("stop").stdout == "every loop is stopped\n"
    assert "stopped by anonymous" in run("list").stdout
    assert run("start").stdout == "every loop may open tries\n"


def test_what_is_not_there_is_a_sentence(run):
    for words in (("show", "nobody"), ("run", "nobody"), ("forget", "tone", "ref-0")):
        refused = run(*words)
        assert refused.exit_code == 1 and refused.stderr.startswith("loradock loop: "), words


def test_a_page_has_each_try_with_its_gate_and_the_references():
    part = {
        "part": "reference", "label": "v2", "examples": 150, "live": 0.9, "candidate": 0.88, "tolerance": 0.05,
        "log_evidence": 4.6, "log_threshold": 4.4, "passed": True,
    }  # fmt: skip
    attempt = {
        "try": 1, "began": 0.0, "outcome": "promoted", "cause": {"kind": "drift", "text": "prompt drifted"},
        "text": "better", "gate": {"parts": [part]},
    }  # fmt: skip
    page = _shown(
        {
            "name": "tone",
            "phase": "waiting",
            "since": 0.0,
            "on": ["drift"],
            "note": "better",
            "stopped": None,
            "stopped_everywhere": None,
            "month": {"tries": 1, "budget": 4, "spent": 0.0125, "alpha": 0.05},
            "tries": [attempt],
            "references": [{"id": "ref-1", "label": "v2", "examples": 150}],
        }
    )
    assert "1 of 4 tries this month, alpha 0.0125 of 0.05 spent" in page and "drift: promoted" in page
    assert "reference v2  150       0.900  0.880      4.6 of 4.4  passed" in page
    assert "reference ref-1: v2, 150 examples" in page
