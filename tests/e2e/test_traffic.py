"""Canary, shadow, pin, a push by address and the effect probe, with real weights on the real engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.lora import variant
from tests.support.server import Server, done, refused
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture
def versions(server: Server, adapters: dict[str, Path], name: str) -> dict[int, str]:
    """version -> its id; v1 says alpha and is live, v2 says bravo."""
    first = done(server.upload(name, adapters["alpha"]))
    return {1: first["id"], 2: done(server.upload(name, adapters["bravo"], promote=False))["id"]}


def test_a_canary_answers_its_askers_with_its_own_weights_and_the_others_stay(server, name, versions):
    done(server.http.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0.5}))
    said = {}
    for user in map(str, range(12)):
        answers = [server.ask(name, tokens=4, user=user) for _ in range(2)]
        assert len({answer.model for answer in answers}) == 1, "an asker always meets the same version"
        said[user] = answers[0]
    words = {answer.model: answer.word for answer in said.values()}
    assert words == {versions[1]: "alpha", versions[2]: "bravo"}
    done(server.http.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0}))
    assert {server.ask(name, tokens=4, user=user).word for user in said} == {"alpha"}


def test_a_shadow_answers_unseen(server, name, versions):
    def shadowed() -> float:
        metrics = server.http.get("/metrics").text
        found = re.search(
            rf'loradock_shadow_requests_total{{adapter="{name}",result="answered",version="v2"}} (\d+)', metrics
        )
        return float(found[1]) if found else 0

    done(server.http.post(f"/v1/adapters/{name}/shadow", json={"version": 2, "weight": 1}))
    answer = server.ask(name, tokens=4)
    assert (answer.word, answer.model) == ("alpha", versions[1])
    assert eventually(lambda: shadowed() == 1)


def test_a_pinned_adapter_is_in_the_engine_after_a_crowd_has_passed(server, name, adapters, versions, tmp_path):
    done(server.http.post(f"/v1/adapters/{name}/pin", json={"version": 1}))
    most = server.engine()["max_resident"]
    crowd = f"{name[:40]}-crowd"
    for number in range(most + 2):
        folder = variant(adapters["bravo"], tmp_path / str(number), scale=1 - number / 200)
        done(server.upload(crowd, folder, promote=False))
        done(
            server.http.post(
                "/v1/completions", json={"model": f"{crowd}@v{number + 1}", "prompt": "Hi", "max_tokens": 1}
            )
        )
    assert server.resident(name) == {versions[1]}
    assert server.ask(name, tokens=4).word == "alpha"
    done(server.http.delete(f"/v1/adapters/{crowd}"))
    assert eventually(lambda: not server.resident(crowd))


def test_an_adapter_is_pushed_by_address_and_answers(server, name, adapters):
    pushed = done(server.http.post("/v1/adapters", json={"name": name, "source": f"file://{adapters['charlie']}"}))
    assert server.ask(name, tokens=4).word == "charlie"
    assert pushed["checks"]["effect"] > pushed["checks"]["effect_needed"]
    elsewhere = server.http.post("/v1/adapters", json={"name": name, "source": "file:///etc"})
    assert "source_roots" in refused(elsewhere, 403)


def test_an_adapter_that_changes_nothing_is_refused(server, name, adapters, tmp_path):
    mute = variant(adapters["alpha"], tmp_path / "mute", scale=1e-4)  # zeros would not come as far as the probe
    assert "does not change what the base says" in refused(server.upload(name, mute), 422)
    assert server.http.get(f"/v1/adapters/{name}").status_code == 404


def test_an_adapter_comes_from_a_hub_and_answers(server, hub, adapters, name):
    sha = hub.repository("team/bravo").commit(adapters["bravo"])
    pushed = done(server.http.post("/v1/adapters", json={"name": name, "source": "hf://team/bravo@main"}))
    assert (pushed["live"], server.ask(name).word) == (True, "bravo")
    assert server.adapter(name)["history"][0]["why"] == f"from hf://team/bravo@main (commit {sha})"
