"""What `make first-hour` types: the README's commands, each whole, with all steps of the first hour among them."""

from __future__ import annotations

import os
import re

import pytest

from tests.campaigns.first_hour import EXPECTED, Log, Terminal, blocks, commands, judged
from tests.support.server import ROOT

TYPED = [command for kind, block in blocks((ROOT / "README.md").read_text()) for command in commands(kind, block)]


def test_the_readme_serves_first_and_has_each_step_once_in_order():
    assert TYPED[0].startswith("make serve ")
    places = [[at for at, command in enumerate(TYPED) if re.search(part, command)] for part, _ in EXPECTED]
    assert all(len(place) == 1 for place in places)
    assert places == sorted(places)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/how-do-i.md"])
def test_the_six_words_are_said_on_the_first_pages(page):
    text = (ROOT / page).read_text().lower()
    assert all(re.search(rf"\b{word}\b", text) for word in ("adapter", "version", "live", "canary", "drift", "job"))


def test_a_command_is_what_bash_takes_as_whole():
    assert commands("bash", "a \\\n  b\n# said\n\nc <<'E'\nd\nE\n") == ["a \\\n  b", "c <<'E'\nd\nE"]
    assert commands("console", "$ loradock demo   # three minutes\n") == ["loradock demo   # three minutes"]
    with pytest.raises(AssertionError, match="waits for more"):
        commands("bash", "echo 'half\n")


def test_a_terminal_keeps_what_was_set_and_stops_at_what_fails(tmp_path, capsys):
    log = Log({str(tmp_path): "~"})
    terminal = Terminal(tmp_path, dict(os.environ), log)
    try:
        terminal.type("word=kept; cat")
        assert terminal.type("echo $word; pwd") == f"kept\n{tmp_path}\n"
        with pytest.raises(SystemExit, match="ended with 3"):
            terminal.type("(exit 3)")
    finally:
        terminal.close()
    assert "~" in log.lines and re.search(r"^\[00:0\d\] \$ echo", "\n".join(log.lines), re.M)


def test_an_answer_that_is_an_error_or_not_what_is_promised_ends_the_run():
    judged("loradock adapters promote tone@v2", "tone@v2 is live\n")
    with pytest.raises(SystemExit, match="does not say"):
        judged("loradock adapters promote tone@v2", "tone@v2 is a canary now\n")
    with pytest.raises(SystemExit, match="is refused"):
        judged("curl", '{"error": {"message": "no"}}')
