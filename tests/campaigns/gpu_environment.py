"""A Python with vLLM and loradock for `make gpu`, without a network. Its path is the last line that is printed.

    python3 -m tests.campaigns.gpu_environment [--wheels FOLDER] [--folder .venv-gpu]

Where this Python has both, it is that one. Otherwise an environment is made: over this Python's packages where vLLM is
among them, and from FOLDER's wheels (`make gpu-wheels`) what is missing. Needs nothing but Python itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ("gpu", "optimize")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-gpu")
    given = parser.parse_args()
    if complete():
        print(sys.executable)
        return 0
    if given.wheels is None and find_spec("vllm") is None:
        print("vLLM is not installed here: say WHEELS=FOLDER, which `make gpu-wheels` fills", file=sys.stderr)
        return 2
    venv.create(given.folder, system_site_packages=find_spec("vllm") is not None, with_pip=True)
    python = given.folder / "bin" / "python"
    if given.wheels is not None:
        files = [f"--requirement={ROOT}/serve/cli/requirements/{name}.txt" for name in REQUIREMENTS]
        _pip(python, "--no-deps", f"--find-links={given.wheels.resolve()}", *files)
    # vLLM finds loradock's part in its processes through the entry point of what is installed.
    _pip(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    missing = subprocess.run([python, "-c", "import serve.cli.main, optimize.cli, vllm"], cwd=ROOT, check=False)
    if missing.returncode:
        print("the Python here lacks what the line above names: give a folder of wheels that holds it", file=sys.stderr)
        return 2
    print(python)
    return 0


def complete() -> bool:
    """Whether this Python has vLLM, and loradock as vLLM's processes look for it."""
    known = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    return find_spec("vllm") is not None and "loradock" in known


def _pip(python: Path, *arguments: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
