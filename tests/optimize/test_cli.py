"""The command's own words, where a step has nothing to do with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from optimize.errors import UNREAD

PROGRAM = "import sys; from optimize import cli; sys.exit(cli.run(sys.argv[1:], None))"


@pytest.mark.parametrize("how", [[], ["--json"]], ids=["words", "json"])
def test_a_run_whose_output_nobody_reads_any_more_ends_with_a_sentence(written, tmp_path, how):
    words = [str(written("steps:\n- prune: {layers: 1}\n")), "--out", str(tmp_path / "out"), *how]
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run.stdout.readline()
    run.stdout.close()
    said = run.stderr.read()
    assert run.wait(timeout=60) == 1, said
    assert said.splitlines()[-1] == f"loradock: {UNREAD}"


@pytest.mark.parametrize("memory", ["nan", "inf", "-1"])
def test_memory_that_is_no_amount_is_refused_in_a_sentence(written, tmp_path, memory):
    words = [
        str(written("steps:\n- prune: {layers: 1}\n")),
        "--out",
        str(tmp_path / "out"),
        "--memory",
        memory,
        "--plan",
    ]
    run = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "takes GB, such as 12" in run.stderr, run.stderr
