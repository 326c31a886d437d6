"""What a worker asks of the server whose jobs it trains; Conflict once a job is not its own any more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serve.client.api_client import ApiClient

WORK = "/v1/fine_tuning/work"
LINES = 1000  # that a server takes at a time


class WorkClient(ApiClient):
    """`worker` is the name of this machine, which the claim of a job is bound to."""

    def __init__(self, url: str, key: str | None, worker: str, **how: Any) -> None:
        super().__init__(url, key, **{"timeout": 60.0, **how})
        self.worker = worker

    def claim(self, bases: Collection[str], kept: Collection[str], besides: Collection[str] = ()) -> dict[str, Any]:
        """A job on one of these bases, or none; `kept` are jobs that were begun here, `besides` those not to get."""
        asked = {"worker": self.worker, "bases": list(bases), "kept": list(kept), "besides": list(besides)}
        return self._call("POST", WORK, json=asked)

    def renew(self, id: str) -> None:
        self._said(id, "renew")

    def launch(self, id: str) -> dict[str, Any]:
        """The job, as far as it is."""
        return self._said(id, "launch")["job"]

    def advance(
        self, id: str, lines: Sequence[Mapping[str, Any]], seconds: float, settled: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The job, as far as it is with these steps."""
        while True:
            now, lines = lines[:LINES], lines[LINES:]
            answer = self._said(id, "progress", lines=list(now), seconds=0.0 if lines else seconds, **settled)
            if not lines:
                return answer["job"]

    def note(self, id: str, message: str, level: str) -> None:
        self._said(id, "note", message=message[:1000], level=level)

    def fail(self, id: str, code: str, message: str, param: str | None, also: Sequence[str]) -> None:
        short = [sentence[:1000] for sentence in also[:20]]
        self._said(id, "fail", code=code, message=message[:1000], param=param, also=short)

    def release(self, id: str) -> None:
        self._said(id, "release")

    def done(self, id: str) -> None:
        self._said(id, "done")

    def fetch(self, id: str, name: str, file: Path) -> None:
        """A file that the job is trained with, whole."""
        part = file.with_name(file.name + ".part")
        self._download(self._file(id, name), part)
        part.replace(file)

    def bring(self, id: str, name: str, file: Path) -> None:
        """A file of the result."""

        def sent() -> Any:
            with file.open("rb") as source:
                headers = {"content-length": str(file.stat().st_size), "content-type": "application/octet-stream"}
                return self._http.put(self._file(id, name), content=source, headers=headers)

        self._ask(sent, repeatable=True)

    def _said(self, id: str, what: str, **more: Any) -> dict[str, Any]:
        return self._call("POST", f"{WORK}/{quote(id, safe='')}/{what}", json={"worker": self.worker, **more})

    def _file(self, id: str, name: str) -> str:
        return f"{WORK}/{quote(id, safe='')}/files/{quote(name)}?worker={quote(self.worker)}"
