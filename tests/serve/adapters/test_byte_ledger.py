"""The ledger of bytes: reserved before they are written, by tenant; who filled the disk pays at its reserve."""

from __future__ import annotations

import threading

import pytest

from serve.adapters.byte_ledger import STEP, Bound, ByteLedger, Kind, size_of
from serve.errors import OutOfSpace, QuotaExceeded

MIB = 1 << 20
FILES = frozenset({Kind.FILES, Kind.ANSWERS})


def ledger_of(tmp_path, free=1 << 40, reserve=0, **kept):
    ledger = ByteLedger(tmp_path, reserve=reserve, free=lambda root: free)
    ledger.counts(Kind.FILES, lambda tenant: {name: n for name, n in kept.items() if tenant in (None, name)})
    return ledger


def test_what_is_under_way_counts_with_what_is_kept(tmp_path):
    ledger = ledger_of(tmp_path, acme=15 * MIB)
    ledger.bound(Bound(FILES, 20 * MIB, "files", "delete some"))
    first, second = ledger.room("acme", Kind.FILES), ledger.room("acme", Kind.ANSWERS)
    first.expect(3 * MIB)
    with pytest.raises(QuotaExceeded, match="delete some"):
        second.expect(3 * MIB)
    second.expect(2 * MIB)
    ledger.room("globex", Kind.FILES).expect(20 * MIB)
    first.close()
    second.take(5 * MIB)
    assert ledger.nbytes("acme") == 20 * MIB and ledger.totals()["acme"] == {"files": 15 * MIB, "answers": 5 * MIB}


def test_nothing_is_taken_where_there_is_no_room_for_it(tmp_path):
    ledger = ledger_of(tmp_path)
    ledger.bound(Bound(FILES, 100, "files", "delete some"))
    with ledger.room("acme", Kind.FILES) as room:
        room.take(60)
        with pytest.raises(QuotaExceeded, match="60 bytes, 41 more pass its 100"):
            room.take(41)
        room.take(40)
        assert room.written == 100
        room.give_back(10)
        room.take(10)
    assert ledger.nbytes("acme") == 0 and ledger.totals() == {}
    with pytest.raises(RuntimeError):
        room.take(1)


def test_uploads_of_a_key_take_its_quota_together_and_what_they_unpack_once_more(tmp_path):
    ledger = ledger_of(tmp_path)
    rooms = [ledger.room("acme", Kind.UPLOADS, quota=20 * MIB) for _ in range(16)]
    taken = 0
    for room in rooms:
        try:
            for _ in range(17):
                room.take(MIB)
                taken += 1
        except QuotaExceeded:
            continue
    assert taken == 20
    inner = rooms[0].beside(Kind.UNPACKED)
    inner.take(20 * MIB)
    with pytest.raises(QuotaExceeded):
        inner.take(1)
    rooms[0].close()
    assert ledger.nbytes("acme", Kind.UNPACKED) == 0


def test_many_threads_never_pass_a_bound_together(tmp_path):
    ledger = ledger_of(tmp_path)
    ledger.bound(Bound(FILES, 50 * STEP, "files", "delete some"))
    taken, start = [], threading.Barrier(8)

    def writer():
        room = ledger.room("acme", Kind.FILES)
        start.wait()
        try:
            for _ in range(100):
                room.take(STEP // 2)
                taken.append(STEP // 2)
        except QuotaExceeded:
            pass

    threads = [threading.Thread(target=writer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == ledger.nbytes("acme") == 50 * STEP


def test_at_the_reserve_the_tenant_that_filled_the_disk_is_refused_and_the_other_goes_on(tmp_path):
    ledger = ledger_of(tmp_path, free=200 * MIB, reserve=256 * MIB, acme=9000 * MIB, globex=MIB)
    with pytest.raises(OutOfSpace, match="acme"):
        ledger.room("acme", Kind.FILES).expect(MIB)
    ledger.room("globex", Kind.FILES).expect(MIB)
    ledger.room("newcomer", Kind.UPLOADS).expect(MIB)
    with pytest.raises(OutOfSpace):  # nobody writes into the last quarter
        ledger.room("globex", Kind.FILES).expect(150 * MIB)


def test_a_tenant_that_is_alone_stays_above_the_reserve(tmp_path):
    ledger = ledger_of(tmp_path, free=200 * MIB, reserve=256 * MIB)
    with pytest.raises(OutOfSpace, match="reserve of 256 MiB"):
        ledger.room("acme", Kind.FILES).expect(MIB)


def test_promised_bytes_keep_the_reserve_too_but_not_from_those_with_little(tmp_path):
    ledger = ledger_of(tmp_path, free=1000 * MIB, reserve=256 * MIB)
    ledger.room("acme", Kind.UPLOADS).expect(700 * MIB)
    with pytest.raises(OutOfSpace):
        ledger.room("acme", Kind.UPLOADS).expect(100 * MIB)
    ledger.room("globex", Kind.UPLOADS).expect(100 * MIB)


def test_what_another_program_wrote_is_counted_and_refused(tmp_path):
    ledger = ledger_of(tmp_path)
    ledger.bound(Bound(frozenset({Kind.TRAINING}), 100, "training", "cancel a job"))
    (tmp_path / "job/checkpoints").mkdir(parents=True)
    (tmp_path / "job/checkpoints/one").write_bytes(b"x" * 90)
    room = ledger.room("acme", Kind.TRAINING)
    room.measure(size_of(tmp_path / "job"))
    (tmp_path / "job/two").write_bytes(b"x" * 90)
    with pytest.raises(QuotaExceeded, match="cancel a job"):
        room.measure(size_of(tmp_path / "job"))
    assert ledger.nbytes("acme") == 180
    room.measure(90)


def test_a_disk_with_less_than_the_reserve_is_a_problem_in_a_sentence(tmp_path):
    assert ledger_of(tmp_path, free=5 * MIB, reserve=5 * MIB).problem == ""
    problem = ledger_of(tmp_path, free=4 * MIB, reserve=5 * MIB).problem
    assert problem.startswith("the disk has 4 MiB free, less than the reserve of 5 MiB")
