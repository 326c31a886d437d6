"""docs/how-do-i.md: each answer is a command that is taken, typed one after another."""

from __future__ import annotations

import re
import shlex

from serve.config import load
from tests.support.pages import Page
from tests.support.server import ROOT

PAGE = Page(ROOT / "docs/how-do-i.md")
COMMANDS = [line for block in PAGE.of("sh") for line in block.splitlines() if "loradock" in line]


def test_there_are_thirty_answers_and_each_begins_with_its_command():
    answers = re.split(r"^\*\*", PAGE.text, flags=re.MULTILINE)[1:]
    assert len(answers) >= 30
    assert all(re.match(r"[^*]+\?\*\*(\n\n```sh\n| Open `http)", answer) for answer in answers)
    assert max(len(answer.split()) for answer in answers) < 60


def test_each_way_to_start_it_is_a_configuration(monkeypatch):
    starts = [line.partition("loradock serve")[2] for line in COMMANDS if "loradock serve" in line]
    assert len(starts) >= 4
    for options in starts:
        environ = {"LORADOCK_ADMIN_KEYS": "0123456789abcdef0123456789abcdef"}
        assert load(shlex.split(options), environ)
