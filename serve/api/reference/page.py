"""An OpenAPI document as one HTML page: a group of routes after the other, each to be opened. It needs no script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>loradock: HTTP API</title>
<link rel="stylesheet" href="/docs/reference.css">
<link rel="icon" href="/dashboard/icon.svg" type="image/svg+xml">
</head>
<body>
"""
_TAIL = "</main>\n</body>\n</html>\n"


def page(document: dict[str, Any]) -> str:
    """The whole page; everything that comes from the document is escaped."""
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            groups.setdefault(operation["tags"][0], []).append(_operation(path, method, operation, document))
    links = " ".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in groups)
    info = document["info"]
    parts = [
        _HEAD,
        f"<header><h1>loradock {escape(info['version'])}: HTTP API</h1><nav>{links} "
        '<a href="/openapi.json">openapi.json</a> <a href="/dashboard">dashboard</a></nav></header>\n<main>\n',
        *(f"<p>{_text(paragraph)}</p>\n" for paragraph in info["description"].split("\n\n")),
    ]
    for name, operations in groups.items():
        parts += [f'<section id="{_anchor(name)}"><h2>{escape(name.capitalize())}</h2>\n', *operations, "</section>\n"]
    return "".join([*parts, _TAIL])


def _operation(path: str, method: str, operation: dict[str, Any], document: dict[str, Any]) -> str:
    scope = next((scopes[0] for needed in operation["security"] for scopes in needed.values()), None)
    key = f"scope {escape(scope)}" if scope else "no key"
    about = operation.get("description", "")
    summary = about.split("\n\n")[0] if "inference" not in operation["tags"] else operation["summary"]
    rows = [
        (given["name"], f"{_kind(given['schema'])}, {given['in']}", given["required"], given.get("description", ""))
        for given in operation.get("parameters", [])
    ]
    parts = [
        f'<details id="{_anchor(f"{method} {path}")}"><summary><b class="{method}">{method.upper()}</b> '
        f'<code>{escape(path)}</code> <span class="key">{key}</span> '
        f'<span class="says">{_text(summary)}</span></summary>\n',
        *(f"<p>{_text(paragraph)}</p>\n" for paragraph in about.split("\n\n") if paragraph and paragraph != summary),
        _table("Parameters", rows),
    ]
    content = operation.get("requestBody", {}).get("content", {})
    for media, body in content.items():
        parts.append(_table(f"Body, {media}", list(_fields(body["schema"], document))))
    parts.append(f"<pre>{escape(_example(path, method, scope, content))}</pre>\n")
    said = [(status, answer["description"]) for status, answer in operation["responses"].items()]
    items = "".join(f"<li><code>{escape(status)}</code> {escape(text)}</li>" for status, text in said)
    return "".join([*parts, f"<ul>{items}</ul>\n</details>\n"])


def _fields(schema: Any, document: dict[str, Any]) -> Iterator[tuple[str, str, bool, str]]:
    """(name, type, required, description) of what an object holds, over references and combinations."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for part in schema.get("allOf", []):
        yield from _fields(part, document)
    seen: set[str] = set()
    for part in schema.get("anyOf", []) + schema.get("oneOf", []):
        for row in _fields(part, document):
            if row[0] not in seen:
                seen.add(row[0])
                yield (row[0], row[1], False, row[3])
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        yield name, _kind(field), name in required, str(field.get("description", ""))


def _kind(schema: dict[str, Any]) -> str:
    """A type in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    for combined in ("anyOf", "oneOf", "allOf"):
        if options := schema.get(combined):
            kinds = list(dict.fromkeys(_kind(option) for option in options))
            return " or ".join(kinds[:4]) + (" or more" if len(kinds) > 4 else "")
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"][:8])
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    return f"list of {_kind(schema.get('items', {}))}" if kind == "array" else str(kind)


def _table(title: str, rows: list[tuple[str, str, bool, str]]) -> str:
    if not rows:
        return ""
    lines = "".join(
        f"<tr><th scope=row><code>{escape(name)}</code>{' <b>required</b>' if required else ''}</th>"
        f"<td>{escape(kind)}</td><td>{_text(about)}</td></tr>\n"
        for name, kind, required, about in rows
    )
    return f"<table><caption>{escape(title)}</caption>\n{lines}</table>\n"


def _example(path: str, method: str, scope: str | None, content: dict[str, Any]) -> str:
    """A curl command to begin with."""
    words = ["curl", *(["-X", method.upper()] if method != "get" else []), f"http://localhost:8000{path}"]
    if scope:
        words += ["-H", "'Authorization: Bearer KEY'"]
    if "multipart/form-data" in content:
        words += ["-F name=NAME", "-F files=@adapter_config.json", "-F files=@adapter_model.safetensors"]
    elif "application/json" in content:
        words += ["-H 'Content-Type: application/json'", "-d '{...}'"]
    elif content:
        words += ["--data-binary @FILE"]
    return " ".join(words)


def _text(text: str) -> str:
    """Plain text with `code` in it."""
    pieces = text.split("`")
    return "".join(f"<code>{escape(piece)}</code>" if at % 2 else escape(piece) for at, piece in enumerate(pieces))


def _anchor(text: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in text.lower()).strip("-")
