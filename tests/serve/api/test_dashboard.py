"""The dashboard in a real browser over a real server: what it shows, what it does, and what it keeps to itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serve.config import keys_hashed, load
from tests.support.app import upload
from tests.support.backend import FakeBackend
from tests.support.served import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
ADMIN = "an-admin-key"

browsing = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: chromium-headless-shell)")


async def test_the_page_holds_nothing_and_lets_the_browser_go_nowhere_else(operator):
    del operator.headers["authorization"]
    for path in ("/dashboard", "/dashboard/page.js", "/dashboard/page.css", "/dashboard/icon.svg"):
        told = await operator.get(path)
        assert told.status_code == 200
        policy = told.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert told.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org/)", told.text), "an address of somebody else's"
        assert not re.search(r"innerHTML|localStorage|sessionStorage|cookie|eval\(|\sstyle=|\son\w+=\"", told.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path: Path, tiny_model: Path, make_adapter: Any) -> Iterator[Served]:
    config = load([str(tiny_model), "--name", "base", "--data-dir", str(tmp_path / "data")], {})
    config = replace(config, admin_keys=keys_hashed([ADMIN]))
    with Served(config, FakeBackend(config.model), ADMIN) as served:
        for seed in (0, 1):
            served.http.post("/v1/adapters", **upload(make_adapter(seed), promote=str(not seed).lower()))
        for _ in range(5):
            served.http.post("/v1/chat/completions", json={"model": "tone"}).raise_for_status()
        yield served


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.wrong = []  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.wrong.append(str(error)))  # type: ignore[attr-defined]
    page.asked = []  # type: ignore[attr-defined]
    page.on("request", lambda request: page.asked.append(request.url))  # type: ignore[attr-defined]
    page.goto(f"{served.url}/dashboard")
    yield page
    assert page.wrong == []  # type: ignore[attr-defined]
    context.close()


def live(served: Served) -> int:
    version: int = served.http.get("/v1/adapters/tone").json()["live"]
    return version


def use(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use").click()


def confirm(page: Page, name: str, why: str = "") -> None:
    page.get_by_label("Why").fill(why)
    page.get_by_role("dialog").get_by_role("button", name=name).click()


@browsing
def test_without_a_key_it_shows_nothing_and_asks_for_one(page):
    expect(page.get_by_role("alert")).to_contain_text("asks for a key")
    expect(page.locator("[data-adapter]")).to_have_count(0)
    use(page, "wrong")
    expect(page.get_by_role("alert")).to_contain_text("not one that this server issued")


@browsing
def test_canary_promote_and_rollback_from_the_page(page, served):
    use(page, ADMIN)
    tone = page.locator("[data-adapter=tone]")
    expect(tone.get_by_text("live: v1")).to_be_visible()
    expect(tone.get_by_text("5 requests in 30 min")).to_be_visible()
    expect(page.locator("#engine")).to_have_text("ready, 0 running")

    tone.get_by_role("button", name="Canary tone v2").click()
    page.get_by_label("Share of the traffic").fill("25")
    confirm(page, "Start canary", "try it")
    expect(tone.get_by_text("canary 25 %")).to_be_visible()
    assert served.http.get("/v1/adapters/tone").json()["canary"] == {"version": 2, "weight": 0.25}

    tone.get_by_role("button", name="End canary tone v2").click()
    confirm(page, "End canary")
    expect(tone.get_by_text("canary 25 %")).to_have_count(0)

    tone.get_by_role("button", name="Promote tone v2").click()
    page.get_by_role("button", name="Cancel").click()
    assert live(served) == 1
    tone.get_by_role("button", name="Promote tone v2").click()
    confirm(page, "Promote", "<b>it is better</b>")
    expect(tone.get_by_text("live: v2")).to_be_visible()
    expect(page.locator("#swaps")).to_contain_text("<b>it is better</b>")
    assert live(served) == 2

    tone.get_by_role("button", name="Roll back tone v2").click()
    confirm(page, "Roll back")
    expect(tone.get_by_text("live: v1")).to_be_visible()
    assert live(served) == 1
    expect(page.locator("#swaps li").first).to_contain_text("rolled back")


@browsing
def test_what_somebody_else_changed_meanwhile_is_a_sentence_and_no_second_change(page, served):
    use(page, ADMIN)
    page.get_by_role("button", name="Roll back tone v1").click()
    served.http.post("/v1/adapters/tone/promote", json={"version": 2})
    confirm(page, "Roll back")
    expect(page.get_by_role("alert")).to_contain_text("v2 of tone is live and not v1")
    assert live(served) == 2


@browsing
def test_a_tenant_sees_its_own_and_no_other(page, served, make_adapter):
    body = {"tenant": "acme", "name": "ci", "scopes": ["inference", "adapters:write"]}
    secret = served.http.post("/v1/keys", json=body).json()["secret"]
    mine = {"authorization": f"Bearer {secret}"}
    served.http.post("/v1/adapters", **upload(make_adapter(5), name="ours"), headers=mine).raise_for_status()
    use(page, secret)
    expect(page.locator("[data-adapter]")).to_have_count(1)
    expect(page.locator("[data-adapter=ours]")).to_be_visible()
    expect(page.locator("#engine")).to_be_hidden()
    expect(page.get_by_text("tone")).to_have_count(0)


@browsing
def test_the_key_is_in_no_address_and_no_storage_and_gone_with_the_page(page, served):
    use(page, ADMIN)
    expect(page.locator("[data-adapter=tone]")).to_be_visible()
    assert page.asked and all(url.startswith(served.url) and ADMIN not in url for url in page.asked)
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    assert ADMIN not in page.content() and page.get_by_label("API key").input_value() == ""
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("asks for a key")


@browsing
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_hangs_over_the_edge(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    use(page, ADMIN)
    expect(page.locator("[data-adapter=tone]")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
