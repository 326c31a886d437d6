"""docs/how-do-i.md: each answer is a command that is taken, typed one after another."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from serve.cli import main as command
from serve.config import keys_hashed, load
from tests.support.backend import FakeBackend
from tests.support.pages import Page
from tests.support.served import Served
from tests.support.server import ROOT

ADMIN = "the-operators-own-key"
PAGE = Page(ROOT / "docs/how-do-i.md")
COMMANDS = [line for block in PAGE.of("sh") for line in block.splitlines() if "loradock" in line]
# What a reader has done before, where the answer is about something that is there.
BEFORE = {
    "adapters promote tone@v2": "adapters push tone ./my-next-adapter --no-promote",
    "adapters shadow": "adapters canary tone@v2 0",
    "adapters rm": "adapters unalias tone stable; adapters promote tone@v2",
}
# What needs a trainer, a model, a hub or what a tiny model does not have: that it is a command is tested elsewhere.
ELSEWHERE = (
    "demo",
    "doctor",
    "plan",
    "finetune",
    "data",
    "optimize",
    "engines swap",
    "drift accept",
    "drift acknowledge",
    "backup",
)


@pytest.fixture
def folder(tmp_path, make_adapter, monkeypatch):
    for name, seed in (("my-adapter", 0), ("my-next-adapter", 1)):
        shutil.copytree(make_adapter(seed), tmp_path / name)
    (tmp_path / "golden.jsonl").write_text(json.dumps({"prompt": "x", "equals": "y"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_thirty_answers_and_each_begins_with_its_command():
    answers = re.split(r"^\*\*", PAGE.text, flags=re.MULTILINE)[1:]
    assert len(answers) >= 30
    assert all(re.match(r"[^*]+\?\*\*(\n\n```sh\n| Open `http)", answer) for answer in answers)
    assert max(len(answer.split()) for answer in answers) < 60


def test_what_is_typed_on_a_server_does_what_it_says(bare_environment, config, folder, monkeypatch):
    config = replace(config, admin_keys=keys_hashed([ADMIN]))
    monkeypatch.setenv("LORADOCK_KEY", ADMIN)
    with Served(config, FakeBackend(config.model), ADMIN) as served:
        monkeypatch.setenv("LORADOCK_URL", served.url)
        done = []
        for line in COMMANDS:
            typed = line.partition("loradock ")[2]
            if typed.startswith(("serve", *ELSEWHERE)) or not line.startswith("loradock"):
                continue
            earlier = next((before for start, before in BEFORE.items() if typed.startswith(start)), "")
            for words in (*filter(None, earlier.split("; ")), typed):
                ended = CliRunner().invoke(command.app, shlex.split(words), env={**os.environ})
                assert ended.exit_code == 0, f"{words}\n{ended.output}"
            done.append(typed)
    assert len(done) >= 15, done


def test_each_way_to_start_it_is_a_configuration(monkeypatch):
    starts = [line.partition("loradock serve")[2] for line in COMMANDS if "loradock serve" in line]
    assert len(starts) >= 4
    for options in starts:
        environ = {"LORADOCK_ADMIN_KEYS": "0123456789abcdef0123456789abcdef"}
        assert load(shlex.split(options), environ)
