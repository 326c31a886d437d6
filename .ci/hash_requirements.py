"""Writes serve/cli/requirements/*.txt: what loradock's extras install, pinned, with the sha256 of every file.

    python .ci/hash_requirements.py        # after a change of pyproject.toml or constraints*.txt; needs uv

uv resolves pyproject.toml under constraints-DEVICE.txt for every Python and Linux that loradock takes. `cpu.txt` and
`gpu.txt` hold all that serving needs; `EXTRA.txt` holds what an extra adds to either; optimize/requirements/optimum.txt
holds what `loradock optimize setup-optimum` installs apart. Only names, versions and hashes are written, no addresses:
pip takes the files from wherever it is set up to look.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.markers import Marker
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "serve/cli/requirements"
APART = ROOT / "optimize/requirements"
EXTRAS = sorted(
    tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys() - {"cpu", "gpu"}
)
PYTHONS = ("3.11", "3.12", "3.13")
OLDEST = "3.11.5"  # of Sphinx's neighbours; the others take 3.11.0
MACHINES = ("x86_64", "aarch64")

# Not in cpu.txt. PyPI does not have torch's CPU builds: they come from PyTorch's index or a wheel folder, and whoever
# runs that vouches for them. vLLM asks for the audio packages, whose wheels on PyPI are for CUDA, and works without.
# xgrammar asks for triton, 1 GB, and imports it on a GPU only.
NOT_ON_CPU = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "triton"})
# What torch and torchvision ask for, nonetheless: uv does not see it when they are left out.
OF_TORCH = ("filelock", "fsspec", "jinja2", "networkx", "numpy", "pillow", "setuptools", "sympy", "typing-extensions")
# uv reads the requirements of one wheel of intel-openmp for all of them, and not those of Linux.
OF_OPENMP = "intel-cmplr-lib-ur ; platform_machine == 'x86_64'"
# The newest exporter of optimum and what of its requirements conflicts with vLLM's; the rest is shared with vLLM.
OPTIMUM = (
    "optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2"
)  # fmt: skip


@dataclass(frozen=True)
class Package:
    """One pinned distribution: for which machines, and which files pip may take."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        marker = f" ; {self.marker}" if self.marker else ""
        return " \\\n".join(
            [f"{self.name}=={self.version}{marker}", *(f"    --hash=sha256:{one}" for one in self.hashes)]
        )


def main() -> None:
    base = {device: resolved(device) for device in ("cpu", "gpu")}
    for extra in EXTRAS:
        added: dict[str, Package] = {}
        # onnxruntime-genai owns the same package as its CUDA build.
        for device in ("cpu",) if extra == "genai" else ("cpu", "gpu"):
            for name, package in resolved(device, extra).items():
                known = base[device].get(name)
                if known:  # the extra may need on every Python what serving needs on some
                    base[device][name] = replace(known, marker=either(known.marker, package.marker))
                elif added.setdefault(name, package) != package:
                    sys.exit(f"{extra} takes another {name} on a CPU than on a GPU: {added[name]} and {package}")
        write(extra, added.values())
    for device, packages in base.items():
        write(device, packages.values())
    write("optimum", alone(OPTIMUM).values(), APART)


def either(one: str, other: str) -> str:
    """The marker of what is taken where one of two says so; "" is everywhere."""
    if one == other:
        return one
    return f"({one}) or ({other})" if one and other else ""


def write(name: str, packages: Iterable[Package], out: Path = OUT) -> None:
    """One file, by name, so that a change shows in a diff."""
    header = "# Made by .ci/hash_requirements.py. For pip install --no-deps --require-hashes.\n"
    body = "".join(f"{package}\n" for package in sorted(packages, key=lambda package: package.name))
    (out / f"{name}.txt").write_text(header + body)
    print(f"{name}.txt: {body.count('==')} packages, {body.count('--hash')} hashes")


def resolved(device: str, *extras: str) -> dict[str, Package]:
    """Everything that `loradock[device,extras]` installs on some machine, by name."""
    with tempfile.TemporaryDirectory() as folder:
        lock, more, overrides = Path(folder, "pylock.toml"), Path(folder, "more.txt"), Path(folder, "overrides.txt")
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", OLDEST]
        command += ["--format", "pylock.toml", "--output-file", str(lock), "--constraint", f"constraints-{device}.txt"]
        command += [word for extra in (device, *extras) for word in ("--extra", extra)]
        if device == "cpu":
            more.write_text("\n".join((*OF_TORCH, OF_OPENMP)))
            overrides.write_text("\n".join(f"{name} ; sys_platform == 'none'" for name in NOT_ON_CPU))
            command += ["--override", str(overrides), str(more)]
        subprocess.run([*command, "pyproject.toml"], cwd=ROOT, check=True)
        return packages_of(lock)


def alone(requirements: Iterable[str]) -> dict[str, Package]:
    """These and nothing that they ask for, by name."""
    with tempfile.TemporaryDirectory() as folder:
        lock, asked = Path(folder, "pylock.toml"), Path(folder, "asked.txt")
        asked.write_text("\n".join(requirements))
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", OLDEST, "--no-deps"]
        subprocess.run([*command, "--format", "pylock.toml", "--output-file", str(lock), str(asked)], check=True)
        return packages_of(lock)


def packages_of(lock: Path) -> dict[str, Package]:
    """The packages of a lock file that some machine of ours takes, by name."""
    packages = tomllib.loads(lock.read_text())["packages"]
    found: dict[str, Package] = {}
    for package in filter(None, map(read, packages)):
        if package.name in found:
            sys.exit(f"two versions of {package.name}: {found[package.name].version} and {package.version}")
        found[package.name] = package
    return found


def read(entry: dict[str, Any]) -> Package | None:
    """A package of the lock file; None where no machine of ours takes it."""
    holds = [Marker(entry["marker"]).evaluate(machine) for machine in machines()] if "marker" in entry else [True]
    if not any(holds):
        return None
    wheels = {file_name(wheel): digest(wheel) for wheel in entry.get("wheels", [])}
    files = sorted(sha256 for name, sha256 in wheels.items() if fits(name))
    if not files and "sdist" in entry:  # nobody built a wheel
        files = [digest(entry["sdist"])]
    name = canonicalize_name(entry["name"])
    if not files:
        sys.exit(f"nobody built {name} {entry['version']} for Linux, and there is no sdist")
    return Package(name, entry["version"], "" if all(holds) else entry["marker"], tuple(files))


def machines() -> Iterator[dict[str, str]]:
    """Every Python and Linux that loradock takes, as markers see them."""
    for python in PYTHONS:
        for machine in MACHINES:
            yield {
                "python_version": python,
                "python_full_version": f"{python}.9",
                "platform_machine": machine,
                "sys_platform": "linux",
                "platform_system": "Linux",
                "os_name": "posix",
                "implementation_name": "cpython",
                "platform_python_implementation": "CPython",
            }


def fits(wheel: str) -> bool:
    """Whether some machine of ours can install this wheel."""
    return any(
        _fits_platform(tag.platform) and _fits_python(tag.interpreter, tag.abi)
        for tag in parse_wheel_filename(wheel)[3]
    )


def _fits_platform(platform: str) -> bool:
    return platform == "any" or (platform.startswith(("linux", "manylinux")) and platform.endswith(MACHINES))


def _fits_python(interpreter: str, abi: str) -> bool:
    if interpreter.startswith("py3"):
        return True
    version = re.fullmatch(r"cp3(\d+)", interpreter)
    if not version:
        return False
    minor = int(version[1])
    return minor <= 13 if abi == "abi3" else f"3.{minor}" in PYTHONS and abi in ("none", interpreter)


def file_name(file: dict[str, Any]) -> str:
    return str(file.get("name") or unquote(Path(file["url"]).name))


def digest(file: dict[str, Any]) -> str:
    return str(file["hashes"]["sha256"])


if __name__ == "__main__":
    main()
