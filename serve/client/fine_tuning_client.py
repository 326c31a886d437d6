"""Speaks the files and fine-tuning API of a running server; for its errors see `serve.client.api_client`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serve.client.api_client import ApiClient
from serve.errors import ConfigError, LoradockError

JOBS = "/v1/fine_tuning/jobs"
ENDED = ("succeeded", "failed", "cancelled")
LOOK_SECONDS = 2.0


class FineTuningClient(ApiClient):
    """Make, look at, stop and continue fine-tuning jobs."""

    def send(self, file: Path) -> str:
        """Upload a file of examples; its id."""
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": (file.name, data)}}
        return str(self._call("POST", "/v1/files", **form)["id"])

    def create(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A new job; `asked` is the body, as OpenAI's."""
        return self._call("POST", JOBS, json=dict(asked))

    def train(self, asked: Mapping[str, Any], examples: Path, validation: Path | None = None) -> dict[str, Any]:
        """A new job over these files, which are sent first, and deleted if the job is refused."""
        files = {"training_file": examples} | ({"validation_file": validation} if validation else {})
        sent: dict[str, str] = {}
        try:
            for field, file in files.items():
                sent[field] = self.send(file)
            return self.create({**asked, **sent})
        except LoradockError as error:
            for id in sent.values() if 400 <= error.status < 500 else ():
                with suppress(LoradockError):
                    self._call("DELETE", f"/v1/files/{id}")
            raise

    def jobs(self, limit: int = 20) -> dict[str, Any]:
        """The latest jobs."""
        return self._call("GET", JOBS, params={"limit": limit})

    def job(self, id: str) -> dict[str, Any]:
        return self._call("GET", _path(id))

    def events(self, id: str, limit: int = 20) -> dict[str, Any]:
        """What happened to a job, the latest first."""
        return self._call("GET", f"{_path(id)}/events", params={"limit": limit})

    def checkpoints(self, id: str) -> dict[str, Any]:
        return self._call("GET", f"{_path(id)}/checkpoints")

    def change(self, id: str, verb: str) -> dict[str, Any]:
        """`cancel`, `pause` or `resume` a job."""
        return self._call("POST", f"{_path(id)}/{verb}")

    def validate(self, name: str, version: int, files: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Measure what a version did to its base; `files` are ids of examples (`training_file`, `validation_file`)."""
        path = f"/v1/adapters/{quote(name, safe='/')}/versions/{version}/validate"
        return self._call("POST", path, json=dict(files or {}))

    def ended(self, id: str, told: Callable[[str], None] = lambda message: None) -> dict[str, Any]:
        """The job at its end; `told` hears its events meanwhile."""
        seen: set[str] = set()
        while True:
            job = self.job(id)
            for event in reversed(self.events(id, 100)["data"]):
                if event["id"] not in seen:
                    seen.add(event["id"])
                    told(event["message"])
            if job["status"] in ENDED:
                return job
            time.sleep(LOOK_SECONDS)


def _path(id: str) -> str:
    return f"{JOBS}/{quote(id, safe='')}"
