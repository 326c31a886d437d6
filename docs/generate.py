"""Writes the parts of the site that are read from the code: command line, HTTP API, settings, packages.

`make docs` calls this. Nothing that it writes is committed, so nothing can be out of date.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

import typer

from serve import config
from serve.api.openapi import DocumentedApi
from serve.api.routes import routers
from serve.cli.main import app as command_line
from serve.config.groups import GROUPS, group_of
from serve.models.dimensions import KNOWN
from serve.models.gpu_plan import CARDS, plan, smallest

ROOT = Path(__file__).parent.parent
VLLM_DOCS = "https://docs.vllm.ai/en/stable/configuration/engine_args/"


def write(folder: Path) -> None:
    """Every generated part as a file of `folder`."""
    folder.mkdir(exist_ok=True)
    parts = {
        "cli": cli,
        "http-api": http_api,
        "settings": settings,
        "vllm-options": vllm_options,
        "packages": packages,
        "modules": modules,
        "hardware": hardware,
    }
    for name, made in parts.items():
        (folder / f"{name}.md").write_text(made())


# ---- command line


def cli() -> str:
    """A heading and the help text of every command."""
    lines: list[str] = []
    for words, command in commands():
        if words == ["loradock", "serve"]:
            text = _help(words, command).partition("\n  Most used:")[0] + "\n\n  Settings: see the page Configuration."
        elif words[:2] == ["loradock", "optimize"]:
            text = optimize_help(words[2:])
        else:
            text = _help(words, command)
        lines += [f"## {' '.join(words)}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


def commands() -> Iterator[tuple[list[str], Any]]:
    """Each command that does something, as its words, with typer's object of it."""

    def below(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
        children = getattr(command, "commands", {})
        # `bench` is a command and a group.
        if not children or getattr(command, "invoke_without_command", False):
            yield words, command
        for name, child in children.items():
            yield from below([*words, name], child)

    yield from below(["loradock"], typer.main.get_command(command_line))
    for name in ("verify", "validate", "check", "tune", "run-onnx", "setup-optimum"):
        yield ["loradock", "optimize", name], None


def _help(words: list[str], command: Any) -> str:
    with _printed() as printed, contextlib.suppress(SystemExit):
        command.main(args=["--help"], prog_name=" ".join(words))
    return printed.getvalue()


def optimize_help(words: list[str]) -> str:
    from optimize.cli import run

    with _printed() as printed:
        run([*words, "--help"], Path)
    return printed.getvalue()


@contextlib.contextmanager
def _printed() -> Iterator[io.StringIO]:
    """What is printed, by typer as plain text without boxes and colours."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        mock.patch("typer.core.HAS_RICH", False),
        mock.patch.dict(os.environ, COLUMNS="100"),
    ):
        yield printed


# ---- HTTP

SECTIONS = {
    "Adapters": "/v1/adapters /v1/loops /v1/overview",
    "Drift and feedback": "/v1/drift /v1/feedback /v1/golden",
    "Keys and usage": "/v1/keys /v1/usage",
    "vLLM's runtime LoRA API": "/v1/load_lora /v1/unload_lora /adapters /server_info /pause /resume",
    "Models, engines, replicas": "/v1/models /v1/engines /v1/replicas",
    "The server": "/",
}


def http_api() -> str:
    """Every route of our own, from the OpenAPI document that the server gives at /openapi.json."""
    app = DocumentedApi()
    for router in routers():
        app.include_router(router)
    document = app.openapi()
    left = [(path, method.upper(), said) for path, ways in document["paths"].items() for method, said in ways.items()]
    lines: list[str] = []
    for title, prefixes in SECTIONS.items():
        here = [row for row in left if row[0].startswith(tuple(prefixes.split()))]
        left = [row for row in left if row not in here]
        lines += [f"## {title}", ""]
        for path, method, said in here:
            lines += _route(path, method, said, document)
    return "\n".join(lines)


def _route(path: str, method: str, said: dict[str, Any], document: dict[str, Any]) -> list[str]:
    lines = [f"### {method} {path}", ""]
    scope = next((scopes[0] for needed in said["security"] for scopes in needed.values()), "")
    if text := said.get("description"):
        lines += [text, ""]
    lines += [f"Scope: {f'`{scope}`' if scope else 'none, no key is needed'}.", ""]
    rows = [
        (f"`{given['name']}` (query)", _kind(given["schema"]), _default(given["schema"], given["required"]))
        for given in said.get("parameters", [])
        if given["in"] == "query"
    ]
    for content in said.get("requestBody", {}).get("content", {}).values():
        body = resolved(content["schema"], document)
        required = body.get("required", [])
        known = {row[0] for row in rows}
        for name, schema in body.get("properties", {}).items():
            target = resolved(schema, document)
            if f"`{name}`" not in known:  # a push is a form, or nearly the same as JSON
                rows.append((f"`{name}`", _kind(target), _default(schema, name in required)))
    if rows:
        lines += _table(("Field", "Type", "Default"), rows)
    return lines


def resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """What a schema says where it refers to another, or to another or null."""
    for option in [schema, *schema.get("anyOf", [])]:
        if "$ref" in option:
            named: dict[str, Any] = document["components"]["schemas"][option["$ref"].rpartition("/")[2]]
            return named
    return schema


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(option) for option in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "object"))


def _default(schema: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if default in (None, "", {}) else f"`{default}`"


# ---- settings


def settings() -> str:
    """Every setting of ours: name, type, default, meaning."""
    lines = []
    for title in GROUPS:
        rows = [
            (f"`{setting.name}`", setting.type, _setting_default(setting.default), setting.help)
            for setting in config.settings()
            if group_of(setting.name) == title
        ]
        lines += [f"### {title}", "", *_table(("Setting", "Type", "Default", "Meaning"), rows)]
    return "\n".join(lines)


def _setting_default(default: Any) -> str:
    if isinstance(default, Path):
        return f"`{default}`".replace(str(Path.home()), "~")
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if default in ("", ()):
        return ""
    return "see below" if isinstance(default, tuple) else f"`{default}`"


def vllm_options() -> str:
    """Every option of vLLM's engine and OpenAI server that is a setting here, with vLLM's own default."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    known = {item.name: item for args in (AsyncEngineArgs, FrontendArgs) for item in dataclasses.fields(args)}
    ours = {*config.REFUSED, *config.SETTINGS}
    rows = [
        (f"`{name}`", _vllm_type(known[name].type), _vllm_default(known[name]))
        for name in sorted(config.engine_options())
        if name not in ours
    ]
    refused = [(f"`{name}`", why) for name, why in sorted(config.REFUSED.items())]
    return "\n".join(
        [
            f"What each does is on [vLLM's page]({VLLM_DOCS}).",
            "",
            *_table(("Option", "Type", "Default"), rows),
            "These options of vLLM are not taken:",
            "",
            *_table(("Option", "Instead"), refused),
        ]
    )


def _vllm_type(annotation: Any) -> str:
    """The values that an option takes, or its type."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_vllm_type(option) for option in get_args(annotation) if option is not NoneType)
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "").rpartition("collections.abc.")[2]


def _vllm_default(item: dataclasses.Field[Any]) -> str:
    made = item.default_factory is not dataclasses.MISSING
    default = item.default_factory() if made else item.default  # type: ignore[misc]
    if default is None or default is dataclasses.MISSING or default == "" or dataclasses.is_dataclass(default):
        return ""
    value = getattr(default, "value", default)  # an enum's
    return f"`{value}`" if isinstance(value, str | int | float | list | dict | set) and value not in ([], {}) else ""


# ---- sizes and hardware

PLANNED = ("Llama-3.1-8B-Instruct", "Qwen3-14B", "Qwen3-32B", "Mixtral-8x7B-Instruct-v0.1", "Llama-3.3-70B-Instruct")
PLANNED_CARDS = ("l4", "a10", "a100-40", "a100-80", "h100", "h200")


def hardware() -> str:
    """What `loradock plan --gpu` says of models on cards: the fewest that hold each, its slots, context and streams."""
    lines: list[str] = []
    for model in PLANNED:
        sizes, rows = KNOWN[model], []
        for name in PLANNED_CARDS:
            many = smallest(model, sizes, CARDS[name], rank=16)
            if many is None:
                rows.append((CARDS[name].name, "more than 8", "", "", "", ""))
                continue
            made = plan(model, sizes, CARDS[name], many, rank=16)
            longest = f"{made.max_model_len or made.context:,}"
            weights, tokens = f"{made.weights / 2**30:.1f} GiB", f"{made.tokens:,}"
            rows.append(
                (f"{many} x {made.card.name}", weights, str(made.max_loras), tokens, str(made.streams), longest)
            )
        head = ("Fewest GPUs", "Weights on each", "Slots", "Tokens of context", "Streams of 8,192", "Longest request")
        lines += [f"## {model}", "", *_table(head, rows)]
    return "\n".join(lines)


# ---- packages


def packages() -> str:
    """The layers of both packages, the highest first, as import-linter holds them; what lives in each."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    lines: list[str] = []
    for contract in contracts:
        if contract["type"] != "layers":
            continue
        (root,) = contract["containers"]
        rows = [
            (
                str(depth),
                f"`{root}/{name}{'/' if (ROOT / root / name).is_dir() else '.py'}`",
                _lives(ROOT / root / name),
            )
            for depth, layer in enumerate(contract["layers"], 1)
            for name in map(str.strip, layer.split("|"))
        ]
        lines += [f"### {root}", "", *_table(("Layer", "Package", "What lives there"), rows)]
    return "\n".join(lines)


def modules() -> str:
    """Every module and the first sentence of its docstring, package by package."""
    lines: list[str] = []
    for file in sorted([*ROOT.glob("serve/**/__init__.py"), *ROOT.glob("optimize/**/__init__.py")]):
        rows = [
            (f"`{module.relative_to(ROOT)}`", _docstring(module).partition("\n\n")[0])
            for module in sorted(file.parent.glob("*.py"))
            if module.name not in ("__init__.py", "__main__.py")
        ]
        if rows:
            lines += [f"### {file.parent.relative_to(ROOT)}/", "", *_table(("Module", "What it holds"), rows)]
    return "\n".join(lines)


def _lives(package: Path) -> str:
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    said = _docstring(file)
    if not package.is_dir():
        said = said.partition("\n\n")[0]
    return " ".join(said.split())


def _docstring(module: Path) -> str:
    return ast.get_docstring(ast.parse(module.read_text())) or ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        spaced = (" ".join(cell.replace("|", "\\|").split()) for cell in cells)
        return f"| {' | '.join(spaced)} |"

    return [line(head), f"|{'---|' * len(head)}", *map(line, rows), ""]


if __name__ == "__main__":
    write(Path(__file__).parent / "generated")
