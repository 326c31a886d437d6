"""An adapter that is kept as an artifact in a registry of container images (OCI distribution specification).

Its layers are single files with their names as annotations, as ORAS pushes them, or archives, as those of an image.
What comes is held against its digests. A registry is told who asks when it wants to know, by the login for it on this
machine (`registry_login`) or as anybody; to which host it sends for a token or a layer must be one of `source_hosts`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from serve.adapters.adapter import CARD, CONFIG, FILES, MANIFEST
from serve.adapters.archive import HEAD_BYTES, archive_kind, unpack
from serve.adapters.byte_ledger import Kind
from serve.adapters.file_thread import take_turn
from serve.adapters.shards import is_shard
from serve.adapters.sources import transfer
from serve.adapters.sources.address import Source
from serve.adapters.sources.registry_login import Login, login_of
from serve.adapters.sources.transfer import Body, Transfer, absent, checked_status, translated, unreachable
from serve.adapters.untrusted import NO_PICKLES, is_pickle
from serve.errors import AdapterRejected, BadRequest, Forbidden
from serve.names import shown

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
TITLE, UNPACK = "org.opencontainers.image.title", "io.deis.oras.content.unpack"
MAX_LAYERS, MAX_REDIRECTS = 64, 3

_ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
_MANIFEST_BYTES = 4 << 20
_TOKEN_BYTES = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_DIGEST = re.compile(r"(sha256):([0-9a-f]{64})|(sha512):([0-9a-f]{128})")
_ARCHIVE = "layer.archive"


@dataclass(frozen=True, slots=True)
class Layer:
    """What a manifest says of one blob; `name` is the adapter's file that it is, if it is one."""

    digest: str
    size: int
    title: str
    archived: bool

    @property
    def name(self) -> str | None:
        *folders, name = self.title.split("/")
        known = name in (*FILES, CARD, MANIFEST) or is_shard(name)
        return name if known and len(folders) <= 1 and not self.archived else None


def bring(source: Source, files: Transfer) -> Source:
    """The adapter's files into the folder; the answer names the digest of the manifest that was read."""
    with translated(source), transfer.http_client() as client:
        registry = _Registry(client, source)
        digest, manifest = registry.manifest()
        layers = _layers(manifest, source)
        named = _named(layers)
        if CONFIG in named:
            for name, layer in named.items():
                registry.copy(layer, name, files)
        else:
            for layer in _archives(layers, source):
                for of_a_layer_without in files.folder.iterdir():
                    of_a_layer_without.unlink()
                registry.copy(layer, _ARCHIVE, files)
                take_turn(_unpack, files)
                if (files.folder / CONFIG).is_file():
                    break
    return replace(source, version=digest)


class _Registry:
    """One repository of a registry, and what shows to it who asks."""

    def __init__(self, client: httpx.Client, source: Source) -> None:
        self._client, self._source = client, source
        self._host, _, place = source.path.partition("/")
        repository, at, digest = place.partition("@")
        self._repository, _, tag = repository.partition(":")
        self._reference = digest if at else tag or "latest"
        self._authorization = ""

    def manifest(self) -> tuple[str, Mapping[str, Any]]:
        """The manifest that the reference names, with its digest; of an index, the one that it lists."""
        digest, document = self._manifest(self._reference)
        if "manifests" not in document:
            return digest, document
        listed = document["manifests"]
        if isinstance(listed, list):
            listed = [each for each in listed if not _is_attestation(each)]
        if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
            count = len(listed) if isinstance(listed, list) else "no list"
            raise AdapterRejected(
                f"{self._source.shown} is an index of several manifests ({count}): name one of them by its digest"
            )
        digest, document = self._manifest(str(listed[0].get("digest")))
        if "manifests" in document:
            raise AdapterRejected(f"{self._source.shown} is an index of indexes: name a manifest by its digest")
        return digest, document

    def copy(self, layer: Layer, name: str, files: Transfer) -> None:
        """A layer as the file `name`: all of it, and what its digest says."""
        files.check(layer.size)
        algorithm, _, expected = layer.digest.partition(":")
        total = hashlib.new(algorithm)
        with self._get(f"blobs/{layer.digest}") as body:
            files.copy(_Bounded(body, layer.size), name, total.update)
        if total.hexdigest() != expected or (files.folder / name).stat().st_size != layer.size:
            raise self._damaged(layer.title or layer.digest)

    def _manifest(self, reference: str) -> tuple[str, Mapping[str, Any]]:
        if reference.startswith("sha") and not _DIGEST.fullmatch(reference):
            raise AdapterRejected(f"{self._source.shown} names a manifest by {shown(reference)}, which is no digest")
        with self._get(f"manifests/{reference}", _ACCEPT) as body:
            data = body.read(_MANIFEST_BYTES + 1)
        if len(data) > _MANIFEST_BYTES:
            raise AdapterRejected(f"{self._source.shown} has a manifest above {_MANIFEST_BYTES} bytes")
        if match := _DIGEST.fullmatch(reference):
            algorithm = match[1] or match[3]
            if hashlib.new(algorithm, data).hexdigest() != (match[2] or match[4]):
                raise self._damaged("the manifest")
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise AdapterRejected(f"{self._source.shown} has a manifest that is no JSON object")
        return f"sha256:{hashlib.sha256(data).hexdigest()}", document

    @contextmanager
    def _get(self, path: str, accept: str = "*/*") -> Iterator[Body]:
        url = f"https://{self._host}/v2/{self._repository}/{path}"
        headers = {"accept": accept}
        asked_who = False
        for _ in range(MAX_REDIRECTS + 2):
            own = self._judged(url) == self._host
            shows = {"authorization": self._authorization} if self._authorization and own else {}
            with self._client.stream("GET", url, headers=headers | shows) as answer:
                # Also where a token is over that was taken before.
                if answer.status_code == 401 and own and not asked_who:
                    self._authorization = self._answer_to(answer.headers.get("www-authenticate", ""))
                    asked_who = True
                    continue
                if answer.status_code in _REDIRECTS:
                    url = urljoin(url, answer.headers.get("location", ""))
                    continue
                checked_status(answer)
                yield Body(answer)
                return
        raise ConnectionError(f"it sends on more than {MAX_REDIRECTS} times")

    def _answer_to(self, challenge: str) -> str:
        """What the registry is shown from now on."""
        login = self._login()
        bearer = re.search(r'\bbearer((?:[\s,]+\w+="[^"]*")+)', challenge, re.I)  # up to another scheme
        stated = dict(re.findall(r'(\w+)="([^"]*)"', bearer[1])) if bearer else {}
        if login and login.token:
            return f"Bearer {login.token}"
        if "realm" in stated:
            return f"Bearer {self._token(stated, login)}"
        if login and login.user and re.search(r"\bbasic\b", challenge, re.I):
            return login.basic
        raise Forbidden(
            f"{self._source.shown} wants a login, and this server has none for {self._host}: log in where it runs "
            "(docker login, or DOCKER_CONFIG), or push the files"
        )

    def _login(self) -> Login | None:
        try:
            return login_of(self._host, self._repository)
        except (OSError, ValueError) as unreadable:
            raise unreachable(self._source.shown, unreadable) from unreadable

    def _token(self, stated: Mapping[str, str], login: Login | None) -> str:
        """The token that the registry's own service gives for reading, to whoever has the login or to anybody."""
        realm = stated["realm"]
        self._judged(realm)
        query = {"scope": f"repository:{self._repository}:pull"}
        query |= {name: stated[name] for name in ("service",) if name in stated}
        if login and login.identity:  # by OAuth 2
            query |= {"grant_type": "refresh_token", "refresh_token": login.identity, "client_id": "loradock"}
            request = self._client.build_request("POST", realm, data=query)
        else:
            shows = {"authorization": login.basic} if login else {}
            request = self._client.build_request("GET", httpx.URL(realm).copy_merge_params(query), headers=shows)
        answer = self._client.send(request, stream=True)
        try:
            if login and answer.status_code in (400, 401, 403):
                raise Forbidden(
                    f"{self._source.shown}: the login of this server for {self._host} is not taken; "
                    "log in again where it runs, or push the files"
                )
            checked_status(answer)
            data = Body(answer).read(_TOKEN_BYTES)
        finally:
            answer.close()
        try:
            told = json.loads(data)
            token = told.get("token") or told.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{1,32768}", token):
            raise ConnectionError("it gives no token")
        return token

    def _judged(self, url: str) -> str:
        """The host of a URL to which the registry sends: one of those that may be named, over TLS."""
        parts = urlsplit(url)
        if parts.scheme != "https" or parts.netloc.lower() not in self._source.hosts:
            where = shown(f"{parts.scheme}://{parts.netloc}", 100)
            raise BadRequest(
                f"{self._source.shown} sends on to {where}, which is none of the source_hosts: have that host added "
                "(LORADOCK_SOURCE_HOSTS), or push the files",
                param="source",
            )
        return parts.netloc.lower()

    def _damaged(self, what: str) -> AdapterRejected:
        return AdapterRejected(f"{self._source.shown} is damaged: {shown(what)} is not what its digest and size say")


class _Bounded:
    """A body that ends in an error where it is longer than it was said to be."""

    def __init__(self, body: Body, size: int) -> None:
        self._body, self._left = body, size

    def read(self, size: int, /) -> bytes:
        data = self._body.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ConnectionError("a layer is longer than its manifest says")
        return data


def _is_attestation(listed: Any) -> bool:
    """What Docker's builder says about an image, beside it in the index."""
    notes = listed.get("annotations") if isinstance(listed, dict) else None
    return isinstance(notes, dict) and notes.get("vnd.docker.reference.type") == "attestation-manifest"


def _layers(manifest: Mapping[str, Any], source: Source) -> list[Layer]:
    listed = manifest.get("layers")
    if not isinstance(listed, list) or len(listed) > MAX_LAYERS:
        raise AdapterRejected(f"{source.shown} has no manifest with up to {MAX_LAYERS} layers")
    layers = []
    for each in listed:
        digest, size = (each.get("digest"), each.get("size")) if isinstance(each, dict) else (None, None)
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int or size < 0:
            raise AdapterRejected(f"{source.shown} has a layer without a digest or a size that can be checked")
        notes = each.get("annotations")
        notes = notes if isinstance(notes, dict) else {}
        archived = "tar" in str(each.get("mediaType")) or str(notes.get(UNPACK)).lower() == "true"
        layers.append(Layer(digest, size, str(notes.get(TITLE, "")), archived))
    return layers


def _named(layers: list[Layer]) -> dict[str, Layer]:
    """The layers that are files of an adapter, by their names."""
    named: dict[str, Layer] = {}
    for layer in layers:
        if (name := layer.name) and name in named:
            raise AdapterRejected(f"the artifact has {name} twice; push one adapter at a time")
        if name:
            named[name] = layer
        elif is_pickle(layer.title):
            raise AdapterRejected(f"{shown(layer.title)} {NO_PICKLES}")
    return named


def _archives(layers: list[Layer], source: Source) -> list[Layer]:
    """Those that may hold the adapter, the last first: an image's own files come after those that it is built on."""
    archives = [layer for layer in layers if layer.archived] or [layer for layer in layers if layer.name is None]
    if not archives:
        raise absent(source.shown)
    return archives[::-1]


def _unpack(files: Transfer) -> None:
    with open(files.folder / _ARCHIVE, "rb") as file:
        kind = archive_kind(file.read(HEAD_BYTES))
    if kind is None:
        raise AdapterRejected(
            "the artifact's layer is neither a tar (plain, gzip or zstd) nor a zip; push it as one of them"
        )
    take = [files.room.beside(Kind.UNPACKED).take] if files.room else []
    unpack(files.folder / _ARCHIVE, *take, max_bytes=files.max_bytes)
