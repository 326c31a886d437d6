"""A registry of container images in small, as the OCI distribution specification has it, with a service for tokens."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import secrets
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpx

from tests.support.http_service import Handler, serving

HOST, TOKENS, ELSEWHERE = "registry.example.org", "auth.example.org", "cdn.example.org"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
TITLE = "org.opencontainers.image.title"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class OciRegistry:
    """`asked` are the paths by host; `authorized` those that came with a token; `moved`: layers lie elsewhere.

    With `users` (their passwords by name) and `identities` it gives tokens to those alone.
    """

    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    users: dict[str, str] = field(default_factory=dict)
    identities: set[str] = field(default_factory=set)
    realm: str = f"https://{TOKENS}/token"
    challenge: str = "Bearer"
    moved: str | None = None
    once: bool = False  # a token is good for one answer
    asked: list[tuple[str, str]] = field(default_factory=list)
    authorized: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def layer(
        self, data: bytes, title: str = "", kind: str = "application/octet-stream", **notes: str
    ) -> dict[str, Any]:
        """A blob, and what a manifest says of it."""
        self.blobs[digest_of(data)] = data
        annotations = {**({TITLE: title} if title else {}), **notes}
        return {"mediaType": kind, "digest": digest_of(data), "size": len(data), "annotations": annotations}

    def push(self, repository: str, tag: str, *layers: Mapping[str, Any]) -> str:
        """An artifact, as ORAS pushes one; the digest of its manifest."""
        config = self.layer(b"{}", kind="application/vnd.oci.empty.v1+json")
        return self.put(repository, tag, MANIFEST, {"schemaVersion": 2, "config": config, "layers": [*layers]})

    def put(self, repository: str, tag: str, kind: str, document: Any) -> str:
        data = json.dumps({"mediaType": kind, **document}).encode()
        for reference in (tag, digest_of(data)):
            self.manifests[repository, reference] = (kind, data)
        return digest_of(data)

    def client(self) -> httpx.Client:
        """One that finds every host here."""
        return httpx.Client(transport=_Here(self), follow_redirects=False, timeout=5)


class _Here(httpx.HTTPTransport):
    def __init__(self, registry: OciRegistry) -> None:
        super().__init__()
        self._registry = registry

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.scheme == "https"
        request.url = httpx.URL(self._registry.url).copy_with(raw_path=request.url.raw_path)
        return super().handle_request(request)


class Answers(Handler):
    service: OciRegistry

    def do_GET(self) -> None:
        registry = self.service
        host, parts = self.headers["Host"], urlsplit(self.path)
        path = unquote(parts.path)
        registry.asked.append((host, path))
        shown = self.headers.get("Authorization") or ""
        if shown:
            registry.authorized.append((host, path))
        if path == "/token":
            assert parse_qs(urlsplit(registry.realm).query).items() <= parse_qs(parts.query).items()
            self.give_token(parse_qs(parts.query), not registry.users or self.is_user(shown))
        elif host == ELSEWHERE:
            self.reply(200, registry.blobs[path.removeprefix("/")])
        elif not self.admits(shown):
            challenge = f'{registry.challenge} realm="{registry.realm}",service="{HOST}",scope="repository:x:pull"'
            challenge += ', Basic realm="packages"'  # as those say that take both
            self.reply(401, b"{}", {"WWW-Authenticate": challenge})
        elif (found := re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", path)) and found.groups() in registry.manifests:
            kind, data = registry.manifests[found[1], found[2]]
            self.reply(200, data, {"Content-Type": kind, "Docker-Content-Digest": digest_of(data)})
        elif (found := re.fullmatch(r"/v2/(.+)/blobs/([^/]+)", path)) and found[2] in registry.blobs:
            if registry.moved:
                self.reply(307, b"", {"Location": f"{registry.moved}/{found[2]}"})
            else:
                self.reply(200, registry.blobs[found[2]])
        else:
            self.reply(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')

    def do_POST(self) -> None:
        """OAuth 2, for who has an identity token."""
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.service.asked.append((self.headers["Host"], self.path))
        known = asked["grant_type"] == ["refresh_token"] and asked["refresh_token"][0] in self.service.identities
        self.give_token(asked, known, "access_token")

    def give_token(self, asked: Mapping[str, list[str]], known: bool, name: str = "token") -> None:
        assert asked["scope"][0].endswith(":pull") and asked["service"] == [HOST]
        if not known:
            self.reply(401, b'{"errors": [{"code": "UNAUTHORIZED"}]}')
            return
        self.service.tokens.add(given := secrets.token_hex(8))
        self.reply(200, json.dumps({name: given}).encode())

    def admits(self, shown: str) -> bool:
        if self.service.challenge == "Basic":
            return self.is_user(shown)
        known = (token := shown.removeprefix("Bearer ")) in self.service.tokens
        if self.service.once:
            self.service.tokens.discard(token)
        return known

    def is_user(self, shown: str) -> bool:
        kind, _, said = shown.partition(" ")
        user, _, password = base64.b64decode(said).decode().partition(":") if kind == "Basic" else ("", "", "")
        return bool(user) and self.service.users.get(user) == password


def tarred(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


@contextmanager
def running(registry: OciRegistry) -> Iterator[OciRegistry]:
    with serving(Answers, registry) as registry.url:
        yield registry
