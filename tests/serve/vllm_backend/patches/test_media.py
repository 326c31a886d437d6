"""A request may have this server fetch media only from where the operator says, and never from its own network."""

from __future__ import annotations

import asyncio

import pytest
from vllm.connections import HTTPConnection
from vllm.multimodal.media.connector import MediaConnector

from serve.errors import ConfigError
from serve.vllm_backend.engine_arguments import parse
from serve.vllm_backend.patches import media
from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named


def test_no_host_is_allowed_by_default_and_a_star_allows_the_public_ones(tiny_model):
    def domains(**options):
        return parse(str(tiny_model), "base", options).allowed_media_domains

    assert domains() == [media.NO_HOST]
    assert domains(allowed_media_domains="a.example,b.example") == ["a.example", "b.example"]
    assert domains(allowed_media_domains="*") is None
    for odd in ("localhost", "10.0.0.1", "a.example,169.254.169.254"):
        with pytest.raises(ConfigError, match="public hosts"):
            domains(allowed_media_domains=odd)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_a_private_address_is_not_connected_to_whatever_its_name(host, monkeypatch):
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    apply(named("media"))
    connected = []
    server = await asyncio.start_server(lambda *_: connected.append(1), "localhost")
    connection = HTTPConnection()
    try:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Exception, match="not a public address"):
            await connection.async_get_bytes(f"http://{host}:{port}/x.png", timeout=5)
    finally:
        server.close()
        await (await connection.get_async_client()).close()
    assert connected == []


async def test_a_host_that_is_not_allowed_is_refused_before_anything_is_looked_up():
    connector = MediaConnector(allowed_media_domains=media.allowed_hosts(None))
    with pytest.raises(ValueError, match="allowed domains"):
        await connector.fetch_image_async("http://93.184.215.14/x.png")
