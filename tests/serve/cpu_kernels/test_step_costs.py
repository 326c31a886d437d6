"""What the scheduler expects of a step is what such steps took."""

from __future__ import annotations

import pytest

from serve.cpu_kernels.step_costs import AGAIN, FIRST, LEAST, NEEDED, Piece, StepCosts

TARGET = 0.07


class Machine:
    """0.2 ms a token of a prompt, 0.1 ms more for each 1,000 before it; answers 10 ms and 1 ms each, 0.8 of it kept."""

    fixed = 0.0

    def __init__(self) -> None:
        self.now = 0.0
        self.costs = StepCosts(clock=lambda: self.now, tiles=self.fixed > 0)

    @classmethod
    def seconds(cls, answers: int, pieces: list[Piece]) -> float:
        prompts = sum(it.tokens * (0.2 + 0.1 * (it.before + it.tokens / 2) / 1000) for it in pieces)
        prompts += cls.fixed if pieces else 0.0
        alone = 10.0 + answers if answers else 0.0
        return (prompts + (0.8 if pieces else 1.0) * alone) / 1000

    def step(self, answers: int, *pieces: Piece, longer: float = 1.0) -> None:
        self.costs.began(answers, list(pieces))
        self.now += longer * self.seconds(answers, list(pieces))
        self.costs.ended()


class Widening(Machine):
    """Beside its first token of a prompt a step widens all weights, for 18 ms."""

    fixed = 18.0


def chosen(costs: StepCosts, before: int = 0, answers: int = 16) -> int:
    """How many tokens of a prompt make a step as long as it may be."""
    return costs.tokens_beside(answers, TARGET, [Piece(before, 10_000)])


def learned(machine: Machine, answers: int = 16) -> StepCosts:
    """Prompts of 1,024 and 8,192 tokens beside some answers, some steps of which have none of them."""
    for length in (1024, 8192) * 6:
        before = 0
        while before < length:
            tokens = min(chosen(machine.costs, before, answers), length - before)
            machine.step(answers, Piece(before, tokens))
            before += tokens
        machine.step(answers)
    return machine.costs


@pytest.mark.parametrize("machine", [Machine, Widening])
@pytest.mark.parametrize("before", [0, 500, 4000, 8000])
def test_as_many_tokens_of_prompts_are_chosen_as_take_that_long(before, machine):
    costs = learned(machine())
    tokens = chosen(costs, before)
    assert machine.seconds(16, [Piece(before, tokens)]) == pytest.approx(TARGET, rel=0.1)


def test_what_the_first_token_of_a_step_takes_is_told_from_what_each_of_them_does():
    machine = Widening()
    costs = learned(machine)
    for _ in range(20):
        machine.step(0, Piece(0, 1024))
        machine.step(4, Piece(0, 2 * LEAST))
        machine.step(4)
    assert costs.fixed == pytest.approx(0.018, rel=0.2)
    assert costs.worthwhile(0.0) == pytest.approx(18 / 0.2, rel=0.25)
    assert costs.worthwhile(0.5) == pytest.approx(2 * 18 / 0.2, rel=0.25)
    assert costs.worthwhile(0.045) == pytest.approx((45 - 18) / 0.2, rel=0.25), "twice would take longer than that"
    assert learned(Machine()).worthwhile(0.5) == LEAST
    assert StepCosts(tiles=True).worthwhile(0.5) == LEAST


def test_several_prompts_share_the_time_one_after_another():
    costs = learned(Machine())
    pieces = [Piece(900, 100), Piece(0, 30), Piece(0, 10_000)]
    tokens = costs.tokens(0.04, pieces)
    assert tokens > 130
    assert costs.prompts([*pieces[:2], Piece(0, tokens - 130)]) == pytest.approx(0.04, rel=0.02)
    assert costs.tokens(0.04, pieces[:2]) == pytest.approx(tokens, abs=2), "who is not known yet is at its beginning"


def test_before_anything_is_known_and_where_there_is_no_time_a_step_takes_some_tokens_all_the_same():
    costs = StepCosts()
    assert costs.tokens(0.04, [Piece(0, 5000)]) == FIRST
    costs = learned(Machine())
    for seconds in (0.0, -0.5, 0.001):
        assert costs.tokens(seconds, [Piece(0, 5000)]) == LEAST


def test_small_prompts_beside_many_answers_do_not_make_prompts_look_cheap():
    machine = Machine()
    costs = learned(machine)
    for _ in range(200):
        machine.step(16, Piece(0, LEAST + 8))
        machine.step(16)
    assert Machine.seconds(16, [Piece(0, chosen(costs))]) == pytest.approx(TARGET, rel=0.15)


def test_a_step_that_was_disturbed_changes_little():
    machine = Machine()
    costs = learned(machine)
    tokens, alone = chosen(costs), costs.alone(16)
    machine.step(16, Piece(0, 150), longer=50)
    machine.step(16, longer=50)
    assert 0.6 * tokens < chosen(costs) <= tokens
    assert costs.alone(16) == alone


def test_a_machine_that_becomes_slower_is_followed():
    machine = Machine()
    costs = learned(machine)
    for _ in range(60):
        machine.step(16, Piece(0, costs.tokens_beside(16, 3 * TARGET, [])), longer=3)
        machine.step(16, longer=3)
    tokens = costs.tokens_beside(16, 3 * TARGET, [])
    assert Machine.seconds(16, [Piece(0, tokens)]) == pytest.approx(TARGET, rel=0.1)
    assert costs.alone(16) == pytest.approx(3 * Machine.seconds(16, []))


def test_what_answers_take_alone_is_asked_for_at_first_and_now_and_then():
    machine = Machine()
    asked = 0
    for _ in range(NEEDED + 2 * AGAIN - 1):
        wanted = machine.costs.unknown(16)
        machine.step(16, *([] if wanted else [Piece(0, 100)]))
        asked += wanted
    assert asked == NEEDED + 1
    assert machine.costs.alone(16) == pytest.approx(Machine.seconds(16, []))
    assert machine.costs.unknown(3) and not machine.costs.unknown(20)
    assert machine.costs.alone(3) == 0 and machine.costs.alone(70) == machine.costs.alone(16)


def test_the_last_tokens_of_a_prompt_are_as_answers():
    machine = Machine()
    for _ in range(NEEDED):
        machine.step(2, Piece(500, 1))
    assert machine.costs.token is None and machine.costs.alone(2) > 0


def test_the_pause_between_two_steps_is_no_part_of_them():
    times = iter([0.0, 0.1, 50.0, 50.1])
    costs = StepCosts(clock=lambda: next(times))
    for _ in range(2):
        costs.began(0, [Piece(0, 100)])
        costs.ended()
    assert costs.prompts([Piece(0, 100)]) == pytest.approx(0.1)


def test_steps_that_begin_before_the_last_one_has_ended_are_timed_one_after_another():
    times = iter([0.0, 0.01, 0.1, 0.2])
    costs = StepCosts(clock=lambda: next(times))
    costs.began(0, [Piece(0, 100)])
    costs.began(0, [Piece(0, 100)])
    costs.ended()
    costs.ended()
    assert costs.prompts([Piece(0, 100)]) == pytest.approx(0.1)


def test_a_prompt_that_took_less_than_a_step_of_many_answers_stops_nothing():
    times = iter([0.0, 1.0, 1.0, 1.01])
    costs = StepCosts(clock=lambda: next(times))
    for pieces in ([], [Piece(0, LEAST)]):
        costs.began(64, pieces)
        costs.ended()
    assert costs.tokens(0.25, [Piece(0, 10_000)]) > 2048


def test_a_step_of_nothing_is_no_measurement():
    costs = StepCosts()
    costs.ended()
    costs.began(0, [])
    costs.ended()
    assert costs.token is None and costs.alone(1) == 0
