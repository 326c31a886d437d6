"""Kubernetes' own schemas, and those of the custom resources that we write, for what a cluster would refuse.

`tests/docker/kubernetes-schemas.json` holds them without their descriptions; its `sources` say where from. Unknown
fields are errors, as with `kubectl apply --validate=strict`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

SCHEMAS = Path(__file__).parents[1] / "docker/kubernetes-schemas.json"

Manifest = dict[str, Any]


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with an object, if anything."""
    kind = f"{manifest.get('apiVersion')}/{manifest.get('kind')}"
    where = f"{kind} {manifest.get('metadata', {}).get('name')}"
    if kind not in _schemas()["kinds"]:
        return [f"{where}: there is no schema of it here"]
    return [
        f"{where}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in _validator(kind).iter_errors(manifest)
    ]


def manifests(text: str) -> Iterator[Manifest]:
    """The objects of a file; a key that comes twice is an error."""
    yield from (document for document in yaml.load_all(text, _Strict) if document)


@cache
def _schemas() -> dict[str, Any]:
    return json.loads(SCHEMAS.read_text())


@cache
def _validator(kind: str) -> Draft7Validator:
    return Draft7Validator({**_schemas()["kinds"][kind], "definitions": _schemas()["definitions"]})


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(keys) != len(set(map(str, keys))):
            raise yaml.YAMLError(f"a key comes twice: {sorted(map(str, keys))} {node.start_mark}")
        return super().construct_mapping(node, deep)
