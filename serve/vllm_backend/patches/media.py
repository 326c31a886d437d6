"""Images, sound and video that a request names by URL: from allowed hosts, never from private addresses.

vLLM fetches them from this server's network. `allowed_media_domains` is vLLM's own option; it allows every host where
it is empty, and here none. An allowed name may still resolve to a private address, also at the second look and after a
redirect: so each connection is checked when its socket is made. Behind an HTTP proxy the proxy decides.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from serve.asgi.public_address import is_public
from serve.errors import ConfigError

ANY_HOST = "*"
NO_HOST = "no-host-is-allowed.invalid"


def install() -> None:
    """Redirects are not followed unless the environment says so."""
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")


def allowed_hosts(hosts: Sequence[str] | None) -> list[str] | None:
    """vLLM's `allowed_media_domains` for what was configured: no host by default; `*` is every public one."""
    if not hosts:
        return [NO_HOST]
    for host in hosts:
        if host == "localhost" or (_is_address(host) and not is_public(host)):
            raise ConfigError(f"allowed_media_domains takes public hosts, or * for all of them, not {host!r}")
    return None if ANY_HOST in hosts else list(hosts)


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for an address as getaddrinfo gives it, or OSError when it is not a public one."""
    family, kind, protocol, _, place = address
    if not is_public(place[0]):
        raise OSError(errno.EACCES, f"{place[0]} is not a public address: media is fetched from public hosts only")
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    return made


async def get_async_client(stock: Callable[..., Any], self: Any) -> aiohttp.ClientSession:
    """vLLM's client, which connects to public addresses alone."""
    if urllib.request.getproxies():
        client: aiohttp.ClientSession = await stock(self)
        return client
    if self._async_client is None or not self.reuse_client:
        self._async_client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=public_socket))
    checked: aiohttp.ClientSession = self._async_client
    return checked


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
