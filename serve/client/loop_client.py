"""Speaks the loops' API of a running server; for its errors see `serve.client.api_client`."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from serve.client.api_client import ApiClient
from serve.errors import ConfigError


class LoopClient(ApiClient):
    """Look at, ask, stop and start loops."""

    def loops(self) -> dict[str, Any]:
        """Of all adapters that the key may change."""
        return self._call("GET", "/v1/loops")

    def loop(self, name: str) -> dict[str, Any]:
        return self._call("GET", _path(name))

    def ask(self, name: str, what: str, why: str = "") -> dict[str, Any]:
        """`run`, `approve`, `reject`, `stop` or `start` it."""
        body = {"why": why} if why else None
        return self._call("POST", f"{_path(name)}/{what}", json=body)

    def everywhere(self, what: str) -> dict[str, Any]:
        """`stop` or `start` every loop."""
        return self._call("POST", f"/v1/loops/{what}")

    def drop(self, name: str, reference: str) -> dict[str, Any]:
        """Forget a reference with its examples."""
        return self._call("DELETE", f"{_path(name)}/references/{quote(reference, safe='')}")


def _path(name: str) -> str:
    if name in ("", ".", ".."):
        raise ConfigError(f"{name!r} is no name")
    return f"/v1/adapters/{quote(name, safe='')}/loop"
