"""Where baselines lie on the disk, one folder a version, and the zip in which they travel between servers."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from serve.adapters.byte_ledger import size_of
from serve.drift.baseline import MAX_BYTES, Baseline, Provenance, Tolerance
from serve.errors import ConfigError
from serve.files import write_whole
from serve.names import tenant_of

log = logging.getLogger(__name__)

_BASELINE_FILE = re.compile(r"baseline\.json|baseline-[0-9a-f]{64}\.npz")


class BaselineFiles:
    """One folder for all baselines. `id` is the version as the engine knows it, "" for the base model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # By adapter and the version's folder.
        self._sizes: dict[tuple[str, str], int] = {}

    def count(self) -> None:
        """See how many bytes there are."""
        for folder in self._folder.glob("*/*"):
            name = folder.parent.name
            adapter = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode(errors="replace")
            self._sizes[adapter, folder.name] = size_of(folder)

    def kept(self, tenant: str | None) -> dict[str, int]:
        """Bytes by tenant, of this one or of all; from any thread."""
        kept = Counter[str]()
        for (adapter, _), nbytes in list(self._sizes.items()):
            if (owner := tenant_of(adapter)) == tenant or tenant is None:
                kept[owner] += nbytes
        return kept

    def has(self, adapter: str, id: str) -> bool:
        """Whether anything is kept of the version."""
        return (self._version_folder(adapter, id) / "baseline.json").exists()

    def load(self, provenance: Provenance, id: str, tolerance: Tolerance) -> Baseline | None:
        """The version's baseline; None if there is none, or none that fits."""
        folder = self._version_folder(provenance.adapter, id)
        if not (folder / "baseline.json").exists():
            return None
        try:
            return Baseline.load(folder, provenance, tolerance=tolerance)
        except ConfigError as error:
            log.warning("%s begins a new baseline: %s", id or provenance.adapter, error.message)
            return None

    def save(self, baseline: Baseline, id: str) -> None:
        """Write a version's baseline; a full disk is logged."""
        adapter = baseline.provenance.adapter
        try:
            folder = self._version_folder(adapter, id)
            baseline.save(folder)
            self._sizes[adapter, folder.name] = size_of(folder)
        except OSError as error:
            log.error("the baseline of %s was not written: %s", id or adapter, error.strerror)

    def save_notes(self, adapter: str, id: str, name: str, notes: Mapping[str, Any] | None) -> None:
        """Write a JSON file beside a version's baseline, or delete it; a full disk is logged."""
        file = self._version_folder(adapter, id) / name
        try:
            if notes is None:
                file.unlink(missing_ok=True)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, json.dumps(notes).encode())
        except OSError as error:
            log.error("%s of %s was not written: %s", name, id or adapter, error.strerror)

    def notes(self, adapter: str, id: str, name: str) -> dict[str, Any] | None:
        """Such a file; None if there is none that can be read."""
        return _notes(self._version_folder(adapter, id) / name)

    def every(self, name: str) -> list[dict[str, Any]]:
        """The files of this name of all versions."""
        notes = [_notes(file) for file in sorted(self._folder.glob(f"*/*/{name}"))]
        return [each for each in notes if each is not None]

    def remove(self, adapter: str, id: str) -> None:
        """Delete what is kept of a version."""
        folder = self._version_folder(adapter, id)
        shutil.rmtree(folder, ignore_errors=True)
        self._sizes.pop((adapter, folder.name), None)
        with suppress(OSError):  # other versions of the adapter are still there
            folder.parent.rmdir()

    def _version_folder(self, adapter: str, id: str) -> Path:
        # An adapter's name may hold a slash, and a base may be called anything: neither becomes a path as it is.
        name = base64.urlsafe_b64encode(adapter.encode()).decode().rstrip("=")
        return self._folder / name / version_of(id)


def _notes(file: Path) -> dict[str, Any] | None:
    try:
        notes = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read: %s", file, error)
        return None
    return notes if isinstance(notes, dict) else None


def version_of(id: str) -> str:
    """What a baseline calls its version: the digest in its engine id, or `base`."""
    return id.partition("@")[2] or "base"


def to_zip(baseline: Baseline) -> bytes:
    """A baseline as a zip of its two files, for another server over the same model."""
    with TemporaryDirectory() as folder:
        baseline.save(Path(folder))
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(Path(folder).iterdir()):
                archive.write(file, file.name)
        return out.getvalue()


def from_zip(data: bytes, provenance: Provenance, tolerance: Tolerance) -> Baseline:
    """The baseline in such a zip; ConfigError when it is damaged or belongs to another version."""
    with TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = [member for member in archive.infolist() if _BASELINE_FILE.fullmatch(member.filename)]
                if sum(member.file_size for member in members) > MAX_BYTES or len(members) != 2:
                    raise ConfigError("this is no baseline: `loradock baseline save` writes a zip of two files")
                for member in members:
                    (Path(folder) / member.filename).write_bytes(archive.read(member))
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as damaged:
            raise ConfigError(f"the baseline is not a zip file that can be read: {damaged}") from damaged
        return Baseline.load(Path(folder), provenance, tolerance=tolerance)
