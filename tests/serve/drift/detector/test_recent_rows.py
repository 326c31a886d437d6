"""The newest rows are there in their order, and no more of them than were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.detector.recent_rows import RecentRows


def row(number):
    return np.array([number, -number], np.float32)


def firsts(rows, count=None):
    return rows.last(count)[:, 0].tolist()


def test_the_oldest_rows_make_room():
    rows = RecentRows(2)
    assert rows.last().shape == (0, 2)
    for number in range(7):
        rows.extend(row(number)[None], 5)
    assert firsts(rows) == [2, 3, 4, 5, 6] and firsts(rows, 2) == [5, 6] and firsts(rows, 99) == [2, 3, 4, 5, 6]
    rows.clear()
    assert firsts(rows) == []


def test_they_go_on_after_a_restart_and_with_more_or_less_room():
    rows = RecentRows(2)
    for number in range(7):
        rows.extend(row(number)[None], 5)
    again = RecentRows(2, rows.last())
    for number in range(7, 9):
        rows.extend(row(number)[None], 5)
        again.extend(row(number)[None], 5)
    assert firsts(again) == firsts(rows) == [4, 5, 6, 7, 8]
    rows.extend(row(9)[None], 3)
    assert firsts(rows) == [7, 8, 9]
    rows.extend(row(10)[None], 6)
    assert firsts(rows) == [7, 8, 9, 10]
    with pytest.raises(ValueError, match="3 numbers"):
        RecentRows(3 - 1, np.zeros((4, 3), np.float32))
