"""What a candidate is trained on."""

from __future__ import annotations

import pytest

from serve.errors import BadRequest
from serve.loop.examples import MOST, bounded, mixed, read, split
from serve.loop.gathering import clusters
from serve.loop.likelihood import Example


def some(word, count):
    return [Example({"prompt": f"{word} {number}", "completion": "yes"}) for number in range(count)]


def digests(examples):
    return {example.digest for example in examples}


def test_new_examples_come_with_as_many_old_ones_and_nothing_that_is_held_out():
    new, held_out, old = some("new", 20), some("held", 5), some("old", 100)
    kept = old[:10]
    made = mixed([*new, *new, held_out[0]], held_out, [*old, *held_out, *new], kept, seed=3)
    assert (made.new, made.replayed) == (20, 20) and made.held_out == bounded(held_out)
    assert not digests(made.train) & digests([*kept, *held_out]) and len(digests(made.train)) == 40
    assert made == mixed(new, held_out, old[::-1], kept, seed=3) != mixed(new, held_out, old, kept, seed=4)
    assert len(made.lines().splitlines()) == 40


def test_nothing_is_trained_on_that_asks_nearly_what_is_held_out():
    def asks(question, answer="yes"):
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        return Example({"messages": [*said, {"role": "assistant", "content": answer}]})

    held, reference = "Please tell me where parcel 4711 of my order is now.", "How long may I keep a borrowed book?"
    near = [
        asks("please tell me where parcel 4711 of my order is now, thanks", "at home"),
        asks(reference.lower(), "-"),
    ]
    far = [asks("Which of your shops is open on Sundays?"), asks("Can a parcel be sent to a neighbour of mine?")]
    made = mixed([near[1], far[0]], [asks(held)], [near[0], near[1], far[1]], [asks(reference)], seed=1)
    assert digests(made.train) == digests(far) and (made.new, made.replayed) == (1, 1)


def test_a_first_reference_leaves_half_of_the_examples_at_least():
    assert len(split(some("old", 100), 0.3, 20)) == 30 and len(split(some("old", 100), 0.1, 20)) == 20
    assert split(some("old", 39), 0.3, 20) == ()


def test_examples_of_one_asker_count_as_one_unless_askers_are_applications():
    conversations = [f"conv-{number}" for number in range(40)]
    people = [f"asker {number // 4}" for number in range(40)]
    assert clusters(conversations, people) == people
    assert clusters(conversations, [f"app {number % 9}" for number in range(40)]) == conversations
    assert clusters(["conv-1"] * 9, ["app"] * 9) == ["app"] * 9


def test_a_reference_holds_so_many_at_most():
    assert len(bounded(some("a", MOST + 5))) == MOST
    long = [Example({"prompt": str(number), "completion": "x" * (1 << 20)}) for number in range(8)]
    assert len(bounded(long)) == 3


def test_a_line_that_is_no_example_is_a_sentence(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"text": 1}\n')
    with pytest.raises(BadRequest, match="line 3 of the examples has neither messages nor a prompt"):
        read(file)
    file.write_text("{")
    with pytest.raises(BadRequest, match="line 1 of the examples is not JSON"):
        read(file)
