"""Where a model is, and whether it is whole: a directory, a GGUF file, a hub id, or the embedded one."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from serve.errors import ConfigError
from serve.files import write_whole
from serve.models.gguf.names import MAGIC, SUFFIX, model_name

log = logging.getLogger("loradock")

EMBEDDED = "smollm2"
EMBEDDED_ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB = "hf://"
MANIFEST = "manifest.json"
_WEIGHTS_AND_WORDS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def find(model: str, cache_dir: Path, *, keeps_gguf: bool = False) -> str:
    """The model's directory or hub id, as vLLM takes it. keeps_gguf: a GGUF file's weights stay as they are."""
    if model == EMBEDDED:
        from serve.models.embedded import ensure

        return str(ensure(EMBEDDED, cache_dir, lambda line: print(line, file=sys.stderr, flush=True)))
    if (file := gguf_file(model)) is not None:
        return str(_made(file, cache_dir, keeps_gguf))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise ConfigError(
                f"{model} is a LoRA adapter, not a model: serve its base model, "
                f"then `loradock adapters push NAME {model}`"
            )
        if not (folder / "config.json").exists():
            files = sorted(file.name for file in folder.glob(f"*{SUFFIX}"))
            hint = f"; serve one of its files: {', '.join(files[:3])}" if files else ""
            raise ConfigError(f"{model} is no model: a Hugging Face checkpoint directory holds a config.json{hint}")
        return str(folder.resolve())
    if folder.exists() or model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model):
        raise ConfigError(
            f"there is no model at {model}: MODEL is a checkpoint directory, a GGUF file, a hub id like org/name, "
            f"{HUB}org/name:Q4_K_M, or {EMBEDDED}"
        )
    return model


def gguf_file(model: str) -> Path | None:
    """The GGUF file that a model names, fetched if need be; None where it names something else."""
    if model.startswith(HUB):
        return _fetched(model)
    file = Path(model).expanduser()
    with suppress(OSError):  # Ollama's files have no ending, and others' have one in capitals
        if file.is_file() and (file.suffix == SUFFIX or _begins(file, MAGIC)):
            return file
    return None


def _begins(file: Path, letters: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(letters)) == letters


def default_name(model: str) -> str:
    """What a model is called where nobody names it: the last part of its path or hub id."""
    if model.startswith(HUB):
        return model.removeprefix(HUB).partition(":")[0].rpartition("/")[2]
    return model_name(model.rstrip("/"))


def _made(path: Path, cache_dir: Path, kept: bool) -> Path:
    from serve.models.gguf.checkpoint import Form, ensure

    form = Form.KEPT if kept else Form.BFLOAT16
    return ensure(path, cache_dir, lambda line: print(line, file=sys.stderr, flush=True), form)


def _fetched(model: str) -> Path:
    from serve.models.gguf.hub import fetch

    return fetch(model, lambda line: print(line, file=sys.stderr, flush=True))


def is_another_model(stated: str, model: str, name: str) -> bool:
    """Whether a hub id, as an adapter states its base, is none of the names by which `model` may be known.

    A folder on somebody's disk says nothing; organizations differ for copies of one model, so they do not count.
    """
    return bool(HUB_ID.fullmatch(stated)) and _bare(stated) not in {_bare(known) for known in _names(model, name)}


def _names(model: str, name: str) -> Iterator[str]:
    yield from (model, name)
    if Path(model).name.startswith(f"{EMBEDDED}-"):
        yield EMBEDDED_ORIGINAL
    with suppress(OSError, ValueError, KeyError, TypeError):
        yield from (str(known) for known in json.loads((Path(model) / "gguf.json").read_text())["names"])
    for file, keys in (("config.json", ("_name_or_path",)), (MANIFEST, ("parent", "name"))):
        try:
            value: Any = json.loads((Path(model) / file).read_text())
            for key in keys:
                value = value[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(value, str):
            yield value


def _bare(name: str) -> str:
    """The last part of a path or hub id, without case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].lower())


def verify(model: str) -> None:
    """ConfigError, if the checkpoint's own manifest says that it is not what lies there."""
    for _, why in _differences(Path(model)):
        raise ConfigError(why)


def verify_weights(model: str, cache: Path) -> None:
    """The same of its weights; of what somebody may have changed on purpose a warning.

    Below `cache` is kept what was found right: its bytes are read again only when one of its files is another.
    """
    folder = Path(model)
    if not (folder / MANIFEST).is_file():
        return
    known, state = cache / "verified" / _hashed(str(folder.resolve())), _state(folder)
    with suppress(OSError):
        if known.read_text() == state:
            return
    right = True
    for name, why in _differences(folder):
        right = False
        if name.endswith(".safetensors"):
            raise ConfigError(why)
        log.warning(why)
    if right:
        with suppress(OSError):  # a cache that cannot be written
            known.parent.mkdir(parents=True, exist_ok=True)
            write_whole(known, state.encode())


def _state(folder: Path) -> str:
    """Of its files, without reading them."""
    seen = ((file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file())
    return _hashed("\n".join(f"{name} {at.st_size} {at.st_mtime_ns} {at.st_ctime_ns} {at.st_ino}" for name, at in seen))


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _differences(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, in what it is not what the manifest says), one after the other."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        yield MANIFEST, f"the {MANIFEST} of {folder} cannot be read ({error}): export the model again"
        return
    for name, wanted in _files(manifest):
        file = folder / name
        if not file.is_file():
            yield name, f"{folder} lacks {name}, which its {MANIFEST} names: copy or export it again"
            continue
        size, digest = wanted.get("bytes", wanted.get("size")), wanted.get("sha256")
        if size is not None and file.stat().st_size != size:
            yield name, f"{name} in {folder} has {file.stat().st_size} bytes and {MANIFEST} says {size}"
        elif digest is not None and _sha256(file) != digest:
            yield name, f"{name} in {folder} is not the file that its {MANIFEST} names: copy or export it again"


def folder_of(model: str) -> Path:
    """Where a model's files are on this machine: a hub id has been fetched by whoever serves it."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception as error:  # of that library's many kinds
        raise ConfigError(f"the files of {model} are not on this machine: serve it from a directory") from error


def digest_of(model: str) -> str:
    """A digest of the bytes of everything in a model's folder that decides what it says."""
    folder = folder_of(model)
    with suppress(OSError, ValueError, KeyError, TypeError):  # of a GGUF file, in whatever form it is served
        return str(json.loads((folder / "gguf.json").read_text())["sha256"])
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS_AND_WORDS and path.is_file())
    known = tuple((name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in names)
    return _digested(str(folder), known)


@lru_cache(maxsize=16)
def _digested(folder: str, files: tuple[tuple[str, int, int], ...]) -> str:
    """Read again only when a file's size or time is another."""
    lines = (f"{name} {_sha256(Path(folder) / name)}\n" for name, _, _ in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(manifest: Any) -> list[tuple[str, dict[str, Any]]]:
    """What a manifest's `files` says of each file, in either of the forms {name: {...}} and {name: sha256}."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        return []
    return [(name, entry if isinstance(entry, dict) else {"sha256": entry}) for name, entry in files.items()]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def takes_media(model: str) -> bool:
    """Whether images, sound or video may come with a request to this checkpoint, as its config.json says."""
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return True  # what cannot be read is not refused for it
    return any(name.startswith(("vision", "audio", "image", "video", "mm_")) for name in config)
