"""A hub in small: the few routes of huggingface.co through which its own client reads a repository, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.support.http_service import Handler, serving

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits, and the branches and tags that name them."""

    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, folder: Path, *names: str, under: str = "") -> str:
        """What is in `folder`, as a commit that these names (else `main`) now stand for."""
        return self.add({f"{under}{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}, *names)

    def add(self, files: Files, *names: str) -> str:
        sha = hashlib.sha1(repr(files).encode()).hexdigest()
        self.commits[sha] = files
        self.names |= dict.fromkeys(names or ("main",), sha)
        return sha


@dataclass
class Hub:
    """`before` hears each path that is asked; `breaks`: after how many bytes the next downloads end early."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    before: Callable[[str], None] = lambda path: None
    breaks: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    url: str = ""
    # Who may write, and what was sent before its commit.
    writer: str = "may-write"
    uploads: dict[str, bytes] = field(default_factory=dict)

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())


class Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class Answers(Handler):
    """As huggingface.co gives them."""

    service: Hub

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.service.asked.append(path)
        self.service.keys.add(self.headers.get("Authorization"))
        self.service.before(path)
        try:
            for pattern, answer in ROUTES:
                if route := re.fullmatch(pattern, path):
                    answer(self, *route.groups())
                    return
            raise Refusal(404, "NotFound")
        except Refusal as refusal:
            body = json.dumps({"error": refusal.code}).encode()
            self.reply(refusal.status, body, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.service.asked.append(path)
        body = self.body()
        try:
            if self.headers.get("Authorization") != f"Bearer {self.service.writer}" and not path.startswith("/upload/"):
                raise Refusal(401, "Unauthorized")
            for pattern, answer in WRITES:
                if route := re.fullmatch(pattern, path):
                    answer(self, body, *route.groups())
                    return
            raise Refusal(404, "NotFound")
        except Refusal as refusal:
            body = json.dumps({"error": refusal.code}).encode()
            self.reply(refusal.status, body, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})

    do_PUT = do_POST

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = json.dumps({"url": f"{self.service.url}/{name}"}).encode()
        if name in self.service.repositories:
            self.reply(409, url, {"Content-Type": "application/json"})
            return
        repository = self.service.repository(name)
        repository.private = asked.get("visibility") == "private"
        repository.add({".gitattributes": b""}, "main")
        self.reply(200, url, {"Content-Type": "application/json"})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self.service.repositories[name]
        if branch in repository.names:
            raise Refusal(409, "Conflict")
        repository.names[branch] = repository.names["main"]
        self.json({})

    def valid(self, body: bytes) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
        self.json({"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in files]})

    def batch(self, body: bytes, name: str) -> None:
        objects = json.loads(body)["objects"]
        href = {each["oid"]: {"upload": {"href": f"{self.service.url}/upload/{each['oid']}"}} for each in objects}
        self.json({"transfer": "basic", "objects": [{**each, "actions": href[each["oid"]]} for each in objects]})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.service.uploads[oid] = body
        self.json({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        new: Files = {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            new[value["path"]] = self.service.uploads[value["oid"]] if large else base64.b64decode(value["content"])
        repository = self.service.repositories[name]
        repository.messages.append(lines[0]["value"]["summary"])
        sha = repository.add({**repository.commits[repository.names[revision]], **new}, revision)
        self.json({"commitUrl": f"{self.service.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def model(self, name: str, revision: str | None) -> None:
        name, sha, files = self.find(name, revision or "main")
        self.json({"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]})

    def tree(self, name: str, revision: str, folder: str) -> None:
        _, _, files = self.find(name, revision)
        below = f"{folder}/" if folder else ""
        entries = [file for file in files if file.startswith(below) and "/" not in file[len(below) :]]
        if below and not entries:
            raise Refusal(404, "EntryNotFound")
        self.json([{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in entries])

    def resolve(self, name: str, revision: str, file: str) -> None:
        _, sha, files = self.find(name, revision)
        if file not in files:
            raise Refusal(404, "EntryNotFound")
        if file.endswith(".safetensors"):  # large files lie elsewhere
            location = f"{self.service.url}/lfs/{name}/{sha}/{file}"
            self.reply(302, b"", {"X-Repo-Commit": sha, "Location": location})
        else:
            self.file(files[file])

    def large(self, name: str, sha: str, file: str) -> None:
        self.file(self.service.repositories[name].commits[sha][file])

    def find(self, name: str, revision: str) -> tuple[str, str, Files]:
        repository = self.service.repositories.get(name)
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository is None or repository.token not in (None, key):
            raise Refusal(404, "RepoNotFound") if key else Refusal(401, "RepoNotFound")
        if repository.gated:
            raise Refusal(403, "GatedRepo")
        sha = repository.names.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound")
        return name, sha, repository.commits[sha]

    def file(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, body = 200, data
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            status, body = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        breaks = self.service.breaks
        self.reply(status, body, headers, stop=breaks.pop(0) if breaks and "/lfs/" in self.path else None)

    def json(self, answer: Any) -> None:
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})


ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", Answers.model),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", Answers.tree),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Answers.resolve),
    (r"/lfs/([^/]+/[^/]+)/([^/]+)/(.+)", Answers.large),
]

WRITES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/repos/create", Answers.create),
    (r"/api/validate-yaml", Answers.valid),
    (r"/api/models/([^/]+/[^/]+)/branch/(.+)", Answers.branch),
    (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", Answers.preupload),
    (r"/api/models/([^/]+/[^/]+)/commit/(.+)", Answers.commit),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Answers.batch),
    (r"/upload/(.+)", Answers.upload),
]


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    with serving(Answers, hub) as hub.url:
        yield hub
