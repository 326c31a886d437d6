"""Adapter bytes where several servers find them."""

from __future__ import annotations

import time

import pytest

from serve.adapters.adapter import FILES
from serve.adapters.shared_store import GRACE_SECONDS, PASSING, SharedStore
from serve.adapters.store import Store
from serve.errors import ConfigError, EngineUnavailable, NotFound


@pytest.fixture(params=["file", "s3"])
def blobs(request, tmp_path):
    if request.param == "file":
        return SharedStore(f"file://{tmp_path}/alone/blobs")
    request.getfixturevalue("s3")
    return SharedStore("s3://models/adapters")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", reserve=0)


def test_what_one_store_publishes_another_brings(blobs, store, tmp_path, make_adapter):
    store.shared = blobs
    digest = store.admit(make_adapter())
    store.publish(digest)
    store.publish(digest)
    (tmp_path / "got").mkdir()
    blobs.get(digest, tmp_path / "got")
    for name in FILES:
        assert (tmp_path / "got" / name).read_bytes() == (store.path(digest) / name).read_bytes()


async def test_bytes_that_are_not_what_their_name_says_are_not_brought(blobs, store, tmp_path, make_adapter):
    digest = store.admit(make_adapter(0))
    blobs.put(digest, make_adapter(1))
    other = Store(tmp_path / "other", reserve=0, shared=blobs)
    with pytest.raises(EngineUnavailable, match="damaged"):
        await other.bring(digest)
    assert not other.digests()


async def test_bytes_that_nobody_has_are_not_found(blobs, tmp_path):
    with pytest.raises(NotFound):
        await Store(tmp_path / "other", reserve=0, shared=blobs).bring("0" * 64)


def test_what_nobody_names_stays_for_a_day(blobs, store, make_adapter):
    kept, lost = (store.admit(make_adapter(seed)) for seed in (0, 1))
    for digest in (kept, lost):
        blobs.put(digest, store.path(digest))
    assert blobs.sweep({kept}) == 0
    assert blobs.sweep({kept}, now=time.time() + GRACE_SECONDS + 60) == 1
    with pytest.raises(NotFound):
        blobs.get(lost, store.root)
    blobs.get(kept, store.root)


def test_what_never_arrived_is_gone_after_a_day(blobs, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    passing = f"{PASSING}ftjob-1-progress.jsonl"
    for id in (passing, "file-1"):
        blobs.put_file(id, file)
    blobs.sweep(())
    assert blobs.has_file(passing)
    blobs.sweep((), now=time.time() + GRACE_SECONDS + 60)
    assert blobs.has_file("file-1") and not blobs.has_file(passing)


def test_a_folder_by_url_is_as_a_server_alone_has_it(store, tmp_path, make_adapter):
    digest = store.admit(make_adapter())
    SharedStore(f"file://{tmp_path}/alone/blobs").put(digest, store.path(digest))
    assert Store(tmp_path / "alone", reserve=0).verify(digest)


def test_what_is_no_folder_by_url_is_a_sentence():
    with pytest.raises(ConfigError, match="folder by URL"):
        SharedStore("nonsense://x")


def test_a_place_that_does_not_answer_is_unavailable(tmp_path, store, make_adapter):
    (tmp_path / "file").write_text("no folder")
    digest = store.admit(make_adapter())
    with pytest.raises(EngineUnavailable, match="did not answer"):
        SharedStore(f"file://{tmp_path}/file/blobs").put(digest, store.path(digest))
