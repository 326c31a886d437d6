from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from serve.server.temporary_folder import LONGEST, temporary_folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A short one: pytest's own is nearly as long as a socket's path may be."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_what_is_temporary_goes_with_the_server(place, tmp_path):
    with temporary_folder(tmp_path):
        Path(tempfile.mkdtemp(prefix="pymp-"), "socket").touch()
        assert Path(os.environ["TMPDIR"]) == Path(tempfile.gettempdir()) != place
        assert os.stat(tempfile.gettempdir()).st_mode & 0o777 == 0o700
    assert not list(place.iterdir())
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(place)


def test_what_a_killed_server_left_goes_at_the_next_start_and_another_servers_stays(place, tmp_path):
    with temporary_folder(tmp_path / "other"):
        others = Path(tempfile.mkdtemp())
        os.environ["TMPDIR"], tempfile.tempdir = str(place), None
        killed = temporary_folder(tmp_path)
        killed.__enter__()
        left = Path(tempfile.mkdtemp())
        os.environ["TMPDIR"], tempfile.tempdir = str(place), None
        with temporary_folder(tmp_path):
            assert not left.exists() and others.exists()


def test_where_it_cannot_be_made_things_stay_as_they_are(place, tmp_path, monkeypatch):
    with temporary_folder(tmp_path):
        name = os.environ["TMPDIR"]
    Path(name).symlink_to(tmp_path)
    with temporary_folder(tmp_path):
        assert tempfile.gettempdir() == str(place)
    long = place / ("a" * LONGEST)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    tempfile.tempdir = None
    with temporary_folder(tmp_path):
        assert tempfile.gettempdir() == str(long)
