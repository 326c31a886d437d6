"""Parts of a state are found again under their prefix."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.state_arrays import below, prefixed
from serve.sequential.random_state import rng_from, rng_state


def test_a_part_comes_out_of_the_whole_as_it_went_in():
    part, other = {"r": np.ones(2), "bank.r": np.zeros(1)}, {"r": np.arange(3)}
    whole = prefixed(part, "bank.") | prefixed(other, "banks.")
    assert whole.keys() == {"bank.r", "bank.bank.r", "banks.r"}
    assert below(whole, "bank.") == part and below(whole, "none.") == {}


def test_random_numbers_go_on_where_they_were_and_other_words_are_refused():
    rng = np.random.default_rng(1)
    rng.random(3)
    assert rng_from(rng_state(rng)).random() == rng.random()
    with pytest.raises(ValueError, match="none of PCG64"):
        rng_from(np.full(6, 2**63, np.uint64))
