"""A process is cut by a real signal; the order of the system calls is watched where no cut can show it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from serve.files import fsync_tree, rename, write_whole


@pytest.fixture
def calls(monkeypatch):
    """fsync and rename in the order they come, by the name of the file or folder."""
    order = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        order.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def watched_replace(source, target):
        order.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return order


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_return(tmp_path, calls):
    write_whole(tmp_path / "a.json", b"new")
    (content, staged), name, folder = calls
    assert content == "fsync" and staged.startswith(".a.json.")
    assert name == ("rename", "a.json")
    assert folder == ("fsync", tmp_path.name)


def test_a_rename_between_two_folders_is_kept_in_both(tmp_path, calls):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "a").write_bytes(b"x")
    rename(tmp_path / "from" / "a", tmp_path / "to" / "a")
    assert calls == [("rename", "a"), ("fsync", "to"), ("fsync", "from")]


def test_a_tree_is_fsynced_down_to_its_files(tmp_path, calls):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"x")
    fsync_tree(tmp_path)
    assert {name for _, name in calls} == {tmp_path.name, "inner", "a", "b"}


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_writer_that_is_killed_leaves_one_whole_content(tmp_path):
    path = tmp_path / "a"
    write_whole(path, b"0" * 100_000)
    writer = (
        "import sys, itertools; from pathlib import Path; from serve.files import write_whole\n"
        "for turn in itertools.cycle(b'0123456789'):\n"
        "    write_whole(Path(sys.argv[1]), bytes([turn]) * 100_000); print(flush=True)\n"
    )
    for turns in (1, 2, 5):
        process = subprocess.Popen([sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE)
        for _ in range(turns):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        content = path.read_bytes()
        assert len(content) == 100_000
        assert len(set(content)) == 1
