"""Two runs never make one output at the same time."""

from __future__ import annotations

import fcntl
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from optimize.errors import Refused
from optimize.pipeline import lock, run


def making(out: Path) -> Any:
    return run.Run(None, None, out, 0, lambda *_: None).working()  # type: ignore[arg-type]


def test_a_second_run_is_refused_and_the_lock_leaves_nothing(tmp_path):
    with making(tmp_path / "out"):
        with pytest.raises(Refused, match="another run is making"), making(tmp_path / "out"):
            pass
        assert (tmp_path / ".out.lock").exists()
    assert not (tmp_path / ".out.lock").exists()
    with making(tmp_path / "out"):
        pass


def test_a_lock_file_that_the_run_before_removes_just_now_is_no_lock(tmp_path, monkeypatch):
    """The second run has opened the file when the first one ends; a third one comes while the second works."""
    first = ExitStack()
    first.enter_context(making(tmp_path / "out"))
    flock = fcntl.flock

    def first_ends_before(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.close()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", first_ends_before)
    with making(tmp_path / "out"), pytest.raises(Refused), making(tmp_path / "out"):
        pass


def test_a_file_left_by_a_killed_run_is_taken(tmp_path):
    (tmp_path / ".out.lock").touch()
    with lock.held(tmp_path / "out"):
        pass
