"""The capital of one who bets on bounded numbers: evidence against "their mean is 0 or less".

Numbers x from -`most_lost` up. If their mean given those before is at most 0, then for each bet b in (0, 1) the product
of 1 + b * x / most_lost is a supermartingale that begins at 1, and so is the mean over several b. By Ville's inequality
P(it ever reaches 1 / alpha) <= alpha, looked at after every number (Waudby-Smith and Ramdas, Estimating means of
bounded random variables by betting, 2024).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a server reads policies before it is forked, and numpy's import starts a thread
    import numpy as np
    from numpy.typing import NDArray

# As parts of the largest bet that cannot lose everything.
BETS = (0.1, 0.3, 0.5, 0.7, 0.9)


def highest(stakes: NDArray[np.float64], most_lost: float) -> float:
    """The highest ln of the mean capital, over all times; a stake is at least -most_lost."""
    import numpy as np

    capitals = np.log1p(np.outer(BETS, stakes) / most_lost).cumsum(axis=1)
    means = np.logaddexp.reduce(capitals, axis=0) - math.log(len(BETS))
    return float(means.max(initial=0.0))


def needed(growth: float, alpha: float) -> int:
    """Numbers until capital that grows by `growth` a number (ln) outweighs alpha and the mean over the bets."""
    return math.ceil((math.log(len(BETS)) - math.log(alpha)) / growth) if growth > 0 else 1 << 30


def needed_for_proof(tolerance: float, alpha: float) -> int:
    """Pairs without any difference after which "worse by the tolerance" is refuted."""
    return needed(math.log1p(BETS[-1] * tolerance / (1 - tolerance)), alpha)
