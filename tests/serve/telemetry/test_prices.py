"""Prices are read strictly, and a request costs what they say."""

from __future__ import annotations

import pytest

from serve.errors import ConfigError
from serve.telemetry.prices import FREE, Price, parse, price_for


def test_tokens_cost_by_the_million_and_the_engine_by_the_hour():
    price = Price(prompt=0.5, cached=0.1, generated=2.0, engine_hour=3.6)
    assert price.cost(3_000_000, 1_000_000, 500_000, 1000.0) == pytest.approx(2 * 0.5 + 0.1 + 1.0 + 1.0)
    assert Price(prompt=0.5).cost(3_000_000, 1_000_000, 9, 9.0) == pytest.approx(1.5), "cached costs what prompts do"


def test_an_adapter_has_its_own_price_or_everybodys_or_none():
    prices = parse({"*": {"prompt": 1}, "acme/tone": {"generated": 2.5}})
    assert price_for(prices, "acme/tone") == Price("acme/tone", generated=2.5)
    assert price_for(prices, "other").prompt == 1.0
    assert price_for(parse({}), "other") == FREE


@pytest.mark.parametrize(
    "wrong", [[], {"*": 3}, {"*": {"tokens": 1}}, {"*": {"prompt": -1}}, {"*": {"prompt": "x"}}, 
              {"*": {"prompt": True}}, {3: {}}, {"*": {"prompt": float("inf")}}, {"*": {"prompt": float("nan")}}],
)  # fmt: skip
def test_anything_else_is_a_sentence(wrong):
    with pytest.raises(ConfigError, match="price"):
        parse(wrong)
