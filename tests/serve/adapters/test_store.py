"""What lies under a digest is whole, private, and there once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.adapters.adapter import CONFIG, FILES, WEIGHTS
from serve.adapters.byte_ledger import Kind
from serve.adapters.store import Store
from serve.errors import AdapterRejected, NotFound, OutOfSpace


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", reserve=0)


def fill(folder: Path, weights: bytes = b"weights", config: bytes = b"{}") -> Path:
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def admit(store: Store, weights: bytes = b"weights", config: bytes = b"{}") -> str:
    with store.quarantine() as folder:
        return store.admit(fill(folder, weights, config))


def leftovers(store: Store) -> list[str]:
    return os.listdir(store.root / "quarantine")


def test_what_is_admitted_is_found_under_its_digest(store):
    digest = admit(store)
    assert (store.path(digest) / WEIGHTS).read_bytes() == b"weights"
    assert store.digests() == {digest}
    assert store.verify(digest)
    assert leftovers(store) == []


def test_the_digest_is_the_documented_one(store):
    import hashlib

    total = hashlib.sha256()
    for name, data in sorted({CONFIG: b"{}", WEIGHTS: b"weights"}.items()):
        for part in (name.encode(), data):
            total.update(len(part).to_bytes(8, "little") + part)
    assert admit(store) == total.hexdigest()


def test_bytes_cannot_move_between_the_files_without_a_new_digest(store):
    assert admit(store, b"ab", b"c") != admit(store, b"b", b"ca")


def test_the_same_bytes_are_kept_once(store):
    assert admit(store) == admit(store)
    assert len(store.digests()) == 1


def test_only_the_two_files_are_kept(store):
    with store.quarantine() as folder:
        fill(folder)
        (folder / "README.md").write_text("hello")
        digest = store.admit(folder)
    assert sorted(os.listdir(store.path(digest))) == sorted(FILES)


def test_a_folder_from_elsewhere_is_copied_and_left_alone(store, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    digest = store.admit(fill(folder))
    (folder / WEIGHTS).write_bytes(b"changed afterwards")
    assert store.verify(digest)


def test_nobody_else_on_the_machine_can_read_them(store):
    digest = admit(store)
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert store.path(digest).stat().st_mode & 0o777 == 0o700
    assert all((store.path(digest) / name).stat().st_mode & 0o777 == 0o600 for name in FILES)


def test_quarantine_is_gone_however_it_ends(store):
    with store.quarantine() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(KeyError), store.quarantine() as folder:
        fill(folder)
        raise KeyError
    assert leftovers(store) == []


@pytest.mark.parametrize("missing", FILES)
def test_half_an_adapter_is_not_admitted(store, missing):
    with store.quarantine() as folder:
        (fill(folder) / missing).unlink()
        with pytest.raises(AdapterRejected, match=f"{missing} is missing"):
            store.admit(folder)
    assert store.digests() == set() and leftovers(store) == []


def test_a_link_is_not_admitted(store, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with store.quarantine() as folder:
        fill(folder)
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(secret)
        with pytest.raises(AdapterRejected):
            store.admit(folder)
    assert store.digests() == set()


@pytest.mark.parametrize("digest", ["", "..", "../../etc", "a" * 63, "A" * 64, "a" * 64 + "\n", None, "0" * 64])
def test_what_is_no_digest_is_no_path(store, digest):
    with pytest.raises(NotFound):
        store.path(digest)


def test_a_removed_blob_is_gone_and_may_come_back(store):
    digest = admit(store)
    assert store.remove(digest)
    assert not store.remove(digest)
    with pytest.raises(NotFound):
        store.path(digest)
    assert admit(store) == digest
    assert leftovers(store) == []


def test_a_blob_that_is_needed_again_is_not_removed(store):
    digest = admit(store)
    assert not store.remove(digest, unless=lambda digest: True)
    assert store.path(digest)


def test_a_removal_waits_until_the_registry_knows(store):
    digest = admit(store)
    known: set[str] = set()
    with ThreadPoolExecutor() as pool:
        with store.hold():
            removal = pool.submit(store.remove, digest, unless=known.__contains__)
            assert store.admit(_copy(store, digest)) == digest
            time.sleep(0.05)
            known.add(digest)
        assert removal.result() is False
    assert store.path(digest)


def _copy(store: Store, digest: str) -> Path:
    return store.path(digest)


def test_a_sweep_leaves_what_is_known_and_whole(store):
    kept, unknown, damaged = (admit(store, data) for data in (b"1", b"2", b"3"))
    (store.path(damaged) / CONFIG).unlink()
    (store.root / "quarantine" / "left").mkdir()
    (store.root / "quarantine" / "left" / WEIGHTS).write_bytes(b"half")
    (store.root / "blobs" / "stray").write_bytes(b"?")
    lost = "f" * 64
    found = store.sweep({kept, damaged, lost})
    assert store.digests() == {kept}
    assert found.removed == {unknown, damaged, "stray"}
    assert found.missing == {damaged, lost}
    assert found.leftovers == 1 and leftovers(store) == []


def test_bit_rot_is_noticed(store):
    digest = admit(store)
    (store.path(digest) / WEIGHTS).write_bytes(b"weightz")
    assert not store.verify(digest)
    assert not store.verify("0" * 64)


def test_a_disk_without_reserve_takes_nothing(tmp_path):
    store = Store(tmp_path, reserve=1 << 60)
    with pytest.raises(OutOfSpace, match="reserve"), store.quarantine():
        pass
    assert leftovers(store) == []


def test_what_is_expected_counts_before_it_comes(store):
    with store.ledger.room("acme", Kind.UPLOADS) as room, pytest.raises(OutOfSpace):
        room.expect(1 << 60)


def test_a_full_disk_is_said_in_a_sentence(store, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutOfSpace, match="disk is full"), store.quarantine():
        full()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpace, match="disk is full"):
        admit(store)
    monkeypatch.undo()
    assert store.digests() == set() and leftovers(store) == []


def test_many_at_once_admit_the_same_bytes_as_one_blob(store):
    start = threading.Barrier(8)

    def one(number: int) -> str:
        start.wait()
        return admit(store, b"x" * 100_000 if number % 2 else b"y" * 100_000)

    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(one, range(8)))
    assert len(digests) == 2 and store.digests() == digests
    assert all(store.verify(digest) for digest in digests)
    assert leftovers(store) == []


def test_two_stores_on_one_root_do_not_break_each_others_blob(tmp_path):
    stores = [Store(tmp_path, reserve=0) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        digests = list(pool.map(lambda number: admit(stores[number % 2], b"x" * 10_000), range(20)))
    assert len(set(digests)) == 1 and stores[0].verify(digests[0])


LOOP = """
import sys
from pathlib import Path
from serve.adapter import CONFIG, WEIGHTS
from serve.store import Store
store = Store(Path(sys.argv[1]), reserve=0)
n = 0
while True:
    n += 1
    with store.quarantine() as folder:
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_bytes(str(n).encode() * 20_000)
        digest = store.admit(folder)
    print(digest, flush=True)
    if n % 3 == 0:
        store.remove(digest)
        print("-" + digest, flush=True)
"""


def test_a_kill_in_the_middle_leaves_no_half_blob(tmp_path):
    acknowledged: set[str] = set()
    for delay in (0.02, 0.05, 0.11):
        child = subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        lines = [first, *child.stdout.read().splitlines()]
        child.wait()
        child.stdout.close()
        for line in filter(None, map(str.strip, lines)):
            if line.startswith("-"):
                acknowledged.discard(line[1:])
            else:
                acknowledged.add(line)
        store = Store(tmp_path, reserve=0)
        there = store.digests()
        assert all(store.verify(digest) for digest in there)
        # Of what was acknowledged only the one whose removal was under way may be gone.
        assert len(acknowledged - there) <= 1
        acknowledged &= there
        store.sweep(acknowledged)
        assert store.digests() == acknowledged and leftovers(store) == []
