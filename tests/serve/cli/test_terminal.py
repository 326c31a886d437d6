"""What the commands that speak to a server share."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from serve.cli.main import app
from serve.client.adapter_client import AdapterClient

SAVED = b"what the server sent"


@pytest.fixture
def runner(monkeypatch):
    for method in ("moved_requests", "save_baseline"):
        monkeypatch.setattr(AdapterClient, method, lambda *_: SAVED)
    return CliRunner()


@pytest.mark.parametrize("command", [("drift", "requests"), ("baseline", "save")])
def test_what_a_command_saves_is_in_the_file_or_a_sentence_says_why_not(runner, command, tmp_path):
    file = tmp_path / "saved"
    assert runner.invoke(app, [*command, "tone", str(file)]).exit_code == 0
    assert file.read_bytes() == SAVED
    failed = runner.invoke(app, [*command, "tone", str(tmp_path / "missing" / "saved")])
    assert failed.exit_code == 2, failed.output
    assert failed.stderr.startswith(f"loradock {command[0]}: ") and "missing/saved cannot be written" in failed.stderr
