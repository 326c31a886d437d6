"""An image, built from docker/Dockerfile.cpu and started: health check, chat, push, a restart on the same volume.

    python -m tests.campaigns.image [--folder DIR] [--log FILE] [--device gpu]

The image for GPUs is played as far as the driver, where this machine has none: what it is to have is there, and a start
ends in a sentence that says what is missing.

Needs root, and Debian's buildah, netavark and debootstrap (`apt-get install --no-install-recommends ...`).
Where the hub is out of reach, Debian's base system with this Python stands in for `python:...-slim-trixie`. DIR keeps
the base and the image for a next run; without it nothing is kept. Takes 20 GB of disk for a moment, for GPUs 50 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.lora import trained
from tests.support.newcomer import Terminal, chat, content
from tests.support.server import ADMIN, ROOT, descendants, free_port

PYTHON_IMAGE = "localhost/python:slim-trixie"
# Programs that the image for GPUs has, and what is imported of its packages without a driver.
PROGRAMS = ("loradock", "vllm", "python", "g++", "ninja")
IMPORTS = (
    "serve.server.assembly",
    "optimize.cli",
    "torch",
    "triton",
    "flashinfer",
    "vllm.engine.arg_utils",
    "onnxruntime",
)
# How a start without a driver ends.
NO_DRIVER = "no GPU"
# What CPython's own modules link to, and what the hub's slim image has beside.
LIBRARIES = (
    "ca-certificates,netbase,tzdata,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8t64,libsqlite3-0,"
    "libssl3t64,libuuid1,zlib1g"
)


class Buildah:
    """buildah with its storage in a folder of ours, without user namespaces or overlay mounts."""

    def __init__(self, folder: Path, terminal: Terminal, device: str) -> None:
        self.device = device
        self._terminal = terminal
        storage = f"--root {folder}/storage --runroot {folder}/run --storage-driver vfs"
        self.program = f"buildah {storage}"
        self.image = f"localhost/loradock:{device}"
        # The container's limits may not be above this machine's.
        limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        hard = {name: resource.getrlimit(number)[1] for name, number in limits.items()}
        self.limits = " ".join(f"--ulimit {name}={most}:{most}" for name, most in hard.items())

    def __call__(self, words: str, lines: int = 12) -> str:
        return self._terminal.type(f"{self.program} {words}", lines)

    def quiet(self, words: str) -> str:
        """As it came, and not in the log."""
        command = f"{self.program} {words}"
        return subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True).stdout.strip()

    def has(self, image: str) -> bool:
        return subprocess.run(["bash", "-c", f"{self.program} inspect {image}"], capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the base and the image here")
    parser.add_argument("--log", type=Path, help="where the log goes, too")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--built", action="store_true", help="take the image that a run with the same DIR has made")
    options = parser.parse_args()
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        sys.exit("as root: apt-get install --no-install-recommends buildah netavark debootstrap")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="loradock-image-"))
    folder.mkdir(parents=True, exist_ok=True)
    terminal = Terminal(ROOT, os.environ, {str(folder): "/tmp/x", sys.base_prefix: "/usr/local", str(ROOT): "."})
    try:
        run(Buildah(folder, terminal, options.device), folder, terminal, options.built)
        if options.log:
            options.log.write_text("\n".join(terminal.lines) + "\n")
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


def run(buildah: Buildah, folder: Path, terminal: Terminal, built: bool) -> None:
    if not buildah.has(PYTHON_IMAGE):
        make_base(buildah, folder, terminal)
    mounts = pip_settings(folder)
    if not built:
        build(buildah, mounts)
    container = buildah.quiet(f"from {buildah.limits} {buildah.image}")
    try:
        sizes(buildah, container, terminal)
        if buildah.device == "gpu":
            play(buildah, mounts, container, terminal)
            return
        volume = folder / "volume"
        shutil.rmtree(volume, ignore_errors=True)
        volume.mkdir()
        os.chown(volume, 10001, 10001)
        use(buildah, f"{mounts} -v {volume}:/var/lib/loradock", container, terminal)
    finally:
        buildah.quiet(f"rm {container}")


def build(buildah: Buildah, mounts: str) -> None:
    buildah(
        f"build --isolation chroot {buildah.limits} --format docker {mounts} --build-arg PYTHON_IMAGE={PYTHON_IMAGE} "
        f"-f docker/Dockerfile.{buildah.device} -t {buildah.image} ."
    )


def play(buildah: Buildah, mounts: str, container: str, terminal: Terminal) -> None:
    """The image for GPUs on a machine without a driver: everything but the device."""
    where = f"{buildah.program} run --isolation chroot {mounts} --env LORADOCK_ADMIN_KEYS={ADMIN} {container} --"
    config = image_config(buildah)
    assert config["User"] == "10001:10001" and "LORADOCK_DATA_DIR=/var/lib/loradock/data" in config["Env"]
    for program in PROGRAMS:
        terminal.type(f"{where} sh -c 'command -v {program}'")
    assert "nvcc" not in terminal.type(f"{where} sh -c 'command -v nvcc || echo no compiler of CUDA'")
    for module in IMPORTS:
        terminal.type(f"{where} python -c 'import {module}; print(\"{module} is imported\")'", lines=2)
    terminal.type(f"{where} loradock plan meta-llama/Llama-3.1-8B-Instruct --gpu h100")
    terminal.type(f"{where} loradock doctor || true", lines=40)
    start = f"{where} {' '.join(config['Entrypoint'])}"
    ended = terminal.type(f"{start} 2>&1 || echo it failed", lines=20).splitlines()
    said = [line for line in ended if line.startswith("loradock: ")]
    assert ended[-1] == "it failed" and len(said) == 1 and NO_DRIVER in said[0] and "Traceback" not in str(ended), ended


def use(buildah: Buildah, mounts: str, container: str, terminal: Terminal) -> None:
    """Start, chat, push; stop; start on the same volume, and find everything there."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    ask = f"-H 'Authorization: Bearer {ADMIN}'"
    where = f"run --isolation chroot {mounts} --env LORADOCK_PORT={port} --env LORADOCK_ADMIN_KEYS={ADMIN}"
    config = image_config(buildah)
    entrypoint, health = " ".join(config["Entrypoint"]), config["Healthcheck"]["Test"][1:]

    def healthy() -> bool:
        command = [*f"{buildah.program} {where} {container} --".split(), *health]
        return subprocess.run(command, capture_output=True).returncode == 0

    start = f"{buildah.program} {where} {container} -- {entrypoint}".split()
    with terminal.serving(start, url, server_of) as pid:
        assert healthy()
        terminal.note("(its health check says that it is healthy)")
        users = {Path(f"/proc/{one}").stat().st_uid for one in descendants(pid) if is_loradock(one)}
        terminal.note(f"(its processes belong to user {', '.join(map(str, users))})")
        assert users == {10001}
        assert "Paris" in content(terminal.type(f"{chat('smollm2', url)} {ask}"))
        files = " ".join(f"-F files=@{file}" for file in sorted(trained("alpha")["alpha"].iterdir()))
        terminal.type(f"curl -sf {url}/v1/adapters {ask} -F name=tone {files} | head -c 200")
        assert "alpha alpha" in content(terminal.type(f"{chat('tone', url)} {ask}"))
    assert not healthy()
    terminal.note("(stopped; its health check says so)")
    with terminal.serving(start, url, server_of):
        assert "alpha alpha" in content(terminal.type(f"{chat('tone', url)} {ask}"))
        terminal.note("(the adapter was on the volume)")
    terminal.type(f"{buildah.program} {where} {container} -- loradock doctor || true", lines=40)


def is_loradock(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/exe").resolve().name.startswith("python")
    return False


def server_of(pid: int) -> int:
    """The first process in the container: the lowest id of those that run Python."""
    return min(one for one in descendants(pid) if is_loradock(one))


def image_config(buildah: Buildah) -> dict[str, Any]:
    inspected: dict[str, Any] = json.loads(buildah.quiet(f"inspect --type image {buildah.image}"))["Docker"]["config"]
    return inspected


def sizes(buildah: Buildah, container: str, terminal: Terminal) -> None:
    """What the image holds, and what of it is large."""
    root = buildah.quiet(f"mount {container}")
    terminal.note("$ du of the image, in MB")
    python = next(Path(root, "opt/loradock/lib").glob("python3.*"))
    for path in (
        Path(root),
        Path(root, "usr"),
        Path(root, "opt/loradock"),
        *sorted((python / "site-packages").iterdir()),
    ):
        size = int(subprocess.run(["du", "-sm", path], check=True, capture_output=True, text=True).stdout.split()[0])
        if size >= 60:
            terminal.note(f"{size:6}  /{path.relative_to(root)}")
    buildah.quiet(f"umount {container}")


def pip_settings(folder: Path) -> str:
    """Mounts that let pip and apt in a container look where they look here; nothing of it stays in an image."""
    settings = folder / "pip.conf"
    lines = ["[global]"]
    mounts = [f"-v {settings}:/etc/pip.conf:ro"]
    if links := os.environ.get("PIP_FIND_LINKS"):
        lines.append("find-links = /wheels")
        mounts.append(f"-v {links}:/wheels:ro")
    if cert := os.environ.get("PIP_CERT"):
        lines.append(f"cert = {cert}")
        mounts.append(f"-v {cert}:{cert}:ro")
    settings.write_text("\n".join(lines) + "\n")
    return " ".join(mounts)


def make_base(buildah: Buildah, folder: Path, terminal: Terminal) -> None:
    """Debian's smallest system and the Python that runs this, where the hub's image has it."""
    tree = folder / "base"
    shutil.rmtree(tree, ignore_errors=True)
    terminal.type(f"debootstrap --variant=minbase --include={LIBRARIES} trixie {tree}", lines=1)
    shutil.rmtree(tree / "var/cache/apt/archives", ignore_errors=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix, local = Path(sys.base_prefix), tree / "usr/local"
    skipped = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a")
    shutil.copytree(prefix / "lib" / version, local / "lib" / version, ignore=skipped, symlinks=True)
    shutil.copytree(prefix / "include", local / "include", dirs_exist_ok=True)
    (local / "lib" / version / "site-packages").mkdir()
    for library in prefix.glob("lib/libpython3*.so*"):
        shutil.copy(library, local / "lib", follow_symlinks=False)
    shutil.copy(prefix / "bin" / version, local / "bin" / version)
    for name in ("python3", "python"):
        (local / "bin" / name).symlink_to(version)
    subprocess.run(["chroot", tree, "ldconfig"], check=True)
    terminal.note(f"(Python {sys.version.split()[0]} is put into its /usr/local)")
    container = buildah.quiet("from scratch")
    buildah.quiet(f"add {container} {tree} /")
    buildah.quiet(f"commit --rm {container} {PYTHON_IMAGE}")
    shutil.rmtree(tree)


if __name__ == "__main__":
    main()
