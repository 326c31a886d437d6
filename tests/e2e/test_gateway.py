"""An endpoint picker's own rules read the real server: what a gateway would route by."""

from __future__ import annotations

import time

import pytest

from tests.support.endpoint_picker import scraped

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("path", ["/metrics", "/metrics/gateway"])
def test_a_picker_reads_load_cache_and_adapters(server, voice, path):
    assert server.ask(voice, tokens=2).done
    time.sleep(1.1)  # whatever was rendered before is good for a second
    endpoint = scraped(server.http.get(path).text)
    assert endpoint.errors == []
    assert endpoint.block_size > 0 and endpoint.blocks > 0 and 0 <= endpoint.kv_cache < 1
    assert voice in endpoint.active and endpoint.affinity(voice) == 1.0
    level, pinned, rank = (endpoint.loaded or {})[voice]
    assert level == "gpu" and not pinned and rank > 0
    assert len(endpoint.active) <= endpoint.max_active and endpoint.base == "smollm2"
