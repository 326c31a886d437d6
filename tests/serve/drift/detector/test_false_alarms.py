"""All versions together raise no more false alarms than one in `threshold` rows, looked at after every request."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serve.drift.detector.detector import Drift
from serve.drift.drift_report import FalseAlarms

THRESHOLD = 50.0


def test_over_many_versions_the_false_alarms_stay_within_what_is_said():
    """Each version is as long as chance makes it; after an alarm it begins again at nothing."""
    draw = np.random.default_rng(21)
    expected, raised = FalseAlarms(THRESHOLD), 0
    for version in range(40):
        scores = draw.standard_t(3, (60 + int(draw.exponential(300)), 3))
        detector = Drift(scores[:60], threshold=THRESHOLD, seed=version)
        for row in scores[60:]:
            expected.count(1, 1)
            if detector.update(row):
                raised += 1
                detector.reset()
    # Alarms of one version come at least as far apart as those of a geometric distribution would.
    assert raised <= expected.expected + 3 * math.sqrt(expected.expected)
    assert expected.requests > 5000


def test_what_is_said_does_not_depend_on_how_many_versions_there_are():
    false_alarms = FalseAlarms(1e5)
    assert false_alarms.requests_each == pytest.approx(1e5 / 3), "before any request: three signals"
    for _ in range(200):
        false_alarms.count(100, 205)
    assert false_alarms.report()["requests_each_at_least"] == round(1e5 / 2.05)
    assert false_alarms.expected == pytest.approx(200 * 205 / 1e5)
