"""Where an adapter comes from, as it says itself: who trained it, on which base, on which data.

    manifest.json          {"provenance": {...}}, as `loradock adapters pull` writes it
    README.md              the front matter of a model card
    adapter_config.json    base_model_name_or_path, revision

For each field the first that says something holds. All of it is what somebody stated, and nothing here checks it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from serve.adapters.adapter import CARD, MANIFEST, NOTES, Inspection
from serve.adapters.sources.address import Source
from serve.adapters.untrusted import open_plain
from serve.errors import AdapterRejected
from serve.names import shown

# Each field with the names that cards have for it.
TEXTS: dict[str, tuple[str, ...]] = {
    "trained_by": ("trained_by", "author", "developed_by", "model_creator"),
    "trained_at": ("trained_at",),
    "base_model": ("base_model",),
    "base_revision": ("base_revision", "base_model_revision"),
    "base_digest": ("base_digest", "base_model_digest"),
    "data_digest": ("data_digest", "dataset_digest", "datasets_digest"),
    "license": ("license",),
    "origin": ("origin",),
}
KEPT, FETCHED = "provenance", ("source", "source_version")
DATASETS = ("datasets", "dataset")
MAX_TEXT, MAX_DATASETS = 256, 16

_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---", re.S)
_LICENSE = re.compile(r"^license:[ \t]*([\"']?)([A-Za-z0-9._+-]{1,64})\1[ \t]*(#.*)?\r?$", re.M)


def read_provenance(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the notes beside an adapter and its configuration say, each field that they have."""
    manifest = _manifest(folder / MANIFEST)
    card = _card(front_matter(folder / CARD))
    stated = {"base_model": config.get("base_model_name_or_path"), "base_revision": config.get("revision")}
    provenance: dict[str, Any] = {}
    for source in (manifest, card, stated):
        for field, value in _fields(source):
            provenance.setdefault(field, value)
    return provenance


def fetched_from(source: Source) -> dict[str, str]:
    """Where this server fetched an adapter: the part of its provenance that it knows by itself."""
    came = {"source": shown(source.address, MAX_TEXT), "source_version": source.version}
    return {field: text for field, text in came.items() if text}


def kept(inspection: Inspection) -> dict[str, Any]:
    """What was stated, as it is kept among a version's checks."""
    stated = {
        "license": inspection.license,
        KEPT: dict(inspection.provenance),
        "saved_modules": list(inspection.saved_modules),
        "labels": list(inspection.labels),
        "added_tokens": list(inspection.added_tokens),
    }
    return {name: value for name, value in stated.items() if value}


def provenance_of(checks: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a version, as it is kept among its checks."""
    return {**checks.get(KEPT, {}), **{field: checks[field] for field in FETCHED if field in checks}}


def measured(checks: Mapping[str, Any]) -> dict[str, Any]:
    """The checks without the provenance."""
    return {name: value for name, value in checks.items() if name not in (KEPT, *FETCHED)}


def read_license(front: str) -> str | None:
    """`license:` of a card's front matter, if there is one: Hugging Face's identifier, in lower case."""
    license = _LICENSE.search(front)
    return license[2].lower() if license else None


def front_matter(card: Path) -> str:
    """The YAML at the top of a README.md, as text; empty without one."""
    front = _FRONT.match(_text(card))
    return front[1] if front else ""


def _manifest(path: Path) -> Mapping[str, Any]:
    """A file of that name may also be another program's."""
    try:
        stated = json.loads(_text(path) or "{}")["provenance"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _card(front: str) -> Mapping[str, Any]:
    try:
        stated = yaml.load(front, _Plain)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(stated, dict):
        return {}
    own = stated.get("provenance")
    return {**stated, **own} if isinstance(own, dict) else stated


class _Plain(yaml.BaseLoader):
    """Texts, lists and mappings alone; an alias could make a small document a giant."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a card has no aliases")
        return super().compose_node(parent, index)


def _fields(stated: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for field, names in TEXTS.items():
        if text := next((text for name in names if (text := _line(stated.get(name)))), ""):
            yield field, text.lower() if field == "license" else text
    for name in DATASETS:
        value = stated.get(name)
        datasets = [text for item in (value if isinstance(value, list) else [value]) if (text := _line(item))]
        if datasets:
            yield "datasets", datasets[:MAX_DATASETS]
            return


def _line(value: Any) -> str:
    """A text fit to be shown, or nothing; the first of a list."""
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str):
        return ""
    text = value.strip()
    return text if text.isprintable() and len(text) <= MAX_TEXT else ""


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    try:
        with open_plain(path) as file:
            return file.read(NOTES[path.name]).decode("utf-8", "replace")
    except AdapterRejected:
        return ""
