"""The campaign that compares delays: its methods run on what the detector keeps, whatever that looks like inside."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.features.features import prompt_row
from tests.campaigns import drift_delays

NEEDED, BEFORE, AFTER = 250, 40, 60


@pytest.fixture
def texts(monkeypatch):
    """Two kinds of texts, of other words, from a small pool of tokens."""
    embedding, rng = drift_delays.embedding(), np.random.default_rng(0)

    def rows(kind):
        words = rng.integers(1000, 1400, 40) if kind == "usual" else rng.integers(20_000, 20_400, 40)
        return [prompt_row(embedding, rng.choice(words, rng.integers(10, 40))) for _ in range(NEEDED + BEFORE + AFTER)]

    kinds = {kind: rows(kind) for kind in ("usual", "foreign")}
    monkeypatch.setattr(drift_delays, "prompt_rows", kinds.__getitem__)
    monkeypatch.setattr(drift_delays, "NEEDED", NEEDED)
    monkeypatch.setattr(drift_delays, "BEFORE", BEFORE)


def test_every_method_looks_at_every_request_and_sees_a_whole_change(texts):
    changed = drift_delays.stream("usual", "foreign", 1.0, AFTER, 1)
    assert set(changed.said) == set(drift_delays.METHODS)
    for name, said in changed.said.items():
        assert said.shape == (BEFORE + AFTER,) and np.isfinite(said).all(), name
        assert said[BEFORE:].max() > said[:BEFORE].max(), name
    assert changed.alarm is not None and changed.alarm > BEFORE


def test_alone_a_stream_ends_with_the_alarm(texts):
    changed = drift_delays.stream("usual", "foreign", 1.0, AFTER, 1, alone=True)
    assert changed.alarm == len(changed.said["evidence"]) < BEFORE + AFTER
