"""Has a running server keep mixtures of adapters; for its errors see `serve.client.api_client`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from serve.client.api_client import ApiClient
from serve.errors import ConfigError


class MixtureClient(ApiClient):
    def mix(
        self, name: str, parts: Sequence[str], *, promote: bool = True, why: str = "", **options: str | float
    ) -> dict[str, Any]:
        """Keep a weighted sum of adapters (`tone:0.7`, `legal:0.3`) as a version of `name`; by which `method`, at which
        `density`."""
        if name in ("", ".", ".."):
            raise ConfigError(f"{name!r} is no name")
        body = {"adapters": [*parts], "promote": promote} | ({"why": why} if why else {}) | options
        return self._call("POST", f"/v1/adapters/{quote(name, safe='')}/mix", json=body)
