"""Objectives are said in the configuration, and what cannot be measured is refused in a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.config import load
from serve.errors import ConfigError
from serve.telemetry.slo import DEFAULT_SLOS, FIRST_TOKEN_SECONDS, Objective, Slo, exempt

FIRST = Objective.FIRST_TOKEN


def slos(text):
    return load([], {"LORADOCK_SLOS": text}).slos


def test_without_a_word_every_adapter_has_the_defaults():
    assert load([], {}).slos == DEFAULT_SLOS
    assert {slo.adapter for slo in DEFAULT_SLOS} == {"*"}
    assert all(slo.threshold in slo.objective.bounds for slo in DEFAULT_SLOS if slo.threshold)


def test_an_adapter_takes_its_own_and_the_rest_keep_what_is_for_every_one(tmp_path):
    file = tmp_path / "loradock.yaml"
    file.write_text(
        """
slos:
  "*": {errors: {target: 0.999}}
  tone: {time_to_first_token: {threshold: 1, target: 0.99}}
  acme/slow: {time_to_first_token: off}
"""
    )
    said = load(["--config", str(file)], {}).slos
    assert Slo("*", Objective.ERRORS, 0.999) in said
    assert Slo("*", FIRST, 0.95, 2.5) in said
    assert Slo("tone", FIRST, 0.99, 1) in said
    assert Slo("acme/slow", FIRST, 0) in said
    assert exempt(said, FIRST) == ["acme/slow", "tone"]
    assert exempt(said, Objective.ERRORS) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{tone: {time_to_first_token: {threshold: 0.7, target: 0.99}}}", r"bucket bound .*\(0.005, .* 60\), not 0.7"),
        ("{tone: {time_to_first_token: {target: 0.99}}}", "takes target and threshold, or off, not"),
        ("{tone: {errors: {target: 0.99, threshold: 1}}}", "takes target, or off, not"),
        ("{tone: {errors: {target: 0.9}}}", "above 0.931 and below 1, as 0.99, not 0.9"),
        ("{tone: {errors: {target: 1}}}", "below 1, as 0.99, not 1.0"),
        ("{tone: {errors: {target: much}}}", "takes a number, not 'much'"),
        ("{tone: {speed: {target: 0.99}}}", "time_to_first_token, inter_token_latency, errors, not 'speed'"),
        ('{"a\\"}": {errors: {target: 0.99}}}', "an adapter's name"),
        ("{tone: 0.99}", "takes objectives"),
        ("0.99", "takes adapters with their objectives"),
        ("{", "slos is not YAML"),
    ],
)
def test_what_cannot_be_an_objective_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        slos(text)


async def test_the_server_exports_its_objectives(connect, config):
    given = (*DEFAULT_SLOS, Slo("tone", FIRST, 0.99, FIRST_TOKEN_SECONDS[7]), Slo("slow", FIRST))
    async with connect(replace(config, slos=given)) as client:
        metrics = (await client.get("/metrics")).text
    assert 'loradock_slo_threshold_seconds{adapter="*",slo="time_to_first_token"} 2.5' in metrics
    assert 'loradock_slo_threshold_seconds{adapter="tone",slo="time_to_first_token"} 1.0' in metrics
    assert 'loradock_slo_target{adapter="*",slo="errors"} 0.995' in metrics
    assert 'loradock_slo_target{adapter="slow",slo="time_to_first_token"} 0.0' in metrics
