"""The sentence about a change names what stands out, and nothing that does not."""

from __future__ import annotations

import json

import numpy as np

from serve.drift.change_description import UNNAMED, clearer, describe, describe_probe, for_tenant, movement
from serve.drift.features.features import LOGPROB, OUTPUT, PROMPT
from serve.drift.features.traffic_profile import Prompt, TrafficProfile, TrafficProfiles
from serve.drift.features.word_counts import hashed
from serve.drift.signal import Signal

NO_WORDS: frozenset[str] = frozenset()


def prompt(rng, number, *, tokens=100, language="en", tenant="acme", words=(), centre=0.0, marks=()):
    vector = rng.standard_normal(32) + centre
    return Prompt(int(tokens + rng.integers(-9, 9)), language, tenant, hashed(words, NO_WORDS), number, vector, marks)


def profiles(rng, before, now, n=200, m=60):
    reference, recent = TrafficProfile(), TrafficProfile.of_recent()
    for number in range(n):
        reference.add(prompt(rng, number, **before))
    for number in range(m):
        recent.add(prompt(rng, number, **now))
    return reference, recent


def moved_signal(rng, kind, before, now, n=200, m=60):
    signal = Signal(kind, needed=n, threshold=1e4)
    for _ in range(n):
        signal.update(before(rng))
    for _ in range(m):
        signal.update(now(rng))
    assert signal.alarmed
    return signal


def prompt_row(shift):
    return lambda rng: rng.standard_normal(33) + shift * (np.arange(33) == 0)


def test_a_language_a_length_and_a_topic_are_named():
    rng = np.random.default_rng(1)
    signal = moved_signal(rng, PROMPT, prompt_row(0.0), prompt_row(3.0))
    reference, recent = profiles(
        rng, {"words": ["invoice", "payment"]}, {"language": "de", "tokens": 30, "words": ["rezept", "backofen"]}
    )
    said = describe(signal, TrafficProfiles(reference, recent), "2026-11-25T10:00:00+00:00")
    assert said["text"].startswith("since 2026-11-25T10:00:00+00:00, in at least ")
    assert "of the prompts: about a new topic (in " in said["text"] and said["topics"][0]["new"]
    assert ", probably German (0 % before, 100 % now), shorter (typically " in said["text"]
    assert "rezept" in said["text"] and "backofen" in said["text"] and "invoice" not in said["topics"][0]["words"]
    assert said["length"]["before"] > 90 > 40 > said["length"]["now"] and said["requests"] >= 30


def test_a_topic_that_was_there_is_not_called_new():
    rng = np.random.default_rng(1)
    signal = moved_signal(rng, PROMPT, prompt_row(0.0), prompt_row(3.0))
    reference, recent = TrafficProfile(), TrafficProfile.of_recent()
    for number in range(600):
        hot = number % 4 == 0
        words = ["rezept", "backofen"] if hot else ["invoice", "payment"]
        reference.add(prompt(rng, number, words=words, centre=9.0 * hot))
    for number in range(60):
        recent.add(prompt(rng, number, words=["rezept", "backofen"], centre=9.0))
    said = describe(signal, TrafficProfiles(reference, recent), None)
    assert "about backofen, rezept" in said["text"] or "about rezept, backofen" in said["text"]
    assert not said["topics"][0]["new"]


def test_a_single_word_is_no_topic():
    """Few of those that came since have a word in common that five askers used before."""
    rng = np.random.default_rng(1)
    signal = moved_signal(rng, PROMPT, prompt_row(0.0), prompt_row(3.0))
    reference, recent = profiles(rng, {"words": ["invoice"]}, {"words": ["girl"], "tokens": 30})
    said = describe(signal, TrafficProfiles(reference, recent), None)
    assert said["topics"][0]["words"] == ["girl"]
    assert "girl" not in said["text"] and "of the prompts: shorter (typically " in said["text"]


def test_how_prompts_are_written_is_named():
    rng = np.random.default_rng(7)
    signal = moved_signal(rng, PROMPT, prompt_row(0.0), prompt_row(3.0))
    reference, recent = profiles(rng, {"marks": ("lower",)}, {"marks": ("lower", "jailbreak")})
    again = TrafficProfile.from_state(json.loads(json.dumps(recent.state())))
    for profile in (recent, again):
        said = describe(signal, TrafficProfiles(reference, profile), None)
        assert (
            "with phrases that jailbreaks use (0 % before, 100 % now)" in said["text"] and "lower" not in said["text"]
        )
        assert said["writing"] == {"before": {"lower": 1.0}, "now": {"lower": 1.0, "jailbreak": 1.0}}


def test_what_stands_out_nowhere_is_not_made_up():
    rng = np.random.default_rng(2)
    signal = moved_signal(rng, PROMPT, prompt_row(0.0), prompt_row(3.0))
    reference, recent = profiles(rng, {"words": ["invoice"]}, {"words": ["invoice"]})
    said = describe(signal, TrafficProfiles(reference, recent), None)
    assert said["text"].endswith(UNNAMED)
    assert 0.2 < said["share_at_least"] <= 1


def test_a_cause_that_an_alarm_has_named_is_not_lost_while_it_is_open():
    rng = np.random.default_rng(2)
    vague = describe(moved_signal(rng, PROMPT, prompt_row(0.0), prompt_row(3.0)), TrafficProfiles(), None)
    assert UNNAMED in vague["text"]
    named = {"text": "more answers that repeat themselves (1 % before, 15 % now)"}
    assert clearer(named, vague) is named
    assert clearer(vague, named) is named and clearer(None, vague) is vague and clearer(vague, dict(vague)) is not vague


def output_row(tokens=50.0, cut=0.0, refusal=0.02, repeats=0.0):
    def row(rng):
        values = rng.standard_normal(5)
        flags = (float(rng.random() < cut), float(rng.random() < refusal), 0.9, 0.95 - repeats)
        values[:5] = (np.log1p(tokens) + 0.1 * rng.standard_normal(), *flags)
        return values

    return row


def test_answers_that_are_shorter_are_said_to_be():
    rng = np.random.default_rng(3)
    signal = moved_signal(rng, OUTPUT, output_row(), output_row(8.0, cut=0.9, refusal=0.4, repeats=0.5))
    said = describe(signal, TrafficProfiles(), None)
    assert "% of the answers: shorter answers (typically 5" in said["text"]
    assert said["refusal"]["now"] > 0.2 > 0.1 > said["refusal"]["before"]
    assert said["ended_by_length"]["now"] > 0.5 and said["repetition"]["now"] > said["repetition"]["before"] + 0.2


def test_a_version_that_is_less_sure_is_said_to_be():
    def row(mean):
        def made(rng):
            stats = (mean + 0.3 * rng.standard_normal(), -5 + rng.standard_normal(), 1 + 0.1 * rng.standard_normal())
            return np.concatenate((stats, rng.standard_normal(34)))

        return made

    rng = np.random.default_rng(4)
    said = describe(moved_signal(rng, LOGPROB, row(-1.0), row(-2.0)), TrafficProfiles(), None)
    assert "less sure of its answers by " in said["text"] and said["logprob_change"] < -0.5


def test_the_most_moved_request_is_known():
    rng = np.random.default_rng(5)
    signal = moved_signal(rng, PROMPT, prompt_row(0.0), prompt_row(3.0))
    old = np.mean([movement(signal, prompt_row(0.0)(rng)) for _ in range(50)])
    new = np.mean([movement(signal, prompt_row(3.0)(rng)) for _ in range(50)])
    assert abs(old) < 0.4 and new > 0.7
    assert movement(Signal(PROMPT), np.zeros(33)) == 0.0


def test_a_tenant_is_told_of_itself_alone():
    said = {"text": "x", "tenants": {"before": {"acme": 0.9, "globex": 0.1}, "now": {"globex": 1.0}}}
    assert for_tenant(said, "acme")["tenants"] == {"before": {"acme": 0.9}, "now": {}}
    assert for_tenant(describe_probe(2.0), "acme") == describe_probe(2.0)
    assert "2.0 times the noise" in describe_probe(2.0)["text"]


def test_a_profile_survives_a_restart_and_becomes_the_reference():
    rng = np.random.default_rng(6)
    reference, recent = profiles(rng, {"words": ["invoice"]}, {"words": ["rezept"], "language": "de"}, m=1500)
    again = TrafficProfile.from_state(recent.state())
    assert again.state() == recent.state() and len(again.seen) == 512 and len(again.topics) == 3
    accepted = recent.accepted(40)
    assert len(accepted.seen) == 40 and accepted.topics[0].typical(reference.topics)
    accepted.add(prompt(rng, 1))
    assert len(accepted.topics) == 3 and len(recent.seen) == 512
