"""Files and batches in the registry's database, SQLite's and PostgreSQL's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.adapters.registry.registry import Registry
from serve.errors import BadRequest, Conflict, NotFound, QuotaExceeded
from serve.jobs.batches.batch_rows import Answer, BatchRows, Part
from serve.jobs.batches.file_rows import FileRows
from serve.jobs.batches.objects import Batch, Limits, LineError, Status, StoredFile, Usage


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


LIMITS = replace(Limits(), tenant_files=3, tenant_bytes=100, open=2)


@pytest.fixture
def registry(url):
    with Registry(url) as registry:
        yield registry


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def files(registry, clock):
    return FileRows(registry, LIMITS, clock)


@pytest.fixture
def servers(registry, clock):
    """Two servers over one registry."""
    return [BatchRows(registry, LIMITS, me=me, clock=clock) for me in ("one", "two")]


@pytest.fixture
def rows(servers):
    return servers[0]


def stored(id, tenant="acme", nbytes=10, created=1000.0, purpose="batch", expires=5000.0):
    return StoredFile(id, tenant, "ana", purpose, "in.jsonl", nbytes, created, expires)


def made(id="batch_1", tenant="acme", created=1000.0, **more):
    fields = {"key": "k", "who": "ana", "status": Status.VALIDATING, "endpoint": "/v1/completions"}
    fields |= {"input_file": "file-1", "completion_window": "24h", "metadata": {"a": "b"}, "expires": created + 100}
    return Batch(id=id, tenant=tenant, created=created, file_seconds=60.0, **{**fields, **more})


def answer(line, completed=True, text="{}"):
    return Answer(line, completed, text, Usage(3, 1, 2))


def running(rows, total=3):
    rows.add(made())
    rows.claim("batch_1", 30)
    return rows.begin("batch_1", total)


def test_a_file_is_its_tenants_alone_until_it_expires(files, clock):
    files.add(stored("file-1"))
    assert files.get("acme", "file-1") == stored("file-1")
    for tenant, id in (("globex", "file-1"), ("acme", "file-2")):
        with pytest.raises(NotFound, match="No such File"):
            files.get(tenant, id)
    clock.now = 5000.0
    assert files.expired() == ["file-1"] and files.page("acme", **ALL).rows == []
    with pytest.raises(NotFound):
        files.get("acme", "file-1")


ALL = {"after": None, "limit": 10, "ascending": False, "purpose": None}


def test_files_come_in_pages_in_both_orders(files):
    for number in (1, 2, 3):
        files.add(stored(f"file-{number}", created=1000.0 + number // 2))
    files._limits = replace(LIMITS, tenant_files=10)
    files.add(stored("file-9", tenant="globex"))
    first = files.page("acme", **{**ALL, "limit": 2})
    assert ([file.id for file in first.rows], first.has_more) == (["file-3", "file-2"], True)
    rest = files.page("acme", **{**ALL, "limit": 2, "after": "file-2"})
    assert ([file.id for file in rest.rows], rest.has_more) == (["file-1"], False)
    upwards = files.page("acme", **{**ALL, "ascending": True, "after": "file-1"})
    assert [file.id for file in upwards.rows] == ["file-2", "file-3"]
    assert files.page("acme", **{**ALL, "purpose": "batch_output"}).rows == []
    with pytest.raises(BadRequest, match="after"):
        files.page("acme", **{**ALL, "after": "file-9"})


def test_a_tenant_keeps_so_many_files_and_bytes(files):
    files.add(stored("file-1", nbytes=90))
    with pytest.raises(QuotaExceeded, match="100"):
        files.add(stored("file-2", nbytes=20))
    files.add(stored("file-2", tenant="globex", nbytes=20))
    files.add(stored("file-3"))
    files.add(stored("file-4", nbytes=0))
    with pytest.raises(QuotaExceeded, match="3 are the most"):
        files.check_count("acme")
    assert files.totals() == (4, 120) and files.ids() == {"file-1", "file-2", "file-3", "file-4"}


def test_a_file_that_a_batch_reads_is_neither_removed_nor_expired(files, rows, clock):
    files.add(stored("file-1"))
    rows.add(made())
    with pytest.raises(Conflict, match="batch_1"):
        files.check_unused("acme", "file-1")
    clock.now = 5000.0
    assert files.expired() == []
    rows.cancel("acme", "batch_1")
    rows.claim("batch_1", 30)
    rows.finish("batch_1", Status.CANCELLED, 0, None, None)
    assert files.expired() == ["file-1"]


def test_a_batch_is_read_as_it_was_made_and_only_by_its_tenant(rows):
    rows.add(made())
    assert rows.get("acme", "batch_1") == replace(made(), errors=[])
    for tenant, id in (("globex", "batch_1"), ("acme", "batch_2")):
        with pytest.raises(NotFound, match="No batch found"):
            rows.get(tenant, id)
        with pytest.raises(NotFound):
            rows.cancel(tenant, id)
    assert rows.page("globex", after=None, limit=5).rows == []


def test_a_tenant_has_so_many_batches_under_way(rows):
    rows.add(made("batch_1"))
    rows.add(made("batch_2"))
    rows.add(made("batch_3", tenant="globex"))
    with pytest.raises(QuotaExceeded, match="2 are the most"):
        rows.add(made("batch_4"))
    rows.claim("batch_1", 30)
    rows.fail("batch_1", [LineError("empty_batch", "nothing")])
    rows.add(made("batch_4", created=1001.0))
    page = rows.page("acme", after=None, limit=2)
    assert ([batch.id for batch in page.rows], page.has_more) == (["batch_4", "batch_2"], True)


def test_one_server_at_a_time_has_a_batch_until_its_claim_ends(servers, clock):
    one, two = servers
    one.add(made())
    assert one.claim("batch_1", 30) and one.claim("batch_1", 30) and two.claim("batch_1", 30) is None
    two.release("batch_1")
    assert two.claim("batch_1", 30) is None
    clock.now += 31
    assert two.claim("batch_1", 30) and one.claim("batch_1", 30) is None
    two.release("batch_1")
    assert one.claim("batch_1", 30)
    two.release()
    assert two.claim("batch_1", 30), "a server that is alone takes every claim back"


def test_an_answer_counts_only_with_the_claim_and_with_its_part(servers, clock):
    one, two = servers
    running(one)
    assert one.record("batch_1", answer(2), "part", 10) and not two.record("batch_1", answer(1), "another", 10)
    clock.now += 31
    two.claim("batch_1", 30)
    assert not one.record("batch_1", answer(1), "part", 20), "its claim is another's by now"
    assert two.record("batch_1", answer(1, completed=False), "second", 12)
    assert two.record("batch_1", answer(3), "second", 24)
    batch = two.get("acme", "batch_1")
    assert (batch.total, batch.completed, batch.failed, batch.usage) == (3, 2, 1, Usage(9, 3, 6))
    assert two.parts("batch_1") == [Part("batch_1", "acme", "part", 10), Part("batch_1", "acme", "second", 24)]


def test_a_finished_batch_has_its_files_and_no_answers_in_the_database(rows, files):
    running(rows)
    rows.record("batch_1", answer(1), "part", 10)
    assert rows.finalizing("batch_1").status is Status.FINALIZING
    output = stored("file-out", purpose="batch_output")
    assert rows.finish("batch_1", Status.EXPIRED, 2, output, None)
    batch = rows.get("acme", "batch_1")
    assert (batch.status, batch.output_file, batch.error_file) == (Status.EXPIRED, "file-out", None)
    assert (batch.completed, batch.failed) == (1, 2)
    assert set(batch.times) == {"in_progress", "finalizing", "expired"}
    assert files.get("acme", "file-out") == output and rows.parts("batch_1") == []
    assert not rows.finish("batch_1", Status.COMPLETED, 0, None, None), "it is at its end"
    assert rows.open() == []


def test_a_cancelled_batch_asks_nothing_more_and_is_cancelled_once(rows):
    running(rows)
    assert rows.cancel("acme", "batch_1").status is Status.CANCELLING
    assert rows.cancel("acme", "batch_1").status is Status.CANCELLING
    assert rows.finalizing("batch_1").status is Status.CANCELLING
    rows.finish("batch_1", Status.CANCELLED, 3, None, None)
    with pytest.raises(Conflict, match="cancelled"):
        rows.cancel("acme", "batch_1")


def test_a_batch_whose_input_is_wrong_says_where(rows):
    rows.add(made())
    rows.claim("batch_1", 30)
    rows.fail("batch_1", [LineError("invalid_json_line", "no", 3)])
    described = rows.get("acme", "batch_1").described()
    assert described["status"] == "failed" and described["failed_at"] == 1000
    assert described["errors"]["data"] == [{"code": "invalid_json_line", "message": "no", "line": 3, "param": None}]


def test_old_batches_are_forgotten_once_they_are_at_their_end(rows, clock):
    for number in (1, 2):
        rows.add(made(f"batch_{number}"))
    rows.claim("batch_1", 30)
    rows.fail("batch_1", [])
    clock.now += 91 * 86_400
    rows.sweep()
    assert [batch.id for batch in rows.page("acme", after=None, limit=5).rows] == ["batch_2"]
