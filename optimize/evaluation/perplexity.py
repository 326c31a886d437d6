"""Perplexities of losses in nats a token."""

import math

# A model that is this sure of the wrong token is broken; a perplexity of more is no number of 64 bits.
MOST = 700.0


def perplexity(loss: float) -> float:
    return round(math.exp(min(loss, MOST)), 4)


def increase(rise: float) -> float:
    """The share by which perplexity grows with a loss that rises so many nats."""
    return round(math.expm1(min(rise, MOST)), 5)
