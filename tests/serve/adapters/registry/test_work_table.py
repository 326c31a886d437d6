"""The mechanism of work, with a kind of work that is a table and how its rows are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Column, Float, MetaData, String, Table, insert

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.work_table import Claims, WorkTable
from serve.errors import BadRequest, NotFound, QuotaExceeded
from serve.jobs.batches.batch_rows import BatchRows
from serve.jobs.finetuning.job_rows import JobRows
from serve.loop.loop_rows import LoopRows

SERVE = Path(__file__).parents[4] / "serve"
TABLE = Table(
    "toys",
    MetaData(),
    *(Column(name, String(64)) for name in ("id", "tenant", "status", "claimed_by")),
    *(Column(name, Float(53)) for name in ("created", "claimed_until")),
)


@dataclass(frozen=True)
class Toy:
    id: str
    tenant: str = "acme"
    status: str = "open"
    created: float = 1000.0

    def described(self):
        return {"id": self.id}


class Toys(WorkTable[Toy]):
    table = TABLE
    what = "toys"
    worked_on = not_ended = ("open",)
    under_way = "toys under way"
    limit_code = "toy_limit_exceeded"

    def _values(self, toy):
        return asdict(toy)

    def _read(self, row):
        return Toy(row.id, row.tenant, row.status, row.created)

    def _missing(self, id):
        return NotFound(f"there is no toy {id}")


@pytest.fixture
def servers(url):
    now = [1000.0]
    with Registry(url) as registry:
        with registry.transaction() as connection:
            TABLE.create(connection)
        limits = SimpleNamespace(open=3)
        yield *(Toys(registry, limits, me=me, clock=lambda: now[0]) for me in ("one", "two")), now


def test_one_server_works_on_it_until_its_claim_ends_or_is_handed_over(servers):
    one, two, now = servers
    one.add(Toy("a"))
    assert one.claim("a", 30) == Toy("a") == one.held("a") and two.claim("a", 30) is None and two.held("a") is None
    now[0] += 31
    assert two.claim("a", 30) and one.held("a") is None and not one.hand_over("a", "two", 30)
    assert two.hand_over("a", "one", 30) and one.held("a")
    one.release("a")
    assert one.held("a") is None and two.claim("a", 30)
    one.release()
    assert one.claim("a", 30), "a server that is alone takes every claim back"


def test_what_a_worker_on_another_machine_does_is_not_taken_from_it(servers):
    one, two, _ = servers
    one.add(Toy("a"))
    one.claim("a", 30)
    one.hand_over("a", "worker:key:gpu", 30)
    two.release()
    assert two.claim("a", 30) is None


def test_a_tenant_has_so_much_under_way_lists_its_own_and_loses_what_ended_long_ago(servers):
    rows, _, now = servers
    for number in range(3):
        rows.add(Toy(f"{number}", created=1000.0 + number))
    rows.add(Toy("other", tenant="globex", status="done"))
    with pytest.raises(QuotaExceeded, match="3 toys under way, and 3 are the most") as refused:
        rows.add(Toy("4"))
    assert refused.value.code == "toy_limit_exceeded"
    page = rows.page("acme", after=None, limit=2)
    assert ([toy.id for toy in page.rows], page.has_more) == (["2", "1"], True)
    assert rows.page("acme", after="1", limit=2).described()["data"] == [{"id": "0"}]
    for call in (lambda: rows.get("globex", "1"), lambda: rows.page("globex", after="1", limit=2)):
        with pytest.raises((NotFound, BadRequest)):
            call()
    assert [toy.id for toy in rows.open()] == ["0", "1", "2"]
    now[0] += 91 * 86_400
    rows.sweep()
    assert [toy.id for toy in rows.open()] == ["0", "1", "2"] and rows.page("globex", after=None, limit=2).rows == []


def test_a_list_goes_on_reading_until_it_has_what_fits(servers):
    rows, _, _ = servers
    with rows._registry.transaction() as connection:
        connection.execute(insert(TABLE), [asdict(Toy(f"{number:03}")) for number in range(250)])
    page = rows._page("acme", None, 2, fits=lambda toy: toy.id in ("010", "120", "240"))
    assert ([toy.id for toy in page.rows], page.has_more) == (["240", "120"], True)


def test_claims_have_one_place():
    assert all(issubclass(user, Claims) for user in (BatchRows, JobRows, LoopRows))
    writers = [path for path in SERVE.rglob("*.py") if "claimed_until" in path.read_text()]
    assert sorted(path.name for path in writers) == ["tables.py", "work_table.py"]
