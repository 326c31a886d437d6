"""Contents of files: whole or absent, on this server and where all servers look."""

from __future__ import annotations

import pytest

from serve.adapters.shared_store import SharedStore
from serve.errors import NotFound
from serve.jobs.batches.file_bytes import GRACE_SECONDS, FileBytes


def kept(contents, id, data=b"data"):
    with contents.incoming() as (path, sink):
        sink.write(data)
        contents.keep(id, path)


@pytest.fixture
def shared(tmp_path):
    return SharedStore(f"file://{tmp_path}/shared")


def contents_of(tmp_path, name="here", shared=None):
    return FileBytes(tmp_path / name / "files", shared)


def test_what_was_not_kept_is_gone_and_so_is_what_a_kill_left(tmp_path):
    contents = contents_of(tmp_path)
    kept(contents, "file-1")
    with contents.incoming() as (path, sink):
        sink.write(b"x")
    assert not path.exists()
    (path.parent / "torn").write_bytes(b"x")
    again = contents_of(tmp_path)
    assert again.path("file-1").read_bytes() == b"data" and not list(path.parent.iterdir())
    assert not again.has("file-2")
    with pytest.raises(NotFound):
        again.path("file-2")


def test_another_server_reads_what_is_shared(tmp_path, shared):
    here, there = contents_of(tmp_path, shared=shared), contents_of(tmp_path, "there", shared)
    kept(here, "file-1")
    assert there.has("file-1") and there.path("file-1").read_bytes() == b"data"
    here.remove("file-1")
    assert not here.has("file-1")
    here.remove("file-1")
    there.sweep(set(), now=there.path("file-1").stat().st_mtime + GRACE_SECONDS + 1)
    assert not there.has("file-1")
    with pytest.raises(NotFound):
        there.path("file-1")
    assert shared.sweep(set()) == 0, "a sweep of adapters leaves files alone"


def test_s3_keeps_files_too(tmp_path, s3):
    shared = SharedStore("s3://models/prefix")
    here, there = contents_of(tmp_path, shared=shared), contents_of(tmp_path, "there", shared)
    kept(here, "file-1")
    assert there.path("file-1").read_bytes() == b"data"
    here.remove("file-1")
    assert not shared.has_file("file-1") and shared.sweep(set()) == 0


def test_a_file_that_is_about_to_get_its_row_is_not_swept(tmp_path):
    contents = contents_of(tmp_path)
    kept(contents, "file-1")
    kept(contents, "file-2")
    contents.sweep({"file-2"})
    assert contents.has("file-1")
    contents.sweep({"file-2"}, now=contents.path("file-1").stat().st_mtime + GRACE_SECONDS + 1)
    assert not contents.has("file-1") and contents.has("file-2")
