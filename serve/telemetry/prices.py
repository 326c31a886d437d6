"""What tokens and the engine's time cost, by adapter: money is an estimate for whoever passes costs on.

`prices` in the configuration has one for every adapter (`"*"`), and one for each adapter that needs another:

    currency: EUR
    prices:
      "*": {prompt: 0.10, cached: 0.02, generated: 0.40}    # for a million tokens
      tone: {engine_hour: 2.50}                             # for an hour of the engine's time, beside or without tokens

What is left out is free; `cached` is the price of prompt tokens that came from the prefix cache, by default `prompt`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.errors import ConfigError

EVERY = "*"


@dataclass(frozen=True, slots=True)
class Price:
    """Of one adapter, or of all that have none of their own (`*`): for a million tokens, and an hour of the engine."""

    adapter: str = EVERY
    prompt: float = 0.0
    generated: float = 0.0
    cached: float | None = None
    engine_hour: float = 0.0

    def cost(self, prompt_tokens: int, cached_tokens: int, generated_tokens: int, engine_seconds: float) -> float:
        """Of a request, in the configuration's currency; `cached_tokens` are among the `prompt_tokens`."""
        cached = self.prompt if self.cached is None else self.cached
        tokens = (
            (prompt_tokens - cached_tokens) * self.prompt + cached_tokens * cached + generated_tokens * self.generated
        )
        return tokens / 1e6 + engine_seconds / 3600 * self.engine_hour


FREE = Price()
_NAMES = tuple(field.name for field in dataclasses.fields(Price) if field.name != "adapter")


def parse(prices: Any) -> tuple[Price, ...]:
    """The prices in the configuration."""
    if not isinstance(prices, Mapping):
        raise ConfigError(f'prices takes adapters with their prices, as {{"*": {{prompt: 0.1}}}}, not {prices!r}')
    return tuple(_price(adapter, fields) for adapter, fields in prices.items())


def price_for(prices: Sequence[Price], adapter: str) -> Price:
    """The price of the adapter of this full name; nothing, if none was set."""
    every = FREE
    for price in prices:
        if price.adapter == adapter:
            return price
        if price.adapter == EVERY:
            every = price
    return every


def _price(adapter: Any, fields: Any) -> Price:
    if not isinstance(adapter, str):
        raise ConfigError(f'prices takes an adapter\'s name, TENANT/NAME or "*", not {adapter!r}')
    if not isinstance(fields, Mapping) or not set(fields) <= set(_NAMES):
        raise ConfigError(f"the price of {adapter} takes {', '.join(_NAMES)}, not {fields!r}")
    return Price(adapter, **{name: _number(adapter, name, value) for name, value in fields.items()})


def _number(adapter: str, name: str, value: Any) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(f"the price of {adapter}: {name} takes a number from 0 up, not {value!r}")
    return number
