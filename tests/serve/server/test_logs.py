"""The terminal shows our own lines, the file in the data directory everything, whoever writes it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from serve.server.logs import KEPT

PROGRAM = """
import logging, os, subprocess, sys
from pathlib import Path
from serve.server.logs import Log

def child(words):
    subprocess.run([sys.executable, "-c", f"import sys; print({words!r}); print('and ' + {words!r}, file=sys.stderr)"])

log = logging.getLogger("serve.something")
with Log(Path(sys.argv[1]) / "log", sys.argv[2], 20_000) as output:
    output.watch()
%s
print("after")
"""


def run(folder: Path, level: str, body: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM % "\n".join(f"    {line}" for line in body.splitlines())
    done = subprocess.run([sys.executable, "-c", program, folder, level], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("after\n"), done.stderr
    return done


def logged(folder: Path) -> str:
    return (folder / "log" / "server.log").read_text()


BODY = """
child("vLLM speaks")
print("torch speaks")
log.info("ready")
log.warning("no compiler")
log.debug("a detail")
"""


def test_by_default_our_own_lines_are_shown_and_the_file_has_everything(tmp_path):
    shown = run(tmp_path, "info", BODY)
    assert [line.rpartition("] ")[2] for line in shown.stderr.splitlines()] == ["ready", "no compiler"]
    assert shown.stdout == "after\n"
    for line in ("vLLM speaks", "and vLLM speaks", "torch speaks", "ready", "no compiler"):
        assert line in logged(tmp_path)
    assert "a detail" not in logged(tmp_path)


def test_a_terminal_that_wants_errors_only_takes_nothing_from_the_file(tmp_path):
    assert run(tmp_path, "error", BODY).stderr == ""
    assert "ready" in logged(tmp_path) and "vLLM speaks" in logged(tmp_path)


def test_debug_shows_everything(tmp_path):
    shown = run(tmp_path, "debug", BODY).stderr
    assert shown == logged(tmp_path)
    assert "vLLM speaks" in shown and "a detail" in shown


def test_a_restart_goes_on_in_the_same_file_which_is_its_owners_alone(tmp_path):
    run(tmp_path, "info", 'print("the first")')
    second = run(tmp_path, "debug", 'print("the second")')
    assert logged(tmp_path) == "the first\nthe second\n" and second.stderr == "the second\n"
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "log" / "server.log").stat().st_mode) == 0o600


@pytest.mark.parametrize("level", ["info", "debug"])
def test_the_files_are_bounded_however_much_is_written(tmp_path, level):
    body = """
for turn in range(8):
    os.write(1, b"x" * 24_000 + b"\\n")
    output.tidy()
os.write(1, b"the end\\n")
"""
    shown = run(tmp_path, level, body)
    files = sorted(file.name for file in (tmp_path / "log").iterdir())
    assert files == ["server.log", *(f"server.log.{number}" for number in range(1, KEPT + 1))]
    assert logged(tmp_path).endswith("the end\n")
    assert sum(os.path.getsize(tmp_path / "log" / name) for name in files) < 24_100 * (KEPT + 1)
    assert shown.stderr.count("x") == (8 * 24_000 if level == "debug" else 0)


ENGINE_FAILS = r"""
print("(EngineCore pid=7) INFO 11-25 13:16:45 [core.py:133] Initializing")
for line in ("EngineCore failed to start.", "Traceback (most recent call last):", '  File "core.py", line 1, in f',
             "    raise ValueError()", "    ^^^^^", "ValueError: the head size 7 is not supported"):
    print("(EngineCore pid=7) ERROR 11-25 13:16:45 [core.py:1234] " + line)
print("[rank0]: leaked something")
output.show_errors()
"""


def test_a_start_that_fails_shows_the_errors_without_their_tracebacks(tmp_path):
    run(tmp_path, "info", 'print("ERROR 11-25 13:16:45 [core.py:1] an error of yesterday")')
    first, second, where = run(tmp_path, "info", ENGINE_FAILS).stderr.splitlines()
    assert first.strip() == "EngineCore failed to start."
    assert second.strip() == "ValueError: the head size 7 is not supported"
    assert str(tmp_path / "log" / "server.log") in where


def test_a_process_that_ended_without_an_error_shows_its_last_lines(tmp_path):
    shown = run(tmp_path, "info", "os.write(2, b'terminate called\\n')\noutput.show_errors()").stderr
    assert "terminate called" in shown


def test_a_file_in_the_place_of_the_folder_is_a_sentence(tmp_path):
    from serve.errors import ConfigError
    from serve.server.logs import Log

    (tmp_path / "log").touch()
    with pytest.raises(ConfigError, match="--data-dir"), Log(tmp_path / "log", "info"):
        pass


def test_a_warning_that_is_repeated_word_for_word_is_written_once_a_minute(tmp_path):
    body = """
from serve.server import logs
for seconds in (0, 0.2, 59, 61):
    logs.clock = lambda: seconds
    for batch in ("one", "two"):
        log.warning("the disk is full: %s waits", batch)
    log.info("a step")
    try:
        raise ValueError(seconds)
    except ValueError:
        log.exception("it failed")
"""
    shown = run(tmp_path, "info", body).stderr
    waits = [line.rpartition("] ")[2] for line in shown.splitlines() if " waits" in line]
    assert waits == [
        "the disk is full: one waits",
        "the disk is full: two waits",
        "the disk is full: one waits (and 2 times since it was last written)",
        "the disk is full: two waits (and 2 times since it was last written)",
    ]
    assert shown.count("a step") == 4 and shown.count("\nValueError: ") == 4
    assert logged(tmp_path).count("one waits") == 2
