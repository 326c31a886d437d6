"""What files of tests cost: the slowest begin first where processes share them, and `make check` leaves those out."""

from __future__ import annotations

import os
import random
import resource
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

# An example takes as long as whoever else has the cores lets it. Who asks for more of them looks for new ones.
hypothesis.settings.register_profile("loradock", deadline=None, derandomize="HYPOTHESIS_EXAMPLES" not in os.environ)
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
DEAREST = 30  # files of which the end of a run tells
BEGUN = pytest.StashKey[float]()
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


def seed() -> None:
    """What a test draws does not depend on which were before it in this process."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGUN] = cpu_seconds()
    seed()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown" and BEGUN in item.stash:
        report.user_properties.append(("cpu_seconds", cpu_seconds() - item.stash[BEGUN]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the files of tests cost, the dearest first; a server counts where it ends."""
    cpu, wall = Counter[str](), Counter[str]()
    for report in (one for reports in terminalreporter.stats.values() for one in reports):
        if isinstance(report, pytest.TestReport):
            file = report.nodeid.partition("::")[0]
            wall[file] += report.duration
            cpu[file] += dict(report.user_properties).get("cpu_seconds", 0.0) if report.when == "teardown" else 0.0
    if len(cpu) > 1:
        told = f"dearest files: of {sum(cpu.values()):.0f} s of CPU time, {sum(wall.values()):.0f} s of the clock's"
        terminalreporter.section(told)
        for file, seconds in cpu.most_common(DEAREST):
            terminalreporter.write_line(f"{seconds:7.1f} s CPU {wall[file]:7.1f} s {file}")
