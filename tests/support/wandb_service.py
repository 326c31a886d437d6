"""What Weights & Biases' own client asks of the service for an artifact, answered in small: GraphQL, and files by HTTP.

Manifests and digests come from the client itself. What a query asks beside what is known here is null.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from graphql import FieldNode, FragmentDefinitionNode, OperationDefinitionNode, SelectionSetNode, parse
from graphql.utilities import value_from_ast_untyped

from tests.support.http_service import Handler, serving

ENTITY, PROJECT = "team", "project"
JSON = {"Content-Type": "application/json"}
Answer = dict[str, Any]
PROJECT_INFO = {
    "__typename": "Project",
    "id": "p1",
    "internalId": "UHJvamVjdDox",
    "name": PROJECT,
    "entity": {"name": ENTITY},
}


@dataclass
class WandbService:
    """Artifacts by their names with an alias; blobs by their path. `queries` are the operations that were asked."""

    key: str
    artifacts: dict[str, Answer] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    queries: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def log(self, name: str, version: int, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """As `run.log_artifact` does; `files` by their digest in hex."""
        collection = {"__typename": "ArtifactSequence", "id": "c1", "name": name, "project": PROJECT_INFO}
        path = f"manifests/{name}-{version}.json"
        self.blobs[path] = json.dumps(manifest).encode()
        self.blobs |= files
        aliases = [
            {"__typename": "ArtifactAlias", "id": f"a-{alias}", "alias": alias, "artifactCollection": collection}
            for alias in (f"v{version}", "latest")
        ]
        artifact: Answer = {
            "__typename": "Artifact",
            "id": f"artifact-{name}-{version}",
            "artifactSequence": collection,
            "artifactType": {"id": "t1", "name": "model"},
            "versionIndex": version,
            "aliases": aliases,
            "tags": [],
            "state": "COMMITTED",
            "currentManifest": {"id": "m1", "file": {"directUrl": f"{self.url}/{path}"}},
            "commitHash": "c0ffee",
            "fileCount": len(files),
            "size": sum(map(len, files.values())),
            "digest": "d0d0",
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "createdAt": "2026-11-01T00:00:00",
            "updatedAt": "2026-11-01T00:00:00",
        }
        for alias in aliases:
            self.artifacts[f"{name}:{alias['alias']}"] = {
                "__typename": "ArtifactCollectionMembership",
                "id": f"membership-{name}-{version}",
                "versionIndex": version,
                "createdAt": artifact["createdAt"],
                "aliases": aliases,
                "artifactCollection": collection,
                "artifact": artifact,
            }

    def answer(self, query: str, variables: Mapping[str, Any]) -> Answer:
        document = parse(query)
        fragments = {each.name.value: each for each in document.definitions if isinstance(each, FragmentDefinitionNode)}
        (operation,) = (each for each in document.definitions if isinstance(each, OperationDefinitionNode))
        self.queries.append(operation.name.value if operation.name else "")
        root = {"__typename": "Query", "serverInfo": {"features": []}, "viewer": {"id": "u1", "entity": ENTITY}}
        return self._selected(root, operation.selection_set, fragments, variables)

    def _selected(
        self,
        value: Answer,
        selection: SelectionSetNode,
        fragments: Mapping[str, FragmentDefinitionNode],
        variables: Mapping[str, Any],
    ) -> Answer:
        said: Answer = {}
        for node in selection.selections:
            if not isinstance(node, FieldNode):
                inner = getattr(node, "selection_set", None) or fragments[node.name.value].selection_set
                said |= self._selected(value, inner, fragments, variables)
                continue
            arguments = {
                each.name.value: value_from_ast_untyped(each.value, dict(variables)) for each in node.arguments or ()
            }
            found = self._field(value, node.name.value, arguments)
            if node.selection_set and found is not None:
                below = [
                    self._selected(one, node.selection_set, fragments, variables)
                    for one in (found if isinstance(found, list) else [found])
                ]
                found = below if isinstance(found, list) else below[0]
            said[node.alias.value if node.alias else node.name.value] = found
        return said

    def _field(self, value: Answer, name: str, arguments: Mapping[str, Any]) -> Any:
        if name == "project" and "name" in arguments:
            entity = arguments.get("entityName") or arguments.get("entity")
            known = (entity, arguments["name"]) == (ENTITY, PROJECT)
            return PROJECT_INFO if known else None
        if name == "artifactCollectionMembership":
            return self.artifacts.get(arguments["name"])
        if name == "artifact" and "id" in arguments:
            artifacts = (membership["artifact"] for membership in self.artifacts.values())
            return next((each for each in artifacts if each["id"] == arguments["id"]), None)
        return value.get(name)


class Answers(Handler):
    service: WandbService

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.service.asked.append(path)
        digest = re.search(r"/([0-9a-f]{32})/", path)
        blob = self.service.blobs.get(digest[1] if digest else path)
        self.reply(404, b"{}", JSON) if blob is None else self.reply(200, blob, JSON)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.knows_key():
            self.reply(401, b'{"error": "user is not logged in"}', JSON)
            return
        asked = json.loads(body)
        said = self.service.answer(asked["query"], asked.get("variables") or {})
        self.reply(200, json.dumps({"data": said}).encode(), JSON)

    def knows_key(self) -> bool:
        kind, _, said = (self.headers.get("Authorization") or "").partition(" ")
        if kind == "Basic":
            said = base64.b64decode(said).decode().partition(":")[2]
        return said == self.service.key


@contextmanager
def running(service: WandbService) -> Iterator[WandbService]:
    with serving(Answers, service) as service.url:
        yield service
