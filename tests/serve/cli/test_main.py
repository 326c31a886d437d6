"""The command itself: help by `-h` everywhere, completion, and errors as JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from serve import config
from serve.cli import main as command
from serve.config import groups
from serve.errors import AdapterRejected

GROUPS = typer.main.get_command(command.app).commands


def commands():
    for name, group in sorted(GROUPS.items()):
        yield [name]
        for child in sorted(getattr(group, "commands", {})):
            yield [name, child]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_by_its_short_name(words):
    short, long = (CliRunner().invoke(command.app, [*words, flag]) for flag in ("-h", "--help"))
    assert (short.exit_code, long.exit_code) == (0, 0), short.output
    assert short.output == long.output and "Usage" in short.output


@pytest.mark.parametrize(
    "words",
    ["adapter list", "adapters ls", "adapters delete", "golden list", "golden ls", "finetune logs", "finetune ls",
     "drift show", "drift list", "engine list", "key ls", "loops list", "keys delete", "baselines save"],
)  # fmt: skip
def test_what_people_type_is_a_command(words):
    done = CliRunner().invoke(command.app, [*words.split(), "--help"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("loradock ada", {"adapters"}),
        ("loradock adapters pr", {"promote"}),
        ("loradock engines ", {"list", "swap", "restart"}),
    ],
)
def test_a_shell_completes_commands(typed, offered):
    words = typed.split(" ")
    asked = {"_LORADOCK_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    code = "from serve.cli.main import app; app(prog_name='loradock')"
    process = [sys.executable, "-c", code]
    done = subprocess.run(process, env={**os.environ, **asked}, capture_output=True, text=True, timeout=60, check=False)
    assert set(done.stdout.split()) == offered, done.stderr


def test_completion_can_be_shown_and_installed():
    text = CliRunner().invoke(command.app, ["--help"]).output
    assert "--install-completion" in text and "--show-completion" in text


def test_an_error_before_any_server_is_asked_is_json_too(monkeypatch, capsys):
    def refuse(*_, **__):
        raise AdapterRejected("no", problems=["one", "two"])

    monkeypatch.setattr("serve.models.checkpoint.find", refuse)
    for flags in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["loradock", "plan", "toy", *flags])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 2
        written = capsys.readouterr().err
        if flags:
            assert json.loads(written)["error"]["problems"] == ["one", "two"]
    assert written == "loradock: no\n  - one\n  - two\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapters", "push", "tone"], "Missing argument 'PATH'."),
        (["adapters", "canary", "tone", "2", "1.5"], "'SHARE'"),
        (["adapters", "lst"], "No such command 'lst'"),
        (["adapters", "list", "--colour"], "No such option"),
        (["backup", "x.tar"], "No such option: --json"),
        (["doctor", "--port", "no-port"], "port takes"),
    ],
)
def test_a_command_that_is_wrong_is_json_after_json_and_a_sentence_without(monkeypatch, capsys, words, says):
    monkeypatch.delenv("LORADOCK_TEST_POSTGRES", raising=False)
    monkeypatch.setattr(sys, "argv", ["loradock", *words, "--json"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert says in error["message"] and error["type"] == "config_error"


def test_help_is_grouped_and_a_command_is_a_line_of_it():
    text = CliRunner().invoke(command.app, ["--help"], env={"COLUMNS": "80"}).output
    panels = re.findall(r"─ (\w+) ─", text)
    assert panels == ["Options", "Start", "Adapters", "Watch", "Train", "Operate"]
    for words in (
        ["--help"],
        *([name, "--help"] for name, group in GROUPS.items() if hasattr(group, "commands") and name != "bench"),
    ):
        text = CliRunner().invoke(command.app, words, env={"COLUMNS": "80"}).output
        after = text.partition("-h ")[2]
        shown = [line for line in after.splitlines()[1:] if line.startswith("│")]
        assert not [line for line in shown if line.startswith("│     ")], "a command takes more than a line"


def test_the_help_of_serve_shows_what_is_used_most_and_more_when_asked():
    short = CliRunner().invoke(command.app, ["serve", "--help"]).output
    every = CliRunner().invoke(command.app, ["serve", "--help-all"])
    assert every.exit_code == 0
    shown = [name for name in config.SETTINGS if f"--{name.replace('_', '-')} " in short]
    assert set(shown) == {*groups.GROUPS[groups.COMMON]} and len(shown) <= 20
    assert not [name for name in config.SETTINGS if f"--{name.replace('_', '-')} " not in every.output]
    assert "(default: 8000)" in short and "Fine-tuning:" in every.output


def test_every_setting_stands_in_one_group():
    grouped = [name for names in groups.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(config.SETTINGS)
