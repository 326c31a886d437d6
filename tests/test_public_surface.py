"""What landed goes on being there: nothing that somebody's script may say has gone."""

from __future__ import annotations

import json

import pytest

from tests.support.public_surface import FILE, surface

THEN = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def now() -> dict[str, list[str]]:
    return surface()


@pytest.mark.parametrize("kind", THEN)
def test_nothing_is_gone(kind, now):
    assert len(THEN[kind]) > 50
    assert set(THEN[kind]) - set(now[kind]) == set()


@pytest.mark.parametrize("kind", THEN)
def test_what_came_is_written_down(kind, now):
    """`python -m tests.support.public_surface` does it."""
    assert set(now[kind]) - set(THEN[kind]) == set()
