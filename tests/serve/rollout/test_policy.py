"""What a policy may say."""

from __future__ import annotations

import pytest

from serve.errors import ConfigError
from serve.rollout.policy import Policies, Policy, parse


def test_a_policy_says_what_it_takes():
    every, tone = parse({"*": {"alpha": 0.02}, "tone": {"proved": "promote", "canary_weight": 0.1}})
    assert tone == Policy("tone", "rollback", "promote", 0.1, 0.02)
    assert Policies((every, tone))["other"] == every
    for wrong in (
        3,
        {"*": {"worse": "promote"}},
        {"*": {"weight": 1}},
        {"a": {"alpha": 2}},
        {"a": {"canary_weight": 1}},
        {"a": {"golden_min": 1.5}},
    ):
        with pytest.raises(ConfigError, match="takes"):
            parse(wrong)


def test_a_share_is_written_as_a_percentage_too():
    (every,) = parse({"*": {"canary_weight": "10%", "golden_min": "90%", "alpha": "1%"}})
    assert (every.canary_weight, every.golden_min, every.alpha) == (0.1, 0.9, 0.01)
    with pytest.raises(ConfigError, match="10%"):
        parse({"*": {"canary_weight": "ten%"}})


def test_an_adapter_takes_part_in_auto_or_is_its_default():
    policies = Policies(parse({"*": {"auto": True}, "tone": {"auto": "default"}, "judge": {"auto": False}}))
    assert [policies[name].auto for name in ("other", "tone", "judge")] == [True, "default", False]
    assert policies.routes("tone") and not policies.routes("judge")
    assert not Policies().routes("tone")
    with pytest.raises(ConfigError, match="true, false or default"):
        parse({"tone": {"auto": "maybe"}})
    with pytest.raises(ConfigError, match="one adapter is auto's default"):
        parse({"*": {"auto": "default"}})


def test_a_policy_names_the_checks_of_a_validation():
    (every, own) = parse({"*": {"validation": "all"}, "tone": {"validation": ["questions", "leaks"]}})
    assert every.validation == ("all",) and own.validation == ("questions", "leaks") and own.at_once.validation == ()
    assert parse({"*": {"validation": []}})[0].validation == ()
    for wrong in ("some", ["leaks", "speed"], 3):
        with pytest.raises(ConfigError, match="validation takes all, or a list of questions, text"):
            parse({"*": {"validation": wrong}})
