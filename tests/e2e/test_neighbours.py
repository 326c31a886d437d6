"""The short version of `make neighbours`: the registry and the disk fail under traffic, without an engine."""

from __future__ import annotations

import pytest

from tests.campaigns.neighbours import measure, staged
from tests.support import postgres

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(postgres.programs() is None, reason="PostgreSQL is not installed"),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    pytest.importorskip("moto.server")
    with staged(tmp_path_factory.mktemp("neighbours"), servers=2) as stage:
        yield stage


@pytest.mark.parametrize(
    ("neighbour", "fault"),
    [("database", "refusing"), ("database", "halves"), ("database", "slow"), ("object store", "refusing")],
)
def test_a_neighbour_that_fails_costs_no_answer_and_no_rollback(stage, neighbour, fault):
    seen = measure(stage, neighbour, fault, seconds=6)
    assert not seen.wrong and not seen.lost
    assert seen.rollback is not None, "the rollback was not done while the neighbour failed"
    assert seen.back is not None, "the servers did not come back by themselves"
    assert seen.answers["200"] > 10 and not {"500", "502"} & seen.answers.keys()
