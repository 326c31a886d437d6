"""Commands run in this process: what one was given must not be left to the next."""

from __future__ import annotations

import pytest

from serve.cli import terminal


@pytest.fixture(autouse=True)
def no_json_from_an_earlier_command():
    terminal._as_json.set(False)
