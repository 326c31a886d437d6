"""The prefix cache knows what computed each block: the version, its digest, the mixture's weights, and the tenant.

Two tenants ask a long prompt of versions of several kinds that are nearly the same. Another's blocks would be seen
twice: in the cached tokens of a first request, and in an answer that is off what the asker gets without the cache.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.lora import STORY, variant
from tests.support.other_kinds import as_dora, as_loha, with_tokens
from tests.support.server import BASE, Server, bearer, done
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TENANT = "isolated"
BLOCK = 128  # tokens; an engine's are no longer


@dataclass
class Asker:
    """A tenant's client and the model that it asks; `says` tells whose weights answer."""

    http: httpx.Client
    tenant: str
    model: str
    says: str

    def ask(self, prompt: str, **more: Any) -> dict[str, float]:
        """The log-probabilities of the likeliest next tokens, which follow from every block of the prompt."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20, **more}
        choice = done(self.http.post("/v1/completions", json=body))["choices"][0]
        likely: dict[str, float] = choice["logprobs"]["top_logprobs"][0]
        return likely

    def used(self) -> tuple[int, int]:
        """Clients' requests of this tenant, and their cached tokens, so far."""
        rows = done(self.http.get("/v1/usage", params={"tenant": self.tenant}))["data"]
        counts = [row["causes"].get("request", {}) for row in rows]
        return sum(each.get("requests", 0) for each in counts), sum(each.get("cached_tokens", 0) for each in counts)

    def cached(self, prompt: str) -> tuple[int, dict[str, float]]:
        """How many tokens the cache had, and the answer."""
        requests, before = self.used()
        answer = self.ask(prompt)
        assert eventually(lambda: self.used()[0] > requests)
        return self.used()[1] - before, answer


def apart(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of tokens that are likely in both."""
    return max((abs(one[token] - other[token]) for token in one.keys() & other.keys()), default=float("inf"))


@pytest.fixture
def tenant(server: Server) -> Iterator[httpx.Client]:
    """Another tenant than `default`; its adapter goes with the test."""
    asked = {"tenant": TENANT, "name": "caches", "scopes": ["adapters:write", "inference"]}
    key = done(server.http.post("/v1/keys", json=asked))
    with httpx.Client(base_url=server.url, headers=bearer(key["secret"]), timeout=120) as client:
        yield client
    server.http.delete(f"/v1/keys/{key['id']}")


@pytest.fixture
def askers(server: Server, adapters: dict[str, Path], tenant, name, tmp_path) -> Iterator[list[Asker]]:
    mine: list[tuple[httpx.Client, str]] = []

    def push(http: httpx.Client, called: str, folder: Path) -> None:
        files = [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir()) if file.is_file()]
        done(http.post("/v1/adapters", data={"name": called}, files=files))
        if (http, called) not in mine:
            mine.append((http, called))

    def made(word: str, scale: float, kind: Callable[[Path, Path], Any] | None = None) -> Path:
        folder = variant(adapters[word], tmp_path / uuid.uuid4().hex, scale=scale)
        return kind(folder, tmp_path / uuid.uuid4().hex) if kind else folder

    here, kin, other = made("alpha", 0.3), made("alpha", 0.33), made("bravo", 0.3)
    push(server.http, name, here)
    push(server.http, name, kin)
    push(server.http, f"{name}-dora", made("alpha", 0.3, as_dora))
    push(server.http, f"{name}-tokens", made("alpha", 0.3, with_tokens))
    push(server.http, f"{name}-loha", made("alpha", 0.36, as_loha))
    push(server.http, f"{name}-other", other)
    push(tenant, name, other)
    push(tenant, f"{name}-twin", here)
    for shared in (name, f"{name}-other"):
        done(server.http.post(f"/v1/adapters/{shared}/visibility", json={"visibility": "shared"}))

    def mixture(first: float, second: float, owner: str = "") -> str:
        return f"{owner}{name}@v1:{first}+{owner}{name}-other:{second}"

    yield [
        Asker(server.http, "default", BASE, "base"),
        Asker(server.http, "default", f"{name}@v1", "here"),
        Asker(server.http, "default", f"{name}@v2", "kin"),
        Asker(server.http, "default", f"{name}-dora", "dora"),
        Asker(server.http, "default", f"{name}-tokens", "tokens"),
        Asker(server.http, "default", f"{name}-loha", "loha"),
        Asker(server.http, "default", mixture(0.7, 0.3), "mixture"),
        Asker(server.http, "default", mixture(0.3, 0.7), "the other mixture"),
        Asker(tenant, TENANT, BASE, "base"),
        Asker(tenant, TENANT, name, "other"),
        Asker(tenant, TENANT, f"{name}-twin", "here"),
        Asker(tenant, TENANT, f"default/{name}@v1", "here"),
        Asker(tenant, TENANT, mixture(0.7, 0.3, "default/"), "mixture"),
    ]
    for http, called in mine:
        http.delete(f"/v1/adapters/{called}?force=true")
    assert eventually(lambda: not any(server.resident(called) for _, called in mine))


def test_nobody_is_given_blocks_of_another(askers):
    prompt = f"A letter to {uuid.uuid4().hex}. " + STORY * 5  # that nobody has asked before
    first, second = ([asker.cached(prompt) for asker in askers] for _ in range(2))
    fresh = [asker.ask(prompt, cache_salt=uuid.uuid4().hex) for asker in askers]
    seen = {}
    for number, asker in enumerate(askers):
        others = [apart(fresh[number], fresh[at]) for at, other in enumerate(askers) if other.says != asker.says]
        (before, one), (after, two) = first[number], second[number]
        own = max(apart(one, fresh[number]), apart(two, fresh[number]))
        seen[f"{asker.model} of {asker.tenant}"] = {"cached": (before, after), "own": own, "nearest": min(others)}
    print(json.dumps(seen, indent=1))
    for who, each in seen.items():
        before, after = each["cached"]
        assert before == 0, f"{who} was given another's blocks: {seen}"
        assert after > BLOCK, f"{who} was given none of its own, so this proves little: {seen}"
        assert each["own"] < each["nearest"] / 2, f"{who} was answered from other blocks than its own: {seen}"
