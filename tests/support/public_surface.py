"""What people and programs outside rely on: commands with their options, routes with their parameters and fields,
keys of recipes, settings, and series.

`python -m tests.support.public_surface` writes it beside this file; do that when something is added. What is there and
not in the code any more breaks somebody's script: `tests/test_public_surface.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from docs import generate
from optimize.options import Gate
from optimize.recipe import SECTIONS, Recipe, step_kinds
from serve import config
from serve.api.openapi import DocumentedApi
from serve.api.routes import routers

FILE = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[2]


def surface() -> dict[str, list[str]]:
    """Lines by kind, sorted."""
    kinds = {"commands": _commands(), "routes": _routes(), "recipes": _recipes(), "series": _series()}
    settings = (setting.name for setting in config.settings())
    return {kind: sorted(set(lines)) for kind, lines in {**kinds, "settings": settings}.items()}


def _commands() -> Iterator[str]:
    for words, command in generate.commands():
        name = " ".join(words)
        yield name
        if command is None:
            options = re.findall(r"(?<![\w-])--[a-z][\w-]*", generate.optimize_help(words[2:]))
        else:
            options = [option for given in command.params for option in (*given.opts, *given.secondary_opts)]
        yield from (f"{name} {option}" for option in options)


def _routes() -> Iterator[str]:
    app = DocumentedApi()
    for router in routers():
        app.include_router(router)
    document = app.openapi()
    for path, ways in document["paths"].items():
        for method, said in ways.items():
            name = f"{method.upper()} {path}"
            yield name
            yield from (f"{name} {given['name']}" for given in said.get("parameters", []))
            for content in said.get("requestBody", {}).get("content", {}).values():
                body = generate.resolved(content["schema"], document)
                yield from (f"{name} {field}" for field in body.get("properties", {}))


def _recipes() -> Iterator[str]:
    parts = {"": Recipe, "gate": Gate, **SECTIONS, **{name: kind.options for name, kind in step_kinds().items()}}
    for name, part in parts.items():
        yield from (f"{name}.{field.name}".strip(".") for field in msgspec.structs.fields(part))


def _series() -> Iterator[str]:
    for path in (ROOT / "serve").rglob("*.py"):
        yield from re.findall(r'"(loradock_[a-z0-9_]*[a-z0-9])"', path.read_text())


if __name__ == "__main__":
    FILE.write_text(json.dumps(surface(), indent=1) + "\n")
