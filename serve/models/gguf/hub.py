"""GGUF files from a hub: `hf://org/name:Q4_K_M` names the repository and the quantization, or a file of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from serve.errors import ConfigError

PATTERN = re.compile(r"hf://([\w.-]+/[\w.-]+)(?::([\w./-]+))?")
USUAL = "Q4_K_M"
FIRST = re.compile(r"-00001-of-(\d{5})\.gguf$")


def fetch(model: str, progress: Callable[[str], None]) -> Path:
    """The file in the hub's cache, its first part if it has several. ConfigError: there is none, or no network."""
    found = PATTERN.fullmatch(model)
    if found is None:
        raise ConfigError(f"{model} names no GGUF file of a hub: write hf://org/name:{USUAL}")
    repository, wanted = found[1], found[2] or USUAL
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        files = chosen(HfApi().list_repo_files(repository), repository, wanted)
        progress(f"{repository}: {', '.join(files)}, fetched unless they are in the hub's cache")
        first, *_ = [Path(hf_hub_download(repository, name)) for name in files]
        return first
    except ConfigError:
        raise
    except Exception as error:  # of that library's and its HTTP client's many kinds
        with suppress(Exception):  # without the hub, what an earlier start fetched is served
            kept = Path(snapshot_download(repository, local_files_only=True))
            names = [str(file.relative_to(kept)) for file in kept.rglob("*.gguf")]
            files = chosen(names, repository, wanted)
            if all((kept / name).is_file() for name in files):
                progress(f"{repository}: the hub cannot be asked ({type(error).__name__}); {files[0]} is in its cache")
                return kept / files[0]
        raise ConfigError(f"{model} could not be fetched: {type(error).__name__}: {error}") from error


def chosen(names: Sequence[str], repository: str, wanted: str) -> list[str]:
    """The file of this name or quantization, all its parts in order."""
    files = sorted(name for name in names if name.endswith(".gguf") and "mmproj" not in name.lower())
    if wanted in files:
        fitting = [wanted]
    else:
        ending = re.compile(rf"[-._/]{re.escape(wanted)}(-\d{{5}}-of-\d{{5}})?\.gguf$", re.IGNORECASE)
        fitting = [name for name in files if ending.search(name)]
    firsts = [name for name in fitting if "-of-" not in name or FIRST.search(name)]
    if len(firsts) != 1:
        what = f"{len(firsts)} files of {wanted}" if firsts else f"no file of {wanted}"
        raise ConfigError(f"{repository} has {what}; it has: {', '.join(files[:12]) or 'no GGUF file at all'}")
    parts = FIRST.search(firsts[0])
    if parts is None:
        return firsts
    count = int(parts[1])
    return [firsts[0].replace(f"-00001-of-{count:05d}", f"-{part:05d}-of-{count:05d}") for part in range(1, count + 1)]
