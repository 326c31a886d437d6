"""What the tests of the registry put into it."""

from __future__ import annotations

import pytest

from serve.adapters.adapter import Inspection
from serve.adapters.registry.registry import Registry

FOUND = Inspection(rank=8, base="toy", target_modules=("k_proj", "q_proj"), nbytes=1234, tensors=4)


def digest(number: int) -> str:
    return f"{number:064x}"[::-1]


# What looks into SQLite's file.
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


def push(registry: Registry, name: str, number: int, **options) -> int:
    return registry.add(name, FOUND, digest(number), by="ana", **options)[0].version
