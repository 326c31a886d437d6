"""Whole conversations are watched: what is said later in them, and what stands before all of them."""

from __future__ import annotations

import random
from itertools import count

import numpy as np
import pytest

from serve.asgi.exchange import Exchange, Generation
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import FOLLOW_UP, PROMPT, WHOLE_PROMPTS
from serve.drift.monitor import DriftMonitor
from serve.drift.watched_version import OPENING, DriftSettings

WORDS = 2000
EMBEDDING = Embedding.project(np.random.default_rng(0).standard_normal((WORDS, 16)))
# What is asked first, what is asked then, and a language that nobody spoke so far.
FIRST, THEN, FOREIGN = range(8, 600), range(300, 1000), range(1200, 1900)


class Text:
    """A tokenizer of words that are numbers."""

    special = frozenset({1, 2})

    def tokens(self, text):
        return [int(word) for word in text.split()]

    def last(self, tokens, count=128):
        return ""


class Chats:
    """`open` conversations at a time, of `turns` messages of the user's on average; clients send all that was said, or
    the last `window` messages."""

    def __init__(self, monitor, *, turns=3.4, open=12, window=None, seed=0):
        self.draw = random.Random(seed)
        self.monitor, self.end, self.window = monitor, 1 / turns, window
        self.then, self.system = THEN, "you help the customers of a small shop, today is day 17"
        self.begun = 0
        # Shares of the answers that are refused: of the first ones, and of later ones.
        self.refused, self.refused_later = 0.01, 0.01
        self.clock = count()
        self.talks = [self.talk() for _ in range(open)]

    def talk(self):
        self.begun += 1
        return []

    def words(self, topic):
        return " ".join(map(str, self.draw.choices(topic, k=self.draw.randint(6, 20))))

    def answer(self, *, later):
        refused = self.draw.random() < (self.refused_later if later else self.refused)
        return "I'm sorry, but no." if refused else "an answer"

    def request(self):
        """One request of a conversation that goes on or begins."""
        number = self.draw.randrange(len(self.talks))
        said = self.talks[number]
        answer = self.answer(later=bool(said))
        said.append({"role": "user", "content": self.words(self.then if said else FIRST)})
        messages = said if self.window is None else said[-self.window :]
        system = {"role": "system", "content": self.system}
        asker = next(each["content"] for each in messages if each["role"] == "user").encode()
        generation = Generation([1, 2, *Text().tokens(messages[-1]["content"])], [9, 10, 11], "stop", answer)
        self.monitor.observe(
            Exchange(
                "tone", "v1", 200, 0.1, 0.2, id="tone@1", asker=asker, began=20.0 * next(self.clock),
                generations=(generation,), question={"messages": [system, *messages]},
            )
        )  # fmt: skip
        said.append({"role": "assistant", "content": "9 10"})
        if self.draw.random() < self.end:
            self.talks[number] = self.talk()

    def requests(self, most, until=lambda: False):
        """Whether it came to that, looked at now and then."""
        for i in range(most):
            self.request()
            if i % 4 == 3:
                self.monitor.looked()
                if until():
                    return True
        return False


@pytest.fixture
def monitor(tmp_path):
    monitor = DriftMonitor(tmp_path, DriftSettings(reference=150, threshold=1e4), clock=lambda: 0.0)
    monitor.learn("", EMBEDDING, text=Text())
    return monitor


def report(monitor):
    (version,) = monitor.report("tone")
    return version


@pytest.mark.parametrize("window", [None, 3])
def test_another_language_in_all_that_is_said_later_is_a_drift_of_it(monitor, window):
    chats = Chats(monitor, window=window)
    chats.requests(700)
    before = report(monitor)
    assert before["signals"][FOLLOW_UP]["phase"] == "watching" and not before["alarms"]
    chats.then, chats.begun = FOREIGN, 0
    assert chats.requests(400, lambda: FOLLOW_UP in report(monitor)["alarms"])
    assert chats.begun <= 60
    after = report(monitor)
    assert "follow-ups" in after["alarms"][FOLLOW_UP]["text"] and after["alarms"][FOLLOW_UP]["since"]
    assert PROMPT not in after["alarms"], "what is asked first is as it was"


def test_steady_conversations_raise_nothing_and_most_of_them_is_seen(monitor):
    chats = Chats(monitor)
    chats.requests(1500)
    version = report(monitor)
    assert not version["alarms"] and version["seen_share"] > 0.8
    assert sum(version["thinning"].values()) > 1400
    series = {metric.name: metric.samples for metric in monitor.collect()}
    assert [sample.value for sample in series["loradock_drift_seen_share"]] == [
        pytest.approx(version["seen_share"], abs=1e-4)
    ]


def test_refusals_that_stay_are_an_alarm_that_names_them(monitor):
    chats = Chats(monitor)
    chats.requests(900)
    assert not report(monitor)["alarms"]
    chats.refused = chats.refused_later = 0.25
    assert chats.requests(300, lambda: "output" in report(monitor)["alarms"])
    alarm = report(monitor)["alarms"]["output"]
    assert "more refusals" in alarm["text"] and alarm["refusal"]["now"] > alarm["refusal"]["before"] + 0.1
    monitor.acknowledge("tone", "v1", "tone@1")
    assert not report(monitor)["alarms"]
    assert chats.requests(300, lambda: "output" in report(monitor)["alarms"]), "they are still more than at first"


def test_refusals_of_what_is_said_later_are_seen_as_they_come(monitor):
    """And not when the block of their conversation is complete, some 60 requests later."""
    chats = Chats(monitor)
    chats.requests(400)
    assert report(monitor)["signals"]["output"]["answers"]["reference_requests"] == 150
    chats.refused_later = 0.3
    assert chats.requests(130, lambda: "output" in report(monitor)["alarms"])


def test_another_system_prompt_is_said_and_is_no_drift_of_what_is_asked(monitor):
    chats = Chats(monitor)
    chats.requests(900)
    chats.system = "translate all that you are told into plain and friendly French"
    assert chats.requests(400, lambda: OPENING in report(monitor)["alarms"])
    assert set(report(monitor)["alarms"]) == {OPENING} and "system prompt" in report(monitor)["alarms"][OPENING]["text"]


def test_follow_ups_go_on_where_they_were_after_a_restart(monitor, tmp_path):
    chats = Chats(monitor)
    chats.requests(700)
    monitor.stop()
    again = DriftMonitor(tmp_path, DriftSettings(reference=150, threshold=1e4), clock=lambda: 0.0)
    again.learn("", EMBEDDING, text=Text())
    chats.monitor = again
    chats.requests(4)
    before, after = report(monitor), report(again)
    assert after["signals"][FOLLOW_UP]["reference_requests"] == before["signals"][FOLLOW_UP]["reference_requests"] == 60
    assert after["thinning"]["accepted"] >= before["thinning"]["accepted"]
    chats.then = FOREIGN
    assert chats.requests(400, lambda: FOLLOW_UP in report(again)["alarms"])


def test_a_reference_of_whole_prompts_goes_on_beside_the_follow_ups(monitor):
    """An earlier release made it."""
    chats = Chats(monitor)
    chats.requests(1)
    (watched,) = monitor._versions.values()
    object.__setattr__(watched.baseline.provenance, "features", WHOLE_PROMPTS)
    chats.requests(900)
    signals = report(monitor)["signals"]
    assert signals[PROMPT]["phase"] == signals[FOLLOW_UP]["phase"] == "watching"
    chats.then = FOREIGN
    assert chats.requests(400, lambda: FOLLOW_UP in report(monitor)["alarms"])
