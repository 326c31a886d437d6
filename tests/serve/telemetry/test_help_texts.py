"""Whoever reads a metric's help learns what is counted, in which unit, and when."""

from __future__ import annotations

import re

HELP = re.compile(r"^# HELP (loradock_\w+) (.*)$", re.MULTILINE)
UNITS = {"_seconds": "econds", "_seconds_total": "econds", "_bytes": "ytes"}


async def test_every_metric_says_what_it_counts_and_in_which_unit(client):
    helps = dict(HELP.findall((await client.get("/metrics")).text))
    assert len(helps) > 40
    wrong = [f"{name}: {text}" for name, text in helps.items() if len(text.split()) < 7 or not text.endswith(".")]
    for end, unit in UNITS.items():
        wrong += [
            f"{name} has no unit: {text}" for name, text in helps.items() if name.endswith(end) and unit not in text
        ]
    assert not wrong, "\n".join(wrong)
