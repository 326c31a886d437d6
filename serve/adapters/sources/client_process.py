"""Sources that only their own client can read, which runs in a process of its own: MLflow and Weights & Biases.

So a client that is slow, large or wrong costs this server nothing: the process is ended when its bytes or seconds are
over. The programs import nothing of loradock; they say on a line what they are about to read, and wait for a go.

    {"path", "folder", "names", "max_bytes"}  >  {"place", "version"}  >  go  >  {"done"}      or {"error", "text"}
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve.adapters.adapter import CARD, CONFIG, FILES, MANIFEST
from serve.adapters.child_program import running
from serve.adapters.sources.address import Source
from serve.adapters.sources.transfer import Transfer, absent, forbidden, not_installed, unreachable
from serve.errors import AdapterRejected, BadRequest, LoradockError
from serve.names import shown

# By scheme: the program beside this module, and the package that it needs.
PROGRAMS = {"mlflow": ("mlflow_download.py", "mlflow-skinny"), "wandb-artifact": ("wandb_download.py", "wandb")}
# Where the clients are installed.
PYTHON = sys.executable
# What a tracking server may name as the place of its files, beside itself.
STORES = ("s3",)

_LOOK_SECONDS = 0.2
_LINE_BYTES = 64 << 10


def bring(source: Source, files: Transfer) -> Source:
    """The adapter's files into the folder; or, as a `file` source, the folder of this machine where they are."""
    package = PROGRAMS[source.scheme][1]
    program = Path(__file__).parent / PROGRAMS[source.scheme][0]
    with running(program, PYTHON, stderr=subprocess.DEVNULL, cwd=files.folder) as process:
        client = _Client(process, source, package, files)
        client.say({"path": source.path, "folder": str(files.folder), "max_bytes": files.max_bytes})
        found = client.answer()
        version = str(found.get("version", ""))
        if place := _on_this_machine(str(found.get("place", ""))):
            return replace(source, scheme="file", path=place, version=version)
        _judge(found, source)
        client.say({"names": [*FILES, CARD, MANIFEST]})
        client.answer()
    if not (files.folder / CONFIG).is_file():
        raise absent(source.shown)
    return replace(source, version=version)


class _Client:
    """What the process says, and is told."""

    def __init__(self, process: subprocess.Popen[bytes], source: Source, package: str, files: Transfer) -> None:
        self._process = process
        self._source = source
        self._package = package
        self._files = files

    def say(self, line: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last line says why, or that there is none

    def answer(self) -> dict[str, Any]:
        """What it says next; its bytes are counted meanwhile."""
        assert self._process.stdout
        while not select.select([self._process.stdout], [], [], _LOOK_SECONDS)[0]:
            self._check()
        line = self._process.stdout.readline(_LINE_BYTES)
        self._check()
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise unreachable(self._source.shown, "its client ended without a word")
        if "error" in said:
            raise self._error(said["error"], str(said.get("text", "")))
        return said

    def _check(self) -> None:
        nbytes = _nbytes(self._files.folder)
        self._files.check(nbytes)
        if self._files.room is not None:
            self._files.room.measure(nbytes)

    def _error(self, kind: str, text: str) -> LoradockError:
        place = self._source.shown
        if kind == "missing package":
            # The client itself, or what it needs for this place.
            return not_installed(self._source, self._package if text in self._package or not text else shown(text))
        if kind == "absent":
            return absent(place)
        if kind == "forbidden":
            return forbidden(place)
        if kind == "large":
            return self._files.too_large()
        if kind == "refused":
            return AdapterRejected(f"{place} {shown(text, 300)}")
        return unreachable(place, shown(text, 300))


def _nbytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue  # it was renamed or removed meanwhile
    return total


def _on_this_machine(place: str) -> str | None:
    """The folder that a place without a host is."""
    parts = urlsplit(place)
    return parts.path if parts.scheme in ("", "file") and not parts.netloc and parts.path.startswith("/") else None


def _judge(found: dict[str, Any], source: Source) -> None:
    """Whoever may write to a tracking server says where its files are: it may not lead this server elsewhere."""
    place, own = urlsplit(str(found.get("place", ""))), str(found.get("host", ""))
    if place.scheme in STORES or (place.scheme == "mlflow-artifacts" and not place.netloc):
        return
    # To the letter, since clients disagree about the host of `https://a\\@b`; and they send it this server's key.
    if place.scheme in ("mlflow-artifacts", "https") and place.netloc == own:
        return
    where = shown(f"{place.scheme}://{place.netloc.rpartition('@')[2]}", 100)
    raise BadRequest(
        f"{source.shown} lies at {where}, where this server does not read: it takes files of the tracking server "
        "itself and s3://; push the files instead",
        param="source",
    )
