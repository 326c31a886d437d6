"""Kill `loradock optimize` at random moments and resume it until it is done: it ends with an undisturbed run's bytes.

    python -m tests.campaigns.kills RECIPE [--kills 30] [--seed 0] [-- any option of loradock optimize]

A kill comes at any time up to half of what the undisturbed run took, so that a run is killed many times on its way.
After a kill the output directory must be complete, or must not exist.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from optimize.checkpoint import artifact

ROOT = Path(__file__).parents[2]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "serve.cli", "optimize", *map(str, arguments)]


def files(folder: Path) -> dict[str, str]:
    """What has to be the same again: everything but the report, which holds times."""
    return {name: digest for name, digest in artifact.contents(folder).items() if not name.startswith("report/")}


def killed(
    arguments: Sequence[str | Path], out: Path, whole: dict[str, str], kills: int, longest: float, seed: int
) -> int:
    """How often the run could be killed before it was done; AssertionError when what it leaves is not `whole`."""
    dice, done = random.Random(seed), 0
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    while True:
        run = subprocess.Popen(
            command(*arguments, "--out", out, "--resume"), env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            output, _ = run.communicate(timeout=dice.uniform(0.3, longest) if done < kills else None)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
            done += 1
            # The output directory is complete, or does not exist.
            assert not out.exists() or files(out) == whole
            continue
        assert run.returncode == 0, output.decode()
        assert files(out) == whole
        assert not out.with_name(out.name + ".work").exists()
        if done >= kills or done == 0:
            return done
        # Done before it was killed as often as was asked: once more from the beginning.
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "whole" / "out", Path(folder) / "killed" / "out"
        first.parent.mkdir()
        second.parent.mkdir()
        begun = time.monotonic()
        subprocess.run(
            command(arguments.recipe, *arguments.options, "--out", first),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
        took = time.monotonic() - begun
        whole = files(first)
        print(f"undisturbed: {took:.0f} s, {len(whole)} files", flush=True)
        begun = time.monotonic()
        done = killed([arguments.recipe, *arguments.options], second, whole, arguments.kills, took / 2, arguments.seed)
        print(f"killed {done} times and resumed: the same {len(whole)} files, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
