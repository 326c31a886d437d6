"""The slowest files of tests: they begin first where processes share the tests, and `make check` leaves them out."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

# An example takes as long as whoever else has the cores lets it.
hypothesis.settings.register_profile("loradock", deadline=None)
hypothesis.settings.load_profile("loradock")

TESTS = Path(__file__).parent
# Half a minute and more on two cores, the slowest first.
SLOW = (
    "serve/telemetry/test_queue_alert.py",
    "optimize/pipeline/test_run.py",
    "optimize/export/test_onnx.py",
    "optimize/test_families.py",
    "serve/cpu_kernels/test_processors.py",
    "optimize/export/test_optimum.py",
    "serve/jobs/finetuning/test_real_training.py",
    "serve/jobs/finetuning/test_killed.py",
    "serve/api/test_dashboard.py",
    "serve/cpu_kernels/test_arm64.py",
    "e2e/test_neighbours.py",
    "optimize/pipeline/test_tune_job.py",
    "optimize/test_second_device.py",
)
# A job trains at the lowest priority: on a processor that other tests leave to it.
LAST = TESTS / "e2e/test_fine_tuning.py"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only tests of the engine are wanted, nine files of ten are not imported."""
    if config.getoption("markexpr") == "engine" and collection_path.name.startswith("test_"):
        return "mark.engine" not in collection_path.read_text() or None
    return None


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are told apart by their number: what packs them may write the time into them."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ranks = {TESTS / name: rank for rank, name in enumerate(SLOW)}
    assert all(file.exists() for file in ranks), "a file of this list was moved"
    for item in items:
        if item.path in ranks:
            item.add_marker(pytest.mark.slow)
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    else:
        items.sort(key=lambda item: item.path == LAST)
