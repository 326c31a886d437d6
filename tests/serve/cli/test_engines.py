"""`loradock engines restart` waits, and says what came of it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from serve.cli.main import app
from serve.client.adapter_client import AdapterClient


@pytest.fixture
def restart(monkeypatch):
    """`restart(phases, *words)` runs the command against a server whose engine goes through these phases."""
    monkeypatch.setattr("serve.cli.engines.LOOK_SECONDS", 0.0)

    def run(phases, *words):
        left = list(phases)

        def engine(*_):
            phase = left.pop(0) if len(left) > 1 else left[0]
            return {"name": "base", "phase": phase, "reason": "no memory" if phase == "failed" else ""}

        monkeypatch.setattr(AdapterClient, "restart", engine)
        monkeypatch.setattr(AdapterClient, "engines", lambda client: {"data": [{"name": "other"}, engine()]})
        return CliRunner().invoke(app, ["engines", "restart", "base", *words])

    return run


def test_it_waits_until_the_engine_serves(restart):
    done = restart(["restarting", "restarting", "starting", "ready"])
    assert (done.exit_code, done.stdout) == (0, "base is ready after 0 s\n")


def test_an_engine_that_fails_again_is_said_with_the_reason(restart):
    done = restart(["restarting", "failed"])
    assert (done.exit_code, done.stdout) == (1, "base is failed after 0 s: no memory\n")
    told = restart(["restarting", "failed"], "--json")
    assert (told.exit_code, json.loads(told.stdout)["phase"]) == (1, "failed")


def test_an_engine_that_was_not_down_is_left_alone(restart):
    done = restart(["ready"])
    assert done.exit_code == 0 and "was not down" in done.stdout


def test_who_does_not_wait_hears_that_it_restarts(restart):
    done = restart(["restarting", "ready"], "--no-wait")
    assert (done.exit_code, done.stdout) == (0, "base is restarting after 0 s\n")


def test_the_wait_ends(restart):
    done = restart(["restarting"], "--timeout", "1")
    assert (done.exit_code, done.stdout.startswith("base is restarting after")) == (1, True)
