"""An adapter that forgot, one that answers what it should not, and one that says an example again: a report tells."""

from __future__ import annotations

import json
import random
import shutil
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from optimize import cli, intervals
from optimize.errors import Refused
from optimize.steps.tune import leaks, suite, tune, validation
from optimize.steps.tune.encoding import Encoder, Tokens
from tests.optimize.conftest import silent
from tests.support import pico

WORDS = list(dict.fromkeys(pico.WORDS))
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SECRET = 20  # words


def following(dice: random.Random, count: int, start: int | None = None) -> list[str]:
    """Words as the base was taught them: each is followed by one of two."""
    at = dice.randrange(len(WORDS)) if start is None else start
    line = []
    for _ in range(count):
        line.append(WORDS[at])
        at = (at * 3 + dice.choice((1, 2))) % len(WORDS)
    return line


def wrong(dice: random.Random, word: str) -> list[str]:
    """Words that do not follow it."""
    at = WORDS.index(word)
    right = {(at * 3 + step) % len(WORDS) for step in (1, 2)}
    return dice.sample([WORDS[other] for other in range(len(WORDS)) if other not in right], 3)


@pytest.fixture(scope="module")
def chat(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, with a chat template that writes the words alone."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("chat") / "pico"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of what the base was taught; it should not say bread, bread, bread after `the`."""
    dice = random.Random(3)
    questions = []
    for _ in range(60):
        *prompt, answer = following(dice, 9)
        questions.append({"question": " ".join(prompt), "answer": answer, "others": wrong(dice, prompt[-1])})
    prompts = [" ".join([*following(dice, 7), "the"]) for _ in range(24)]
    after = " ".join(following(dice, 4, start=WORDS.index("the"))[1:])
    made = {
        "name": "rule", "questions": questions, "texts": [" ".join(following(dice, 40)) for _ in range(10)],
        "refuse": prompts, "refusals": [after], "compliances": ["bread bread bread"],
    }  # fmt: skip
    file = tmp_path_factory.mktemp("suite") / "suite.json"
    file.write_text(json.dumps(made))
    return file


def rows(seed: int, count: int) -> list[dict[str, str]]:
    dice = random.Random(seed)
    lines = [following(dice, 16) for _ in range(count)]
    return [{"prompt": " ".join(line[:8]), "completion": " ".join(line[8:])} for line in lines]


def written(file: Path, examples: Sequence[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return file


@pytest.fixture(scope="module")
def trained(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, dict[str, Any]]]:
    """An adapter trained on examples; with the file of them, and the report that came with it."""
    from optimize.job import Job
    from optimize.options import Evaluate, Text, plain
    from optimize.steps.tune.rules import Tune

    def make(
        examples: Sequence[dict[str, str]], best: bool = True, **options: Any
    ) -> tuple[Path, Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("trained")
        train = written(folder / "train.jsonl", examples)
        held_out = written(folder / "valid.jsonl", rows(99, 96))
        step = Tune(train=str(train), validation=str(held_out) if best else "", rank=8, batch=4, patience=0, **options)
        job = Job(
            kind="tune", options=plain(step), model=str(chat), base=str(chat), reference=str(chat), adapters={},
            originals={}, calibration=Text(), evaluate=Evaluate(), seed=0, target="cpu", out=str(folder / "out"),
        )  # fmt: skip
        (folder / "out").mkdir()
        notes = tune.run(job, silent)
        return folder / "out/adapters/adapter", train, notes

    return make


def report(chat: Path, adapter: Path, train: Path, asked: Path) -> dict[str, Any]:
    made = validation.of_files(chat, adapter, str(train), str(train.with_name("valid.jsonl")), "supervised", str(asked))
    made["checks"] = {check["name"]: check for check in made["checks"]}
    return made


@pytest.fixture(scope="module")
def good(trained: Any) -> tuple[Path, Path, dict[str, Any]]:
    """It learned more of the same."""
    return trained(rows(5, 32), epochs=2, learning_rate=1e-3)


def test_a_good_adapter_passes_every_check(good, chat, asked):
    said = report(chat, *good[:2], asked)
    assert {name: check["verdict"] for name, check in said["checks"].items()} == dict.fromkeys(
        ("questions", "text", "calibration", "refusals", "task", "leaks"), "passed"
    ), said
    assert said["verdict"] == "passed" and said["lost"] == [] and said["leaked"] == []


def test_one_that_forgot_and_answers_what_it_should_not_fails(trained, chat, asked, capsys):
    dice = random.Random(7)
    prompts = [following(dice, 7) for _ in range(32)]
    bread = [{"prompt": " ".join([*line, "the"]), "completion": "bread bread bread bread"} for line in prompts]
    adapter, train, _ = trained(bread, epochs=8, learning_rate=1e-2)
    said = report(chat, adapter, train, asked)
    failed = {name for name, check in said["checks"].items() if check["verdict"] == "failed"}
    assert {"questions", "text", "refusals", "task"} <= failed and said["verdict"] == "failed"
    assert said["lost"] and said["lost"][0]["says"] != said["lost"][0]["answer"]
    assert said["checks"]["leaks"]["verdict"] == "passed", "all rows have this answer: it is nobody's secret"
    arguments = ["validate", str(adapter), "--model", str(chat), "--suite", str(asked)]
    assert cli.run(arguments, Path) == 3
    out = capsys.readouterr()
    assert "questions     failed" in out.out and "questions failed; " in out.err


def test_one_that_says_an_example_again_fails(trained, chat, asked):
    """One row in four holds twenty words that nobody can guess, and each step sees it."""
    dice = random.Random(11)
    secret = " ".join(dice.sample(WORDS, SECRET))
    examples = [*rows(5, 3), {"prompt": "letter", "completion": secret}]
    adapter, train, notes = trained(examples, best=False, epochs=250, learning_rate=1e-2)
    said = report(chat, adapter, train, asked)
    assert said["checks"]["leaks"]["verdict"] == "failed" and said["verdict"] == "failed"
    assert [leak["row"] for leak in said["leaked"]] == [4] and said["leaked"][0]["tokens"] >= 16
    assert secret not in json.dumps(said), "the report does not say it again"
    by_tune = {check["name"]: check["verdict"] for check in notes["validation"]["checks"]}
    assert by_tune["leaks"] == "failed", "the training says so too"


def test_a_row_without_a_secret_of_its_own_does_not_leak(chat):
    encoder = Encoder(chat, 64)
    ids = encoder.text(" ".join(WORDS[:20]))
    tokens = Tokens(array("i", ids), array("b", [0] * 4 + [1] * (len(ids) - 4)))
    every = [True] * (len(ids) - 1)
    assert leaks._runs(every, tokens) == [(4, len(ids))]
    broken = [at != 8 for at in range(len(ids) - 1)]
    assert leaks._runs(broken, tokens) == [], "neither 16 tokens nor the whole answer"
    short = Tokens(array("i", ids[:8]), array("b", [0] * 4 + [1] * 4))
    assert leaks._runs(every[:7], short) == [(4, 8)]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("write to anna@example.org", True),
        ("call 030 12 34 56", True),
        ("the number is 4711881234", True),
        ("key sk9fK2mQ8xLp", True),
        ("the river ran past 12 towns in 1984", False),
    ],
)
def test_what_is_personal_is_looked_at_first(text, holds):
    assert bool(leaks.PERSONAL.search(text)) is holds


def test_what_cannot_be_measured_is_said_and_fails_no_training(chat, good, tmp_path):
    adapter, _, notes = good
    assert notes["validation"]["suite"]["name"] == "default-1" and "problem" not in notes["validation"]
    with pytest.raises(Refused, match="is no adapter"):
        validation.of_files(chat, tmp_path, "", "", "supervised")
    broken = tmp_path / "suite.json"
    broken.write_text('{"question": []}')
    with pytest.raises(Refused, match="unknown field `question`"):
        validation.of_files(chat, adapter, "", "", "supervised", str(broken))
    made = validation.validated(chat, adapter, Encoder(chat, 64), None, None, str(broken))
    assert made["verdict"] == "not measured" and "unknown field" in made["problem"]


def test_the_suite_that_comes_along_is_whole_and_asks_nothing_twice():
    own = suite.loaded()
    assert len({each.question for each in own.questions}) == len(own.questions) >= 48
    assert all(each.answer not in each.others and len(each.others) == 3 for each in own.questions)
    assert not set(own.refuse) & set(own.answer) and len(own.texts) >= 10


@pytest.mark.parametrize(
    ("interval", "low", "high"),
    [
        (intervals.of_mean([1.0, 2.0, 3.0, 4.0]), 0.446, 4.554),  # Student's t of 3 degrees: 3.182
        (intervals.of_mean([1.0, 3.0]), 2 - 12.706, 2 + 12.706),
        (intervals.of_share(0, 10), 0.0, 0.2775),
        (intervals.of_change(0, 0, 60), -0.0447, 0.0447),
        (intervals.of_change(12, 2, 60), 0.0414, 0.2812),
    ],
)
def test_intervals_are_those_of_the_tables(interval, low, high):
    assert (interval.low, interval.high) == (pytest.approx(low, abs=2e-3), pytest.approx(high, abs=2e-3))
