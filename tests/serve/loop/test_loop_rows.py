"""Loops in the database, over SQLite and PostgreSQL: of several servers one drives a loop."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from serve.adapters.adapter import Inspection
from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import loop_references
from serve.loop.likelihood import Example
from serve.loop.loop_rows import MONTH_SECONDS, TRIES_KEPT, LoopRows
from serve.loop.objects import Outcome, Phase
from serve.loop.reference_rows import REFERENCES_KEPT

NOW = 1e9


@pytest.fixture
def registry(url):
    with Registry(url) as registry:
        inspection = Inspection(2, "base", ("q_proj",), 10, 2)
        registry.add("tone", inspection, "a" * 64, by="me")
        registry.add("acme/tone", inspection, "b" * 64, by="me")
        yield registry


@pytest.fixture
def clock():
    return [NOW]


@pytest.fixture
def servers(registry, clock):
    return [LoopRows(registry, me=name, clock=lambda: clock[0]) for name in ("one", "two")]


def begun(rows):
    loop = rows.claim(rows.made("tone").id, 30)
    return rows.begin(loop, 0.01, {"cause": {"kind": "drift"}}, 1, NOW)


def examples(*numbers):
    return [Example({"prompt": str(number), "completion": "yes"}) for number in numbers]


def test_one_server_drives_a_loop_until_its_claim_ends(servers, clock):
    one, two = servers
    loop = begun(one)
    assert loop.phase is Phase.GATHERING and two.claim(loop.id, 30) is None
    assert two.enter(loop, Phase.TRAINING) is None and one.get("tone").phase is Phase.GATHERING
    assert one.enter(loop, Phase.TRAINING, job="ftjob-1").state.job == "ftjob-1"
    clock[0] += 31
    taken = two.claim(loop.id, 30)
    assert taken.phase is Phase.TRAINING and taken.state.job == "ftjob-1" and taken.name == "tone"
    assert one.enter(taken, Phase.GATE) is None and two.enter(taken, Phase.GATE).phase is Phase.GATE


def test_a_loop_is_made_once_and_names_are_told_apart(servers):
    one, two = servers
    assert one.made("tone").id == two.made("tone").id != one.made("acme/tone").id
    assert sorted(loop.name for loop in two.all()) == ["acme/tone", "tone"]


def test_a_loop_follows_its_adapter_to_a_new_name(servers, registry):
    id = servers[0].made("tone").id
    registry.rename("tone", "voice", by="me")
    assert servers[1].get("voice").id == id and servers[1].get("tone") is None


def test_tries_spend_alpha_and_a_try_that_was_none_spends_nothing(servers):
    rows, _ = servers
    loop = begun(rows)
    assert rows.spent(loop, NOW) == (1, 0.01)
    rows.add(loop, gate={"passed": False})
    waiting = rows.end(loop, Outcome.REJECTED, {"text": "no"}, failures=1)
    assert waiting.phase is Phase.WAITING and waiting.state.failures == 1 and waiting.state.live == 0
    (attempt,) = rows.tries(loop)
    assert attempt.outcome == "rejected" and attempt.content["gate"] == {"passed": False}
    second = begun(rows)
    assert second.state.number == 2 and rows.spent(loop, NOW) == (2, 0.02)
    rows.end(second, None, {})
    assert rows.spent(loop, NOW) == (1, 0.01)


def test_a_try_that_is_carried_over_spends_of_the_month_that_decides_it(servers, clock):
    rows, _ = servers
    loop, later = begun(rows), NOW + 1000
    assert rows.spent(loop, later) == (1, 0.01), "it may be decided then"
    clock[0] += 1001
    rows.end(loop, Outcome.REJECTED, {})
    assert rows.spent(loop, later) == (1, 0.01) and rows.spent(loop, later + 2) == (0, 0.0)


def test_what_was_held_out_becomes_a_reference_or_goes(servers):
    rows, _ = servers
    loop = begun(rows)
    rows.references.hold_out(loop, examples(1))
    kept = rows.references.hold_out(loop, examples(1, 2))
    assert rows.references.kept(loop) == [] and len(rows.references.examples(kept)) == 2
    rows.references.keep(loop, kept, "v2", 0.9)
    gone = rows.references.hold_out(loop, examples(3))
    rows.end(loop, Outcome.PROMOTED, {})
    (reference,) = rows.references.kept(loop)
    assert (reference.id, reference.label, reference.examples, reference.score) == (kept, "v2", 2, 0.9)
    assert (
        rows.references.examples(gone) == []
        and rows.references.drop(loop, kept)
        and not rows.references.drop(loop, kept)
    )


def test_the_oldest_references_make_room(servers, clock):
    rows, _ = servers
    loop = begun(rows)
    for number in range(REFERENCES_KEPT + 2):
        clock[0] += 1
        rows.references.keep(loop, rows.references.hold_out(loop, examples(number)), f"v{number}", None)
    assert [one.label for one in rows.references.kept(loop)] == [f"v{n}" for n in range(2, REFERENCES_KEPT + 2)]


def test_wishes_and_stops_reach_every_server(servers):
    one, two = servers
    loop = one.made("tone")
    two.wish(loop, "reject", "ann", "no")
    asked = one.get("tone")
    assert asked.wish == {"what": "reject", "by": "ann", "why": "no"}
    two.wish(loop, "run", "bob")
    one.grant(asked)  # another wish came meanwhile, which stays
    assert one.get("tone").wish["what"] == "run"
    assert one.stopped() is None
    two.stop(None, "ann")
    two.stop(loop, "bob")
    assert one.stopped() == "ann" and one.get("tone").stopped == "bob" and len(one.all()) == 1
    one.stop(None, None)
    assert two.stopped() is None and two.get("tone").stopped == "bob"


def test_a_yes_after_a_no_changes_nothing(servers):
    one, two = servers
    loop = one.made("tone")
    assert one.wish(loop, "approve", "bob", unless="reject") is None
    assert two.wish(loop, "reject", "ann", "no") is None
    assert one.wish(loop, "approve", "bob", unless="reject") == two.get("tone").wish
    assert two.get("tone").wish == {"what": "reject", "by": "ann", "why": "no"}


def test_a_conversation_that_is_deleted_is_in_no_reference(servers):
    rows, _ = servers
    loop = begun(rows)
    mine = [Example(example.fields, "conv-1") for example in examples(1, 2)]
    id = rows.references.hold_out(loop, [*mine, *examples(3)], label="v1")
    assert (
        rows.references.forget_conversation(loop, "conv-1") == 2
        and rows.references.forget_conversation(loop, "conv-1") == 0
    )
    assert rows.references.examples(id) == examples(3) and rows.references.kept(loop)[0].examples == 1


def test_who_asked_is_kept_as_a_number_and_only_which_examples_count_as_one(servers):
    rows, _ = servers
    loop = begun(rows)
    asked = [Example(each.fields, f"conv-{at}", ("ann", "bob")[at % 2]) for at, each in enumerate(examples(1, 2, 3, 4))]
    id = rows.references.hold_out(loop, asked, label="v1")

    def together():
        by_digest = {each.digest: each for each in rows.references.examples(id)}
        return [by_digest[each.digest].counted_as for each in asked if each.digest in by_digest]

    first, second, *rest = together()
    assert rest == [first, second] and first != second and not {first, second} & {"ann", "bob"}
    rows.references.forget_conversation(loop, "conv-0")
    assert len(set(together())) == 2 and together()[0] == together()[2]


def test_what_an_earlier_release_held_out_counts_by_its_conversation(servers):
    rows, _ = servers
    loop = begun(rows)
    asked = [Example(each.fields, "conv-1") for each in examples(1, 2)]
    id = rows.references.hold_out(loop, [*asked, *examples(3)], label="v1")
    with rows._registry.adding() as connection:
        connection.execute(update(loop_references).values(clusters=None))
    there = [each.counted_as for each in rows.references.examples(id)]
    assert len(set(there)) == 2 and there.count("conv-1") == 2


def test_a_line_of_a_training_file_that_is_deleted_is_in_no_reference(servers):
    rows, _ = servers
    loop = begun(rows)
    id = rows.references.hold_out(loop, examples(1, 2), label="training of v1")
    assert rows.references.forget_conversation(loop, "conv-1", {examples(1)[0].digest}) == 1
    assert rows.references.examples(id) == examples(2)


def test_a_deletion_is_known_as_long_as_there_are_files_from_before(servers, clock):
    one, two = servers
    first, second, third = (example.digest for example in examples(1, 2, 3))
    one.references.note_deleted("acme", {first, second}, NOW + 100)
    two.references.note_deleted("acme", {second}, NOW + 200)
    one.references.note_deleted("acme", {second}, NOW + 50)
    assert two.references.deleted("acme") == {first, second} and two.references.deleted("other") == set()
    clock[0] += 150
    one.references.note_deleted("other", {third}, NOW + 300)
    assert two.references.deleted("acme") == {second}


def test_what_is_gone_leaves_nothing(servers):
    rows, _ = servers
    loop = begun(rows)
    id = rows.references.hold_out(loop, examples(1), label="v1")
    rows.forget(loop.id)
    assert rows.all(), "a server that has not read of the adapter yet ends no loop"
    rows._registry.delete("tone", by="test")
    rows.forget(loop.id)
    assert rows.all() == [] and rows.references.examples(id) == []


def test_what_a_month_has_spent_is_counted_however_many_tries_it_had(servers, clock):
    rows, count = servers[0], TRIES_KEPT + 5
    for _ in range(count):
        rows.end(begun(rows), Outcome.REJECTED, {})
    assert rows.spent(rows.get("tone"), NOW)[0] == count
    clock[0] += MONTH_SECONDS + 1
    rows.end(begun(rows), Outcome.REJECTED, {})
    assert len(rows.tries(rows.get("tone"), 1000)) == TRIES_KEPT


def test_a_canary_that_one_server_calls_worse_is_proved_by_no_other(servers):
    one, two = servers
    loop = begun(one)
    for rows, said, stands in ((one, "proved", "proved"), (two, "worse", "worse"), (one, "proved", "worse")):
        rows.hear(loop, {"verdict": said, "reason": ""})
        assert rows.tries(loop, 1)[0].content["canary"]["verdict"] == stands


def test_a_step_that_was_overtaken_is_seen(servers, clock):
    one, two = servers
    loop = begun(one)
    assert one.is_mine(loop) and not two.is_mine(loop)
    one.wish(loop, "reject", "anna")
    assert not one.is_mine(loop)
    one.grant(one.get("tone"))
    for which in (loop, None):
        one.stop(which, "anna")
        assert not one.is_mine(loop)
        one.stop(which, None)
    assert one.is_mine(loop)
    clock[0] += 31
    two.claim(loop.id, 30)
    assert not one.is_mine(loop)


def test_a_step_that_went_on_for_too_long_writes_nothing_into_a_try_that_has_ended(servers, clock):
    """Its server has the claim again by then, and the next try may have begun."""
    rows, _ = servers
    old = begun(rows)
    gate = rows.enter(old, Phase.GATE)
    rows.end(gate, Outcome.REJECTED, {"text": "no"})
    for phase in (None, Phase.TRAINING):
        assert rows.enter(old, phase, {"job": "ftjob-9"}, note="trains") is None
    rows.add(gate, gate={"passed": True})
    rows.hear(gate, {"verdict": "proved", "reason": ""})
    assert rows.end(gate, Outcome.PROMOTED, {"text": "yes"}) is None
    assert rows.get("tone").phase is Phase.WAITING
    (attempt,) = rows.tries(old)
    assert (attempt.outcome, attempt.content) == ("rejected", {"cause": {"kind": "drift"}, "text": "no"})
    second = begun(rows)
    assert rows.enter(old, Phase.GATHERING, note="old") is None
    assert rows.enter(second, Phase.TRAINING, note="new").state.note == "new"
