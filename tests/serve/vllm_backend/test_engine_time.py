"""On the real engine: what tenants are charged adds up to what the engine did."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm")

from tests.support.server import ADMIN, BASE, KEYS, SMALL, Server, done

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

LOAD_SECONDS = 8.0


def series(server: Server, name: str) -> dict[str, float]:
    """Label text -> value of one family."""
    text = server.http.get("/metrics", headers={"authorization": f"Bearer {ADMIN}"}).text
    return {match[1]: float(match[2]) for match in re.finditer(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE)}


def test_the_shares_of_all_tenants_add_up_to_the_time_in_which_the_engine_was_busy(tmp_path: Path):
    with Server(tmp_path / "data", tmp_path / "log", *SMALL, **KEYS) as server:
        keys = {}
        for tenant in ("acme", "globex"):
            body = {"name": "key", "tenant": tenant, "scopes": ["inference"]}
            keys[tenant] = done(server.http.post("/v1/keys", json=body))["secret"]
        busy_before = series(server, "loradock_engine_busy_seconds_total")
        ends = time.monotonic() + LOAD_SECONDS

        def load(tenant: str, number: int) -> None:
            headers = {"authorization": f"Bearer {keys[tenant]}"}
            with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
                while time.monotonic() < ends:
                    content = "You answer at length. " * 20 + f"Tell me about the number {number}."
                    body = {"model": BASE, "messages": [{"role": "user", "content": content}]}
                    body |= {"max_tokens": 8 if number % 2 else 48, "temperature": number / 4, "stop": ["\n\n"]}
                    assert http.post("/v1/chat/completions", json=body).status_code == 200

        began = time.monotonic()
        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(load, "acme" if number < 4 else "globex", number) for number in range(6)]
            for each in running:
                each.result()
        wall = time.monotonic() - began
        time.sleep(1.2)  # a render of /metrics is good for a second
        busy = series(server, "loradock_engine_busy_seconds_total")
        clients = next(value for labels, value in busy.items() if 'use="clients"' in labels)
        clients -= next(value for labels, value in busy_before.items() if 'use="clients"' in labels)
        charged = series(server, "loradock_usage_engine_seconds_total")
        tokens = series(server, "loradock_usage_tokens_total")
        print(f"wall {wall:.2f} s, busy for clients {clients:.3f} s, charged {sum(charged.values()):.3f} s: {charged}")
        assert sum(charged.values()) == pytest.approx(clients, rel=0.02)
        assert 0.5 * wall < clients <= 1.02 * wall
        assert all(any(f'tenant="{tenant}"' in labels for labels in charged) for tenant in keys)
        assert any('kind="cached"' in labels and value > 0 for labels, value in tokens.items())
        too_long = {"model": BASE, "prompt": "one two three " * 3000, "max_tokens": 1}
        assert server.http.post("/v1/completions", json=too_long).status_code == 400
        time.sleep(1.2)
        problems = series(server, "loradock_input_problems_total")
        assert sum(value for labels, value in problems.items() if 'problem="over_context"' in labels) == 1, problems
        answer = done(server.http.get("/v1/usage"))
        assert answer["total"]["engine_seconds"] == pytest.approx(sum(charged.values()), rel=1e-3)
