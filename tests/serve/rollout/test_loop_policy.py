"""What a loop's policy may say."""

from __future__ import annotations

import pytest
import yaml

from serve.errors import ConfigError
from serve.rollout.loop_policy import LoopPolicy
from serve.rollout.policy import Policies, parse


def loop(**fields):
    return Policies(parse({"tone": {"train_on_traffic": True, "loop": fields}}))["tone"].loop


def test_without_a_policy_there_is_no_loop():
    assert parse({})[0].loop == LoopPolicy() and not LoopPolicy().on


def test_a_loop_says_when_it_trains_and_what_it_has_to_prove():
    text = "{on: [drift, schedule], every: 12h, wait: 30m, canary_for: 3600, promote: auto}"
    made = Policies(parse({"tone": {"train_on_traffic": True, "loop": yaml.safe_load(text)}}))["tone"].loop
    assert made.on == ("drift", "schedule") and made.promote == "auto"
    assert (made.every, made.wait, made.canary_for) == (43_200, 1800, 3600)
    assert made.share == 0.0125 and made.needed == 130
    assert loop(on="ratings").on == ("ratings",)


def test_an_adapter_takes_what_it_leaves_out_from_every_adapters_policy():
    own = {"train_on_traffic": True, "loop": {"on": ["drift"], "min_examples": 200}}
    _, tone = parse({"*": {"loop": {"gate": {"tolerance": 0.2}}}, "tone": own})
    assert tone.loop.gate.tolerance == 0.2 and tone.loop.gate.alpha == 0.05 and tone.loop.min_examples == 200


def test_a_loop_without_traffic_to_learn_from_is_refused():
    with pytest.raises(ConfigError, match="a loop learns from its traffic: add train_on_traffic: true"):
        parse({"tone": {"loop": {"on": ["drift"]}}})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (3, "the loop of tone takes on, every, "),
        ({"trigger": "drift"}, "the loop of tone takes on, every, "),
        ({"on": ["moon"]}, "on takes a list of drift, schedule, ratings"),
        ({"every": "soon"}, "every takes a duration, as 7d"),
        ({"every": 0}, "every takes a duration, as 7d"),
        ({"budget": 0}, "budget takes a whole number from 1 up"),
        ({"min_examples": True}, "min_examples takes a whole number from 1 up"),
        ({"held_out": 1}, "held_out takes a number from above 0 to 0.5"),
        ({"canary": 1}, "canary takes 0 up to 1"),
        ({"promote": "yes"}, "promote takes ask or auto"),
        ({"gate": {"alpha": 2}}, "gate.alpha takes a number between 0 and 1"),
        ({"gate": {"power": 1}}, "gate takes tolerance, alpha, golden"),
        ({"on": ["drift"], "min_examples": 100}, "hold out 30, and 130 are needed to prove"),
    ],
)
def test_what_it_cannot_say_is_a_sentence(fields, said):
    with pytest.raises(ConfigError, match="the loop of tone") as refused:
        loop(**fields) if isinstance(fields, dict) else parse({"tone": {"loop": fields}})
    assert said in refused.value.message
