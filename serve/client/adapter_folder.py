"""A version of an adapter as a folder, whole or not at all: what `loradock adapters pull` writes.

adapter_config.json, adapter_model.safetensors     as they were pushed, held against their digest
manifest.json                                      which version that is, and where it comes from
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from serve.client.adapter_client import MANIFEST, PEFT_FILES, AdapterClient
from serve.client.api_client import Refused
from serve.errors import ConfigError, NotFound
from serve.files import digest, fsync_tree, rename


def pull(client: AdapterClient, target: str, folder: Path) -> dict[str, Any]:
    """Write NAME (its live version), NAME@v2, NAME@ALIAS or NAME@DIGEST12 to `folder`, which must be new or empty."""
    check_new(folder)
    with pulled(client, target, folder.absolute().parent) as (staged, version):
        fsync_tree(staged)
        try:
            rename(staged, folder.absolute())
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error}") from error
    return {"object": "adapter.folder", **version, "folder": str(folder), "files": [*PEFT_FILES, MANIFEST]}


@contextmanager
def pulled(client: AdapterClient, target: str, beside: Path | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder of the version that is gone when the block ends, and what the server says of it."""
    name, at, wanted = target.partition("@")
    version = _chosen(client.show(name), wanted if at else None, target)
    try:
        staged = Path(tempfile.mkdtemp(dir=beside, prefix=".pull-"))
    except OSError as error:
        raise ConfigError(f"{beside} cannot be written: {error}") from error
    try:
        for file in PEFT_FILES:
            client.download(name, version["version"], file, staged / file)
        with ExitStack() as opened:
            came = digest([(file, opened.enter_context((staged / file).open("rb"))) for file in sorted(PEFT_FILES)])
        if came != version["digest"]:
            raise Refused(f"what came of {target} is not {version['digest'][:12]}: something on the way changes bytes")
        said = {field: version[field] for field in ("name", "tenant", "version", "digest", "base", "rank")}
        said["provenance"] = provenance(version)
        (staged / MANIFEST).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n")
        staged.chmod(0o755)
        yield staged, said
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_new(folder: Path) -> None:
    """ConfigError, if something is there that would be overwritten."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f"{folder} is there already: pull into a new folder, or remove it first")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"{folder.absolute().parent} is no folder: make it first")


def provenance(version: Mapping[str, Any]) -> dict[str, Any]:
    """What goes with a version to the next server: where this one fetched it is there where it came from."""
    stated = dict(version.get("provenance") or {})
    source, read = stated.pop("source", ""), stated.pop("source_version", "")
    if source and "origin" not in stated:
        stated["origin"] = f"{source} ({read})" if read else source
    if version.get("base") and "base_model" not in stated:
        stated["base_model"] = version["base"]
    return stated


def _chosen(answer: Mapping[str, Any], wanted: str | None, target: str) -> dict[str, Any]:
    versions: list[dict[str, Any]] = answer.get("versions") or []
    if wanted is None:
        number = answer.get("live")
        if number is None:
            raise NotFound(f"no version of {target} is live: say which one, as {target}@v1")
    else:
        number = answer.get("aliases", {}).get(wanted)
        digits = wanted.removeprefix("v")
        if number is None and digits.isdecimal() and len(digits) < 10:
            number = int(digits)
    for version in versions:
        if version["version"] == number or (
            number is None and len(wanted or "") == 12 and version["digest"][:12] == wanted
        ):
            return version
    raise NotFound(f"{target} does not exist: `loradock adapters show {answer.get('name')}` lists what does")
