"""Parts of a state are found again under their prefix."""

from __future__ import annotations

import numpy as np

from serve.drift.state_arrays import below, prefixed


def test_a_part_comes_out_of_the_whole_as_it_went_in():
    part, other = {"r": np.ones(2), "bank.r": np.zeros(1)}, {"r": np.arange(3)}
    whole = prefixed(part, "bank.") | prefixed(other, "banks.")
    assert whole.keys() == {"bank.r", "bank.bank.r", "banks.r"}
    assert below(whole, "bank.") == part and below(whole, "none.") == {}
