"""What a policy may say."""

from __future__ import annotations

import pytest

from serve.errors import ConfigError
from serve.rollout.policy import Policy, parse, policy_for


def test_a_policy_says_what_it_takes():
    every, tone = parse({"*": {"alpha": 0.02}, "tone": {"proved": "promote", "canary_weight": 0.1}})
    assert tone == Policy("tone", "rollback", "promote", 0.1, 0.02)
    assert policy_for((every, tone), "other") == every
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
