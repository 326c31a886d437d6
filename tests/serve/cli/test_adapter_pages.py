"""What a terminal shows of adapters, from what the server's API answers."""

from __future__ import annotations

import re
import time

import pytest

from serve.cli import adapter_pages
from serve.cli.terminal import age, nbytes
from tests.support.app import canary, push_two, upload

TONE = "/v1/adapters/tone"


def row(text, first):
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


async def listed(client):
    return adapter_pages.listed((await client.get("/v1/adapters")).json())


async def page(client):
    return adapter_pages.shown((await client.get(TONE)).json())


async def test_the_list_shows_live_canary_shadow_pin_rank_size_and_age(client, make_adapter):
    assert "begin with: loradock adapters push" in await listed(client)
    await push_two(client, make_adapter)
    text = await listed(client)
    assert text.splitlines()[0].split() == [
        "NAME",
        "LIVE",
        "CANARY",
        "SHADOW",
        "PIN",
        "RANK",
        "SIZE",
        "AGE",
        "VERSIONS",
    ]
    name, live, trial, shadow, pin, rank, size, unit, *rest = row(text, "tone")
    assert (name, live, trial, shadow, pin, rank, unit, rest[-1]) == ("tone", "v1", "-", "-", "-", "2", "KiB", "2")
    assert float(size) > 0
    await canary(client, 0.125)
    await client.post(f"{TONE}/pin", json={"version": 2})
    assert row(await listed(client), "tone")[1:6] == ["v1", "v2", "12.5%", "-", "v2"]


async def test_the_page_of_an_adapter_has_its_versions_traffic_and_history(client, make_adapter):
    await push_two(client, make_adapter)
    await client.put(f"{TONE}/aliases/stable", json={"version": 1, "why": "as approved"})
    await client.put(f"{TONE}/versions/2/tags", json={"tags": ["run 17"]})
    await canary(client, 0.1)
    await client.post(f"{TONE}/pin")
    text = await page(client)
    assert text.startswith("tone\n  live ")
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        "tone", "", "Versions", "", "Traffic", "", "History",
    ]  # fmt: skip
    assert re.search(r"^  aliases +stable = v1$", text, re.M) and re.search(r"^  engine +base$", text, re.M)
    assert re.search(r"^  v1 +live, pinned, stable +2 ", text, re.M)
    assert re.search(r"^  v2 +canary +2 .* run 17 ", text, re.M)
    assert "  tone@v2 answers 10% of the requests" in text
    assert re.search(r"^  20\S+ \S+  alias +v1  stable  by anonymous: as approved$", text, re.M)
    assert re.search(r"^  20\S+ \S+  canary +v1 to v2  10% of the requests  by anonymous$", text, re.M)


async def test_a_pin_names_the_version_and_so_does_a_removal(client, make_adapter):
    await push_two(client, make_adapter)
    assert adapter_pages.pinned((await client.post(f"{TONE}/pin")).json()) == "tone@v1 is pinned"
    assert adapter_pages.pinned((await client.post(f"{TONE}/pin", json={"version": 2})).json()) == "tone@v2 is pinned"
    gone = (await client.delete(TONE)).json()
    assert adapter_pages.removed(gone, "tone") == "tone is removed (v1, v2)"
    assert adapter_pages.removed({"deleted": [2]}, "tone@v2") == "tone@v2 is removed"


async def test_a_pin_of_a_name_without_a_live_version_says_so(client, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter(), promote="false"))
    assert "whichever version is live stays" in adapter_pages.pinned((await client.post(f"{TONE}/pin")).json())


async def test_a_dry_run_says_what_was_found_and_that_nothing_was_kept(client, make_adapter):
    answer = await client.post("/v1/adapters", **upload(make_adapter(), dry_run="true"))
    text = adapter_pages.pushed(answer.json())
    assert text.startswith("tone fits base (rank 2, ") and "a new version, and become live" in text
    assert "measured: effect" in text and text.endswith("nothing was kept: this was a dry run")
    await client.post("/v1/adapters", **upload(make_adapter()))
    again = await client.post("/v1/adapters", **upload(make_adapter(), dry_run="true"))
    assert "these bytes are tone@v1 already" in adapter_pages.pushed(again.json())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (3 * 86_400, "3 d"), (-5, "0 s")]
)
def test_an_age_is_told_in_its_largest_unit(seconds, text):
    now = time.time()
    assert age(now - seconds, now) == text


def test_what_an_older_server_does_not_say_is_a_dash():
    assert age(None, 0) == nbytes(None) == "-"
    assert row(adapter_pages.listed({"data": [{"name": "tone", "live": None}]}), "tone")[1:] == ["-"] * 7 + ["0"]
    assert [nbytes(size) for size in (512, 3 << 20, 20 << 30)] == ["0.5 KiB", "3 MiB", "20.0 GiB"]
