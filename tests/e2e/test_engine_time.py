"""On the real engine: what tenants are charged adds up to what the engine did."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.server import ADMIN, BASE, Server, done

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

LOAD_SECONDS = 8.0
BUSY, CHARGED = "loradock_engine_busy_seconds_total", "loradock_usage_engine_seconds_total"


def series(server: Server, name: str) -> dict[str, float]:
    """Label text -> value of one family."""
    text = server.http.get("/metrics", headers={"authorization": f"Bearer {ADMIN}"}).text
    return {match[1]: float(match[2]) for match in re.finditer(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE)}


def over_context(server: Server) -> float:
    """Inputs that were too long, so far."""
    problems = series(server, "loradock_input_problems_total")
    return sum(value for labels, value in problems.items() if 'problem="over_context"' in labels)


def test_the_shares_of_all_tenants_add_up_to_the_time_in_which_the_engine_was_busy(slowable: Server):
    server = slowable
    keys = {}
    for tenant in ("acme", "globex"):
        body = {"name": "key", "tenant": tenant, "scopes": ["inference"]}
        keys[tenant] = done(server.http.post("/v1/keys", json=body))["secret"]
    busy_before, charged_before = series(server, BUSY), series(server, CHARGED)
    problems_before = over_context(server)
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
    busy, total = series(server, BUSY), series(server, CHARGED)
    clients = next(value for labels, value in busy.items() if 'use="clients"' in labels)
    clients -= next(value for labels, value in busy_before.items() if 'use="clients"' in labels)
    charged = {labels: value - charged_before.get(labels, 0.0) for labels, value in total.items()}
    tokens = series(server, "loradock_usage_tokens_total")
    print(f"wall {wall:.2f} s, busy for clients {clients:.3f} s, charged {sum(charged.values()):.3f} s: {charged}")
    assert sum(charged.values()) == pytest.approx(clients, rel=0.02)
    assert 0.5 * wall < clients <= 1.02 * wall
    assert all(any(f'tenant="{tenant}"' in labels for labels in charged) for tenant in keys)
    assert any('kind="cached"' in labels and value > 0 for labels, value in tokens.items())
    too_long = {"model": BASE, "prompt": "one two three " * 3000, "max_tokens": 1}
    assert server.http.post("/v1/completions", json=too_long).status_code == 400
    time.sleep(1.2)
    assert over_context(server) == problems_before + 1
    answer = done(server.http.get("/v1/usage"))
    assert answer["total"]["engine_seconds"] == pytest.approx(sum(total.values()), rel=1e-3)
