"""Speaks the training data API of a running server; for its errors see `serve.client.api_client`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serve.client.api_client import ApiClient
from serve.errors import ConfigError, LoradockError

LOOK_SECONDS = 1.0
FILES = {
    "training_file": "train.jsonl",
    "validation_file": "held_out.jsonl",
    "preferences_file": "preferences.jsonl",
}


class DataClient(ApiClient):
    """Build data out of an adapter's traffic, list what is captured, and delete it."""

    def build(
        self, name: str, options: Mapping[str, Any], told: Callable[[dict[str, Any]], None] = lambda how_far: None
    ) -> dict[str, Any]:
        """The build; `told` hears now and then how far it is."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(LOOK_SECONDS):
                try:
                    told(self._call("GET", f"{_path(name)}/progress"))
                except LoradockError:
                    continue  # the build itself says what is wrong

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            return self._call("POST", _path(name), json=dict(options))
        finally:
            done.set()
            looking.join()

    def save(self, built: Mapping[str, Any], folder: Path) -> list[Path]:
        """Write the files of a build into `folder`; those that are there."""
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for kind, name in FILES.items():
                (folder / name).unlink(missing_ok=True)
                if id := built[kind]:
                    self._download(f"/v1/files/{quote(id, safe='')}/content", folder / name)
                    written.append(folder / name)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error}") from error
        return written

    def conversations(self, name: str, limit: int = 100) -> dict[str, Any]:
        """The latest ones that are captured."""
        return self._call("GET", f"{_path(name)}/conversations", params={"limit": limit})

    def delete(self, name: str, id: str) -> dict[str, Any]:
        """Delete a conversation, by its id or that of one of its answers."""
        return self._call("DELETE", f"{_path(name)}/conversations/{quote(id, safe='')}")


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='/')}/data"
