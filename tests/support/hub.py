"""A hub in small: the few routes of huggingface.co through which its own client reads a repository."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits, and the branches and tags that name them."""

    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, folder: Path, *names: str, under: str = "") -> str:
        """What is in `folder`, as a commit that these names (else `main`) now stand for."""
        files = {f"{under}{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
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

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())


class Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.asked.append(path)
            hub.keys.add(self.headers.get("Authorization"))
            hub.before(path)
            try:
                self.answer(path)
            except Refusal as refusal:
                body = json.dumps({"error": refusal.code}).encode()
                self.reply(refusal.status, body, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})

        do_HEAD = do_GET

        def answer(self, path: str) -> None:
            if asked := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
                name, sha, files = self.find(asked[1], asked[2] or "main")
                self.json({"id": name, "sha": sha, "siblings": [{"rfilename": one} for one in files]})
            elif asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
                _, _, files = self.find(asked[1], asked[2])
                below = f"{asked[3]}/" if asked[3] else ""
                found = [one for one in files if one.startswith(below) and "/" not in one[len(below) :]]
                if below and not found:
                    raise Refusal(404, "EntryNotFound")
                self.json([{"type": "file", "path": one, "size": len(files[one]), "oid": "0" * 40} for one in found])
            elif asked := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                _, sha, files = self.find(asked[1], asked[2])
                if asked[3] not in files:
                    raise Refusal(404, "EntryNotFound")
                if asked[3].endswith(".safetensors"):  # large files lie elsewhere
                    where = {"Location": f"{hub.url}/lfs/{asked[1]}/{sha}/{asked[3]}"}
                    self.reply(302, b"", {"X-Repo-Commit": sha, **where})
                else:
                    self.file(files[asked[3]])
            elif asked := re.fullmatch(r"/lfs/([^/]+/[^/]+)/([^/]+)/(.+)", path):
                self.file(hub.repositories[asked[1]].commits[asked[2]][asked[3]])
            else:
                raise Refusal(404, "NotFound")

        def find(self, name: str, revision: str) -> tuple[str, str, Files]:
            repository = hub.repositories.get(name)
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
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            more: dict[str, str] = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
            status, whole = 200, data
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                status, whole = 206, data[first : last + 1]
                more["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.reply(status, whole, more, hub.breaks.pop(0) if hub.breaks and "/lfs/" in self.path else None)

        def json(self, told: Any) -> None:
            self.reply(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

        def reply(self, status: int, body: bytes, headers: dict[str, str], stop: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:stop])
            if stop is not None:
                self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
