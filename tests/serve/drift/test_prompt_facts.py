"""A few prompts of a kind that was never seen before are an alarm that names the kind."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.change_description import describe
from serve.drift.features.features import FOLLOW_UP, OUTPUT, PROMPT
from serve.drift.features.traffic_profile import Prompt, TrafficProfiles
from serve.drift.prompt_facts import KINDS, prompt_facts
from serve.drift.signal import Signal

NEEDED = 1000


def prompt(language="en", marks=()):
    return Prompt(40, language, "acme", {}, 1, np.zeros(4), marks)


def drawn(rng, count, *, share=0.0, language="en", marks=(), usual=0.0):
    """English prompts, a share of them others, and `usual` of them in lower case."""
    for _ in range(count):
        foreign = rng.random() < share
        yield prompt(language, marks) if foreign else prompt(marks=("lower",) if rng.random() < usual else ())


def delay(signal, prompts, profiles=None):
    """Prompts until the alarm, some at a time as they are looked at; and what is said of it then."""
    units = list(prompts)
    for begin in range(0, len(units), 8):
        block = units[begin : begin + 8]
        if profiles is not None:
            for each in block:
                profiles.recent.add(each)
        facts = [prompt_facts(each) for each in block]
        runs, said = signal.fact_runs(facts, range(begin, begin + len(block))), None
        for at, alarms in enumerate(runs, begin + 1):
            if alarms:
                said = at, describe(signal, profiles or TrafficProfiles(), None) | {"beyond": signal.beyond()}
        if said is not None:
            return said
    return None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"language": "ja"}, "probably Japanese (0 % before"),
        ({"marks": ("jailbreak",)}, "with phrases that jailbreaks use (0 % before"),
        ({"language": "", "marks": ("no_words",)}, "of no words (0 % before"),
        ({"marks": ("damaged",)}, "with a damaged encoding (0 % before"),
        ({"marks": ("lower",)}, "all in lower case ("),
    ],
)
def test_one_in_twenty_that_were_never_seen_is_named(change, said):
    delays = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        signal, profiles = Signal(PROMPT, needed=NEEDED), TrafficProfiles()
        for usual in drawn(rng, 300, usual=0.02):
            profiles.reference.add(usual)
        assert delay(signal, drawn(rng, NEEDED + 300, usual=0.02)) is None
        share = 0.2 if "lower" in change.get("marks", ()) else 0.05
        at, described = delay(signal, drawn(rng, 600, share=share, usual=0.02, **change), profiles)
        delays.append(at)
        assert said in described["text"] and "of the prompts" in described["text"], described["text"]
        assert 0.02 <= described["share_at_least"] <= 0.6 and described["beyond"] and signal.alarmed
    assert np.median(delays) <= 200, delays


def test_what_many_prompts_are_anyway_raises_nothing():
    rng = np.random.default_rng(1)
    signal = Signal(FOLLOW_UP, needed=200)
    assert delay(signal, drawn(rng, 400, usual=0.3)) is None
    assert delay(signal, drawn(rng, 2000, usual=0.6)) is None


def test_what_raises_the_evidence_to_the_threshold_alone_is_no_alarm_yet():
    """Eight answers of twenty-four that are cut off, where thirteen of a thousand were: that happens now and then."""
    signal = Signal(OUTPUT, needed=NEEDED)

    def alarms(cuts):
        return any(list(signal.fact_runs([{"ended_by_length": float(cut)} for cut in cuts], range(len(cuts)))))

    assert not alarms([at % 77 == 0 for at in range(NEEDED)])
    assert not alarms([at % 3 == 0 for at in range(24)]) and signal.log_evidence > signal.log_threshold
    assert alarms([at % 3 == 0 for at in range(24)])


def test_the_next_version_has_the_reference_and_no_evidence():
    rng = np.random.default_rng(2)
    signal = Signal(PROMPT, needed=200)
    delay(signal, drawn(rng, 200))
    assert delay(signal, drawn(rng, 400, share=0.2, language="fr"))
    heir = Signal(PROMPT, needed=200)
    heir.restore(signal.state())
    assert heir.moved() == signal.moved()
    heir.begin_anew()
    assert not heir.moved() and not heir.alarmed
    assert delay(heir, drawn(rng, 400, share=0.2, language="fr"))


def test_a_prompt_has_a_language_and_marks():
    facts = prompt_facts(prompt("de", ("upper", "damaged")))
    assert {name for name, value in facts.items() if value} == {"language", "upper", "damaged"}
    assert set(facts) == set(KINDS) and facts["language"] != prompt_facts(prompt("fr"))["language"]
    assert not any(prompt_facts(prompt("")).values())


@pytest.mark.parametrize(("kind", "lane"), [(PROMPT, "first"), (FOLLOW_UP, "later")])
def test_what_an_earlier_release_kept_by_the_place_in_a_conversation_is_read_on(kind, lane):
    rng = np.random.default_rng(3)
    signal, heir = Signal(kind, needed=200), Signal(kind, needed=200)
    assert delay(signal, drawn(rng, 250, usual=0.02)) is None
    state = signal.state()
    heir.restore({name.replace("fixed.", f"fixed.{lane}.", 1): value for name, value in state.items()})
    assert heir.fixed.gathered == signal.fixed.gathered >= 200
    assert delay(heir, drawn(rng, 400, share=0.2, language="fr"))
