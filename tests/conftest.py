"""The slowest files of tests: they begin first where processes share the tests, and `make check` leaves them out."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# By seconds of CPU, the slowest first: half a minute and more.
SLOW = (
    "optimize/pipeline/test_run.py",
    "serve/cpu_kernels/test_step.py",
    "optimize/export/test_onnx.py",
    "optimize/test_families.py",
    "serve/cpu_kernels/test_processors.py",
    "optimize/pipeline/test_gate.py",
    "optimize/export/test_optimum.py",
    "serve/api/test_dashboard.py",
    "serve/cpu_kernels/test_arm64.py",
    "optimize/pipeline/test_tune_job.py",
    "optimize/test_second_device.py",
    "serve/cpu_kernels/test_packing.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ranks = {TESTS / name: rank for rank, name in enumerate(SLOW)}
    for item in items:
        if item.path in ranks:
            item.add_marker(pytest.mark.slow)
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
