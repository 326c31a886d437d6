"""The dashboard in a real browser over a real server: what it shows, what it does, and what it keeps to itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from safetensors.torch import save_file

from serve.adapters.adapter import Inspection
from serve.api.dashboard import pages
from serve.config import keys_hashed, load
from serve.rollout import policy
from serve.telemetry.rendered.dashboards import dashboards
from serve.telemetry.slo import DEFAULT_SLOS
from tests.serve.jobs.finetuning.conftest import examples
from tests.serve.loop.conftest import QUICK, Scores, Traffic
from tests.support import tiny
from tests.support.app import upload
from tests.support.backend import FakeBackend
from tests.support.served import Served
from tests.support.trainer import COMMAND
from tests.support.waiting import eventually

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
ADMIN = "an-admin-key"
PAGE = Path(pages.__file__).parent
FOUND = Inspection(rank=8, base="toy", target_modules=("q_proj",), nbytes=1234, tensors=4)

# A browser has a core to itself only now and then.
expect.set_options(timeout=30_000)

browsing = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: chromium-headless-shell)")


async def test_the_page_holds_nothing_and_lets_the_browser_go_nowhere_else(operator):
    del operator.headers["authorization"]
    scripts = [f"/dashboard/{file.name}" for file in PAGE.glob("*.js")]
    assert len(scripts) == 15
    for path in ("/dashboard", *scripts, "/dashboard/page.css", "/dashboard/icon.svg"):
        told = await operator.get(path)
        assert told.status_code == 200
        policy = told.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert told.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org/)", told.text), "an address of somebody else's"
        assert not re.search(r"innerHTML|localStorage|sessionStorage|cookie|eval\(|\sstyle=|\son\w+=\"", told.text)


async def test_the_front_door_leads_to_the_dashboard(operator):
    del operator.headers["authorization"]
    answer = await operator.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/dashboard")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(request: Any, tmp_path: Path, tiny_model: Path, make_adapter: Any) -> Iterator[Served]:
    """Parametrized, a server with more settings."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    table = torch.randn(tiny.VOCABULARY, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    save_file({"model.embed_tokens.weight": table}, model / "model.safetensors")
    config = load([str(model), "--name", "base", "--data-dir", str(tmp_path / "data")], {})
    settings = {"admin_keys": keys_hashed([ADMIN]), "max_restarts": 1, **getattr(request, "param", {})}
    config = replace(config, **settings)
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


def show(page: Page, view: str) -> None:
    page.get_by_role("tab", name=view).click()


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
    expect(page.get_by_role("status")).to_have_text("tone v2 is promoted.")
    show(page, "Changes")
    expect(page.locator("#swaps")).to_contain_text("<b>it is better</b>")
    show(page, "Adapters")
    assert live(served) == 2

    tone.get_by_role("button", name="Roll back tone v2").click()
    confirm(page, "Roll back")
    expect(tone.get_by_text("live: v1")).to_be_visible()
    assert live(served) == 1
    show(page, "Changes")
    expect(page.locator("#swaps li").first).to_contain_text("rolled back")


@browsing
def test_what_somebody_else_changed_meanwhile_is_a_sentence_and_no_second_change(page, served):
    served.http.post("/v1/adapters/tone/promote", json={"version": 2})
    use(page, ADMIN)
    page.get_by_role("button", name="Roll back tone v2").click()
    served.http.post("/v1/adapters/tone/promote", json={"version": 1})
    confirm(page, "Roll back")
    expect(page.get_by_role("alert")).to_contain_text("v1 of tone is live and not v2")
    assert live(served) == 1


@browsing
def test_roll_back_is_offered_only_where_there_is_something_to_go_back_to(page, served):
    use(page, ADMIN)
    tone = page.locator("[data-adapter=tone]")
    expect(tone.get_by_role("button", name="Promote tone v2")).to_be_visible()
    expect(page.get_by_role("button", name="Roll back")).to_have_count(0)
    served.http.post("/v1/adapters/tone/promote", json={"version": 2})
    page.reload()
    use(page, ADMIN)
    page.get_by_role("button", name="Roll back tone v2 to v1").click()
    expect(page.get_by_role("dialog")).to_contain_text("version 1, which was live before, answers again")


@browsing
def test_a_tenant_sees_its_own_and_no_other(page, served, make_adapter):
    body = {"tenant": "acme", "name": "ci", "scopes": ["inference", "adapters:write"]}
    secret = served.http.post("/v1/keys", json=body).json()["secret"]
    mine = {"authorization": f"Bearer {secret}"}
    served.http.post("/v1/adapters", **upload(make_adapter(5), name="ours"), headers=mine).raise_for_status()
    served.http.post("/v1/chat/completions", json={"model": "ours"}, headers=mine).raise_for_status()
    use(page, secret)
    expect(page.locator("[data-adapter]")).to_have_count(1)
    expect(page.locator("[data-adapter=ours]")).to_be_visible()
    expect(page.get_by_role("tab", name="Engines")).to_be_hidden()
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
def test_a_wrong_key_says_so_and_takes_away_what_the_right_one_showed(page):
    use(page, ADMIN)
    expect(page.locator("[data-adapter=tone]")).to_be_visible()
    use(page, "wrong")
    expect(page.get_by_role("alert")).to_contain_text("The key is refused: the API key is not one that this server")
    expect(page.locator("[data-adapter=tone]")).to_be_hidden()
    expect(page.get_by_label("API key")).to_have_attribute("aria-invalid", "true")
    use(page, ADMIN)
    expect(page.locator("[data-adapter=tone]")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


@browsing
def test_the_first_page_has_the_push_command_for_this_very_server(page, served):
    served.http.delete("/v1/adapters/tone").raise_for_status()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    use(page, ADMIN)
    command = f"loradock adapters push my-adapter ./my-adapter --url {served.url}"
    expect(page.locator("#command")).to_have_text(command)
    expect(page.locator("#command-curl")).to_contain_text("Bearer $LORADOCK_KEY")
    expect(page.locator("#listed")).to_be_hidden()
    page.locator("#copy").click()
    expect(page.get_by_role("status")).to_have_text(re.compile("Copied|Ctrl"))
    assert command in (page.evaluate("getSelection().toString()"), page.evaluate("navigator.clipboard.readText()"))


@browsing
def test_a_failed_engine_says_why_is_started_again_from_here_and_nothing_looks_green_below_it(page, served):
    backend = served.app.state.parts.fleet.first.backend
    backend.prepare = lambda heir: setattr(heir, "wont_start", "there is no memory left")
    backend.dead = True
    assert eventually(lambda: served.http.get("/v1/engines").json()["data"][0]["phase"] == "failed")
    use(page, ADMIN)
    expect(page.get_by_role("alert")).to_contain_text("The engine base is failed. 2 deaths within 600 s")
    expect(page.get_by_role("alert")).to_contain_text("there is no memory left")
    expect(page.locator("[data-adapter=tone]").get_by_text("engine base is down")).to_be_visible()
    expect(page.locator(".good")).to_have_count(0)
    show(page, "Engines")
    expect(page.locator("[data-engine=base]")).to_contain_text("there is no memory left")
    expect(page.locator(".good")).to_have_count(0)
    for each in (backend, *backend.heirs):
        each.prepare = lambda heir: None
    page.get_by_role("alert").get_by_role("button", name="Restart the engine base").click()
    page.get_by_role("button", name="Cancel").click()
    assert served.http.get("/v1/engines").json()["data"][0]["phase"] == "failed"
    page.get_by_role("alert").get_by_role("button", name="Restart the engine base").click()
    expect(page.get_by_role("dialog").get_by_label("Why")).to_be_hidden()
    page.get_by_role("dialog").get_by_role("button", name="Restart").click()
    expect(page.locator("#engine")).to_have_text("ready, 0 running", timeout=20_000)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("[data-engine=base]").get_by_text("ready", exact=True)).to_be_visible(timeout=30_000)


@browsing
def test_canary_and_golden_evidence_stand_beside_their_thresholds(page, served):
    backend = served.app.state.parts.fleet.first.backend
    backend.say = lambda body: "yes"
    cases = [{"prompt": f"Question {number}", "contains": "yes", "max_tokens": 4} for number in range(5)]
    served.http.put("/v1/adapters/tone/golden", json={"cases": cases}).raise_for_status()
    served.http.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5}).raise_for_status()
    for number in range(8):
        served.http.post("/v1/chat/completions", json={"model": "tone", "user": str(number)}).raise_for_status()
    known = served.app.state.parts.golden.results.known
    versions = served.app.state.parts.registry.versions("tone")
    assert eventually(lambda: all((now := known(each)) and now.complete for each in versions))
    use(page, ADMIN)
    tone = page.locator("[data-adapter=tone]")
    expect(tone.get_by_text("Golden score 100 %, 57 % to 100 % with 95 % confidence, 5 cases")).to_have_count(2)
    expect(tone.get_by_text(re.compile("Canary: v2 (looks fine so far, after|has just begun)"))).to_be_visible()
    expect(tone.get_by_text("Golden set: v2 scores 100 %, v1 100 %, on")).to_be_visible()
    assert "(ln)" not in tone.inner_text()
    row = tone.get_by_role("row", name=re.compile("inter token"))
    expect(row).to_have_count(0)  # statistics come on request, and stay
    tone.get_by_text("Statistics").nth(2).click()
    expect(row).to_contain_text(re.compile("none|of the"))
    show(page, "Changes")
    show(page, "Adapters")
    expect(row).to_be_visible()
    expect(tone.get_by_role("meter", name="Evidence: error")).to_have_attribute("aria-valuenow", re.compile(r"\d+"))


@browsing
def test_drift_is_shown_against_its_threshold_with_what_moved(page, served, monkeypatch):
    signal = {
        "phase": "watching", "reference_requests": 500, "reference_needed": 500, "log_evidence": 12.5,
        "log_threshold": 11.5129, "alarmed": True, "since": "2026-11-25T10:00:00Z", "effects": {"rank_shift": 0.31},
    }  # fmt: skip
    gathering = {**signal, "reference_requests": 20, "alarmed": False, "log_evidence": None, "since": None}
    report = {
        "version": "v1",
        "signals": {"prompt": signal, "output": gathering},
        "alarms": {"prompt": {"text": "<i>another language</i>"}},
    }
    monkeypatch.setattr(served.app.state.parts.drift_monitor, "report", lambda full: [report])
    use(page, ADMIN)
    tone = page.locator("[data-adapter=tone]")
    expect(tone.get_by_text("Drift, prompt: <i>another language</i>")).to_be_visible()
    tone.get_by_text("Statistics").first.click()
    expect(
        tone.get_by_text("evidence 268,000 of the 100,000 that it takes; rank shift 0.31; since 2026")
    ).to_be_visible()
    expect(tone.get_by_text("output: 20 of 500 requests for a reference")).to_be_visible()
    expect(tone.get_by_role("meter", name="Evidence of drift: prompt")).to_have_attribute("aria-valuenow", "100")


@browsing
def test_why_requests_are_not_counted_for_drift_is_said(page, served, monkeypatch):
    signal = {"phase": "gathering", "reference_requests": 0, "reference_needed": 1000, "log_evidence": 0.0}
    signal |= {"log_threshold": 11.5, "alarmed": False, "since": None, "effects": {}}
    counts = {"accepted": 0, "repeated": 0, "near_duplicate": 16, "same_conversation": 0, "warming_up": 30}
    report = {"version": "v1", "signals": {"prompt": signal}, "alarms": {}, "thinning": counts}
    monkeypatch.setattr(served.app.state.parts.drift_monitor, "report", lambda full: [report])
    use(page, ADMIN)
    expect(page.locator("[data-adapter=tone]")).to_contain_text(
        "Drift: learning what is usual, 0 of 1,000 requests so far; 46 seen, 0 counted, because 30 are among the first "
        "64, which are never counted and 16 are nearly the same as earlier ones."
    )


@browsing
def test_an_alarm_has_an_address_and_is_dealt_with_there(page, served, monkeypatch):
    parts, done = served.app.state.parts, []
    signal = {"phase": "watching", "reference_requests": 9, "reference_needed": 9, "log_evidence": 12.5}
    signal |= {"log_threshold": 11.5, "alarmed": True, "since": "2026-11-25T10:00:00Z", "effects": {}}
    report = {"version": "v1", "signals": {"prompt": signal}, "alarms": {"prompt": {"text": "probably German"}}}
    monkeypatch.setattr(parts.drift_monitor, "report", lambda full: [] if done else [report])
    for name in ("accept", "acknowledge"):
        monkeypatch.setattr(parts.drift_monitor, name, lambda *_, what=name, **__: done.append(what))
    use(page, ADMIN)
    page.get_by_role("link", name="Drift, prompt").click()
    assert page.url.endswith("#/alarms/tone@v1/prompt")
    alarm = page.locator("[id='alarm-tone-v1-prompt']")
    expect(alarm).to_be_focused()
    alarm.get_by_role("button", name="It is here to stay: prompt of tone v1").click()
    confirm(page, "It is here to stay", "the German shop")
    expect(page.get_by_role("status")).to_have_text("The drift of tone v1 is accepted.")
    expect(page.get_by_role("list", name="History of tone")).to_contain_text("the German shop")
    expect(alarm).to_have_count(0)
    assert done == ["accept"]


@browsing
def test_each_view_and_adapter_has_an_address_and_the_back_button_goes_back(page, served):
    use(page, ADMIN)
    page.get_by_role("link", name="tone", exact=True).click()
    assert page.url.endswith("/dashboard#/adapters/tone")
    history = page.get_by_role("list", name="History of tone")
    expect(history).to_contain_text("promoted")
    expect(page.locator("#single")).to_contain_text(re.compile(r"In \d{4}-\d\d: \d+ requests, \d+ tokens generated\."))
    expect(page.locator("[data-adapter=tone]")).to_have_count(1)
    assert page.title() == "tone loradock"
    show(page, "Changes")
    assert page.url.endswith("#/changes")
    page.go_back()
    expect(history).to_be_visible()
    page.get_by_role("link", name="All adapters").click()
    expect(page.get_by_label("Search by name")).to_be_visible()
    page.goto(f"{served.url}/dashboard#/adapters/nobody")
    expect(page.get_by_text("There is no adapter nobody.")).to_be_visible()
    page.goto(f"{served.url}/dashboard#/loops")
    expect(page.get_by_role("tabpanel", name="Loops")).to_be_visible()


@browsing
@pytest.mark.parametrize("served", [{"admin_keys": ()}], indirect=True)
def test_a_server_without_keys_asks_for_none_and_says_how_it_does(page):
    now = page.locator("#now")
    expect(now).to_contain_text("Requests/s")
    expect(now).to_contain_text("0 of 5")
    expect(now).to_contain_text("0 waiting")
    expect(now).to_contain_text("The server started at")
    expect(page.get_by_label("API key")).to_be_hidden()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("#rest-title")).to_be_hidden()


@browsing
@pytest.mark.parametrize("served", [{"grafana_url": "https://grafana.example/ops/"}], indirect=True)
def test_numbers_and_adapters_link_to_their_panels_in_grafana(page, served):
    served.http.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.1}).raise_for_status()
    use(page, ADMIN)
    grafana = "https://grafana.example/ops/d"
    errors = page.get_by_role("link", name="Errors: Errors in Grafana")
    expect(errors).to_have_attribute("href", f"{grafana}/loradock-overview?viewPanel=5")
    adapter = page.get_by_role("link", name="Grafana: adapter tone")
    expect(adapter).to_have_attribute("href", f"{grafana}/loradock-adapters?var-adapter=tone")
    canary = page.get_by_role("link", name="Grafana: canary of tone")
    expect(canary).to_have_attribute("href", f"{grafana}/loradock-swap?var-adapter=tone&var-old=v1&var-new=v2")
    boards = page.locator("#now a[href$=usage]")
    expect(boards).to_have_attribute("href", f"{grafana}/loradock-usage")


@browsing
def test_without_a_grafana_nothing_speaks_of_it(page):
    use(page, ADMIN)
    expect(page.locator("[data-adapter=tone]")).to_be_visible()
    expect(page.get_by_text("Grafana")).to_have_count(0)


def test_the_panels_that_the_page_links_to_are_there_whatever_the_objectives():
    script = (PAGE / "grafana.js").read_text()
    links = re.findall(r'\["(loradock-\w+)", (\d+), "([^"]+)"\]', script)
    (names,) = re.findall(r"DASHBOARDS = \[(.*?)\]", script)
    for slos in (DEFAULT_SLOS, ()):
        boards = {board["uid"]: board for board in dashboards(slos)}
        assert {f"loradock-{name}" for name in re.findall(r'"(\w+)"', names)} == set(boards)
        for uid, number, title in links:
            assert {panel["id"]: panel["title"] for panel in boards[uid]["panels"]}[int(number)] == title
        variables = {uid: {each["name"] for each in board["templating"]["list"]} for uid, board in boards.items()}
        assert {"adapter", "old", "new"} <= variables["loradock-swap"]
        assert "adapter" in variables["loradock-adapters"] & variables["loradock-drift"]
    assert len(links) == 5


@browsing
def test_the_playground_asks_base_live_and_candidate_side_by_side_and_takes_ratings(page, served):
    backend = served.app.state.parts.fleet.first.backend
    backend.say = lambda body: f"{body['messages'][0]['content']}, says <i>{body['model'][:4]}</i>"
    use(page, ADMIN)
    page.get_by_role("link", name="Ask tone v2").click()
    assert page.url.endswith("#/playground/tone@v2")
    page.get_by_label("Prompt", exact=True).fill("Hello")
    page.keyboard.press("Control+Enter")
    for title, text in (("Base model", "base"), ("Live, v1", "tone"), ("Candidate, v2", "tone")):
        column = page.get_by_role("region", name=title)
        expect(column).to_contain_text(f"Hello, says <i>{text}</i>")
        expect(column).to_contain_text("first token after")
    candidate = page.get_by_role("region", name="Candidate, v2")
    candidate.get_by_role("button", name="Bad answer: Candidate, v2").click()
    expect(candidate).to_contain_text("rated bad")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.get_by_role("combobox", name="Candidate").select_option("")
    expect(page.get_by_role("region")).to_have_count(2)
    page.get_by_role("combobox", name="Adapter").fill("nobody")
    page.get_by_label("Prompt", exact=True).focus()
    expect(page.get_by_text("There is no adapter nobody.")).to_be_visible()


@browsing
def test_a_question_asked_at_once_waits_for_its_columns_and_another_adapter_stays_chosen(page, served, make_adapter):
    served.http.post("/v1/adapters", **upload(make_adapter(2), name="other", promote="true"))
    backend = served.app.state.parts.fleet.first.backend
    backend.say = lambda body: f"{body['messages'][0]['content']}, says {body['model'][:4]}"
    use(page, ADMIN)
    overviews: list[Route] = []
    page.route("**/v1/overview*", lambda route: overviews.append(route))
    page.get_by_role("link", name="Ask tone v2").click()
    page.get_by_label("Prompt", exact=True).fill("Hello")
    page.keyboard.press("Control+Enter")
    assert eventually(lambda: page.wait_for_timeout(20) or overviews)
    page.unroute("**/v1/overview*")  # and what was held goes on
    expect(page.get_by_role("region", name="Candidate, v2")).to_contain_text("Hello, says tone")
    page.get_by_role("combobox", name="Adapter").fill("other")
    page.get_by_label("Prompt", exact=True).focus()
    expect(page.get_by_role("region")).to_have_count(2)
    with page.expect_response("**/v1/overview*"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(100)
    assert page.get_by_role("combobox", name="Adapter").input_value() == "other"


@browsing
def test_one_outlier_does_not_flatten_a_chart_and_says_what_it_is(page):
    code = """async (requests) => {
        const { scales, requestsChart } = await import("/dashboard/charts.js"), none = requests.map(() => null);
        const recent = { from: 0, requests, errors: requests.map(() => 0), first_token_p95: none,
            all: { requests: 9, errors: 0 } };
        const scale = scales([{ versions: [{ recent }] }]);
        return [scale.requests, requestsChart(recent, scale).querySelector(".over")?.textContent ?? ""];
    }"""
    usual = [3, 4, 5, 4, 3, 4, 5, 4, 3, 4]
    assert page.evaluate(code, usual) == [5, ""]
    top, over = page.evaluate(code, [*usual, 400])
    assert top == 10 and over.endswith("400")
    assert page.evaluate(code, [1, 1, 400])[0] == 500  # too few to call one an outlier


@browsing
def test_charts_have_axes_units_and_quantiles_that_say_of_what(page, served):
    use(page, ADMIN)
    tone = page.locator("[data-adapter=tone]")
    expect(tone.get_by_text("first token of 5 answers: 50 % within")).to_be_visible()
    chart = tone.get_by_role("img", name=re.compile("Requests a minute, the last 30 minutes: 5 requests, 0 failed"))
    expect(chart).to_contain_text("−30 min")
    expect(chart).to_contain_text("now")
    tokens = tone.get_by_role("img", name=re.compile("Time to the first token, the last 30 minutes: half within"))
    expect(tokens).to_contain_text("ms")
    assert chart.locator("rect").count() >= 1


@browsing
def test_of_a_thousand_adapters_the_page_shows_what_matters_and_finds_the_rest(page, served):
    for number in range(1000):
        served.app.state.parts.registry.add(f"adapter-{number:04}", FOUND, f"{number:064x}", by="ada")
    sizes: list[int] = []
    page.on("response", lambda response: sizes.append(len(response.body())))
    page.reload()
    use(page, ADMIN)
    expect(page.locator("[data-adapter=tone]")).to_be_visible()
    expect(page.locator("#summary")).to_have_text("1,001 adapters, 0 with problems, 1 with traffic")
    expect(page.locator("[data-row]")).to_have_count(50)
    assert sum(sizes) < 500_000
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#place")).to_have_text("51 to 100 of 1,000")
    expect(page.locator("[data-row]").first).to_contain_text("adapter-0050")
    page.get_by_label("Search by name").fill("0777")
    expect(page.locator("[data-row]")).to_have_count(1)
    expect(page.get_by_role("status")).to_have_text("1 adapter found.")
    page.get_by_role("button", name="Details of adapter-0777").press("Enter")
    expect(page.locator("[data-adapter=adapter-0777]")).to_contain_text("No requests in the last 30 minutes.")
    expect(page.get_by_role("button", name="Details of adapter-0777")).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("button", name="Details of adapter-0777")).to_be_focused()
    page.get_by_label("Search by name").fill("no such")
    expect(page.get_by_text("No adapter has such a name.")).to_be_visible()


@browsing
def test_old_versions_are_folded(page, served):
    for version in range(60):
        served.app.state.parts.registry.add("tone", FOUND, f"{version:064x}", by="ada", promote=False)
    use(page, ADMIN)
    versions = page.locator("[data-adapter=tone] .version")
    expect(versions).to_have_count(2)  # the live one and the newest
    held: list[Route] = []
    page.route(re.compile("before="), lambda route: held.append(route))
    for _ in range(2):  # before there is an answer
        page.get_by_role("button", name="Show older versions of tone").click()
    assert eventually(lambda: page.wait_for_timeout(20) or len(held) == 2)
    for route in held:
        route.continue_()
    page.unroute(re.compile("before="))
    expect(versions).to_have_count(21)  # the newest is among the twenty
    for count in (41, 61, 62):
        page.get_by_role("button", name="Show older versions of tone").click()
        expect(versions).to_have_count(count)
    expect(page.get_by_role("button", name="Show older versions of tone")).to_have_count(0)


@browsing
def test_tabs_go_by_the_arrow_keys_and_each_control_has_a_name(page):
    use(page, ADMIN)
    page.get_by_role("tab", name="Adapters").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Changes")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Changes")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel", name="Engines")).to_contain_text("Answers under way")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Adapters")).to_be_focused()
    problems = page.evaluate("""() => {
        const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
        const twice = ids.filter((id, at) => ids.indexOf(id) !== at);
        const named = (element) => element.getAttribute("aria-label") || element.textContent.trim()
            || (element.labels && element.labels[0] && element.labels[0].textContent);
        const levels = [...document.querySelectorAll("h1, h2, h3")].filter((element) => element.checkVisibility())
            .map((element) => Number(element.tagName[1]));
        const skipped = levels.filter((level, at) => level > (levels[at - 1] ?? 0) + 1).map((level) => `h${level}`);
        const controls = "body > :not(dialog) button, input, textarea, select, svg[role], table";
        const nameless = [...document.querySelectorAll(controls)]
            .filter((element) => !named(element)).map((element) => element.outerHTML);
        const lost = [...document.querySelectorAll("[aria-controls], [aria-labelledby]")].filter((element) =>
            !document.getElementById(element.getAttribute("aria-controls") ?? element.getAttribute("aria-labelledby")))
            .map((element) => element.outerHTML);
        return [...twice, ...nameless, ...lost, ...skipped];
    }""")
    assert problems == []


@browsing
def test_what_does_not_change_is_not_drawn_again(page, served):
    """A reader keeps their place, and a screen reader is not told the same again."""
    told: list[str] = []
    overview = re.compile("/v1/overview[?]")

    def same(route: Route) -> None:
        """The first answer again: minutes pass, and with them what the last thirty of them were."""
        told.append(told[0] if told else route.fetch().text())
        route.fulfill(body=told[-1], content_type="application/json")

    page.route(overview, same)
    use(page, ADMIN)
    button = page.get_by_role("button", name="Promote tone v2")
    button.focus()
    page.evaluate("document.querySelector('[data-adapter=tone]').dataset.mine = 'yes'")
    show(page, "Changes")
    expect(page.locator("#swaps li").first).to_be_visible()  # drawn after the adapters, of the same answers
    show(page, "Adapters")
    expect(page.locator("[data-mine=yes]")).to_be_visible()
    page.unroute(overview)
    served.http.post("/v1/adapters/tone/promote", json={"version": 2}).raise_for_status()
    show(page, "Changes")
    show(page, "Adapters")
    expect(page.locator("[data-mine=yes]")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_they_stand_on(scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least."""
    css = (PAGE / "page.css").read_text()
    blocks = re.findall(r":root \{([^}]*)\}", css)
    colors = {name: value for block in blocks[: 1 + (scheme == "dark")]
              for name, value in re.findall(r"--([\w-]+): (#\w{6})", block)}  # fmt: skip
    for text in ("text", "muted", "good", "warn", "bad", "accent"):
        for back in ("back", "card"):
            assert contrast(colors[text], colors[back]) >= 4.5, (text, back)
    assert contrast(colors["on-accent"], colors["accent"]) >= 4.5


def contrast(first: str, second: str) -> float:
    dark, bright = sorted(map(luminance, (first, second)))
    return (bright + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@browsing
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_hangs_over_the_edge(page, served, width):
    served.app.state.parts.registry.add("quiet", FOUND, f"{1:064x}", by="ada")
    served.http.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5}).raise_for_status()
    page.set_viewport_size({"width": width, "height": 800})
    use(page, ADMIN)
    expect(page.locator("[data-adapter=tone]")).to_be_visible()
    page.get_by_role("button", name="Details of quiet").click()
    expect(page.locator("[data-adapter=quiet]")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for view in ("Changes", "Loops", "Playground", "Engines"):
        show(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@browsing
def test_jobs_with_their_losses_are_paused_resumed_and_cancelled_from_the_page(page, served, monkeypatch):
    process = served.app.state.parts.fine_tuning.runner.process
    process.command, process.nice = COMMAND, 0
    monkeypatch.setattr("serve.jobs.finetuning.training_process.SAVE_SECONDS", 0.1)
    monkeypatch.setattr("serve.jobs.finetuning.trainer.WRITE_SECONDS", 0.1)

    def begun(name: str, **how: Any) -> str:
        monkeypatch.setenv("STAND_IN", json.dumps(how))
        sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("train.jsonl", examples())}}
        file = served.http.post("/v1/files", **sent).json()["id"]
        asked = {"model": "base", "training_file": file, "suffix": name}
        return str(served.http.post("/v1/fine_tuning/jobs", json=asked).json()["id"])

    def status(id: str) -> str:
        return str(served.http.get(f"/v1/fine_tuning/jobs/{id}").json()["status"])

    made = begun("polite")
    assert eventually(lambda: status(made) == "succeeded")
    stuck = begun("terse", hang=4)
    assert eventually(lambda: len(served.http.get(f"/v1/fine_tuning/jobs/{stuck}/events").json()["data"]) >= 7)
    use(page, ADMIN)
    show(page, "Jobs")
    row = page.locator(f"[data-job={made}]")
    expect(row.get_by_text("succeeded")).to_be_visible()
    result = "polite@v1"
    expect(row.get_by_text(result)).to_be_visible()
    page.get_by_role("button", name=f"Details of {made}").click()
    card = page.locator(f"[data-card={made}]")
    expect(card.get_by_role("img")).to_have_accessible_name("Loss by step: training 2 → 0.333")
    expect(card.get_by_role("table", name="Checkpoints").get_by_role("row").nth(1)).to_be_visible()
    expect(card.get_by_text("The job has successfully completed")).to_be_visible()
    assert page.url.endswith(f"#/jobs/{made}")
    expect(card.get_by_role("link", name=f"Ask {result}")).to_have_attribute("href", f"#/playground/{result}")
    saved: list[str] = []
    page.on("download", lambda download: saved.append(download.suggested_filename))
    card.get_by_role("button", name=f"Download {result}").click()
    expect(page.get_by_role("status")).to_have_text(f"{result} is downloaded.")
    assert saved == ["adapter_config.json", "adapter_model.safetensors"]
    card.get_by_role("button", name=f"Promote {result}").click()
    confirm(page, "Promote", "it is polite")
    expect(page.get_by_role("status")).to_have_text("polite v1 is promoted.")
    assert served.http.get("/v1/adapters/polite").json()["live"] == 1

    page.get_by_role("button", name=f"Details of {stuck}").click()
    card = page.locator(f"[data-card={stuck}]")
    expect(card.get_by_text("Step 3/6: training loss=0.67")).to_be_visible()
    for verb, done in (("Pause", "paused"), ("Resume", "resumed"), ("Cancel", "cancelled")):
        card.get_by_role("button", name=f"{verb} {stuck}").click()
        page.get_by_role("dialog").get_by_role("button", name=f"{verb} job").click()
        expect(page.get_by_role("status")).to_have_text(f"{stuck} is {done}.")
    assert status(stuck) == "cancelled"
    expect(page.locator(f"[data-job={stuck}]").get_by_text("cancelled")).to_be_visible()
    expect(card.get_by_role("button")).to_have_count(0)


LOOPING = {"policies": policy.parse({"*": {"train_on_traffic": True, "loop": {**QUICK, "promote": "ask"}}})}


@pytest.fixture
def looping(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Training is a stand-in's, traffic and scores are made up; what is looked at now and then is looked at soon."""
    monkeypatch.setattr("serve.jobs.schedule.LOOK_SECONDS", 0.03)
    for name in ("LOOK_SECONDS", "GATHER_SECONDS", "RETRY_SECONDS"):
        monkeypatch.setattr(f"serve.loop.driver.{name}", 0.03)
    parts = served.app.state.parts
    parts.fine_tuning.runner.process.command, parts.fine_tuning.runner.process.nice = COMMAND, 0
    parts.loops.driver.gatekeeper.scorer = Scores()
    parts.loops.driver.gatekeeper.scorer.hold.set()
    parts.loops.candidates.gather = Traffic()
    parts.loops.rows.made("tone")
    return served


def phase(served: Served) -> str:
    return str(served.http.get("/v1/adapters/tone/loop").json()["phase"])


@browsing
@pytest.mark.parametrize("served", [LOOPING], indirect=True)
def test_a_loop_is_seen_from_what_opened_it_to_a_persons_yes(page, looping):
    backend = looping.app.state.parts.fleet.first.backend
    backend.generation = replace(backend.generation, text="no")
    backend.say = lambda body: f"{body['model']} says <i>yes</i>"
    for number in range(3):
        body = {"model": "tone", "messages": [{"role": "user", "content": f"tell me of {number * 104_729}"}]}
        looping.http.post("/v1/chat/completions", json=body).raise_for_status()
    kept = "/v1/adapters/tone/data/conversations"
    assert eventually(lambda: len(looping.http.get(kept).json()["data"]) >= 3)
    use(page, ADMIN)
    show(page, "Loops")
    row = page.locator("[data-loop=tone]")
    expect(row.get_by_text("waiting", exact=True)).to_be_visible()
    expect(row.get_by_text("0 of 2")).to_be_visible()
    page.get_by_role("button", name="Details of the loop of tone").click()
    card = page.locator("[data-card=tone]")
    card.get_by_role("button", name="Open a try: the loop of tone").click()
    page.get_by_role("dialog").get_by_role("button", name="Open a try").click()
    assert eventually(lambda: phase(looping) == "asking")
    page.get_by_role("tab", name="Loops").click()
    expect(row.get_by_text("asking", exact=True)).to_be_visible()
    expect(page.locator("#loops-summary")).to_have_text("1 loop, 1 waiting for a yes")
    steps = card.get_by_role("list", name="Steps of try 1")
    for step in ("opened", "training", "gate", "asks"):
        expect(steps.get_by_text(step, exact=True)).to_be_visible()
    expect(card.get_by_role("img", name=re.compile("Loss by step: training 2"))).to_be_visible()
    part = card.get_by_role("table", name="Gate of try 1").get_by_role("row", name=re.compile("new traffic"))
    for text in ("30", "0.3", "0.9", "passed"):
        expect(part.get_by_text(text, exact=True)).to_be_visible()
    expect(part.get_by_role("meter")).to_have_attribute("aria-valuenow", "100")
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    version = looping.http.get("/v1/adapters/tone/loop").json()["tries"][0]["candidate"]
    card.get_by_role("button", name=f"Compare answers of tone v{version}").click()
    page.get_by_role("dialog").get_by_role("button", name="Compare").click()
    table = card.get_by_role("table", name=f"Answers of v1 and v{version}")
    expect(table.get_by_role("row", name=re.compile("tell me of 104729"))).to_contain_text("says <i>yes</i>")
    expect(card.get_by_text("of 3 captured requests are answered the same")).to_be_visible()

    card.get_by_role("button", name="Say yes: the loop of tone").click()
    page.get_by_role("dialog").get_by_role("button", name="Say yes").click()
    assert eventually(lambda: phase(looping) == "waiting")
    page.get_by_role("tab", name="Loops").click()
    expect(card.get_by_text("promoted", exact=True).first).to_be_visible()
    reference = card.get_by_role("table", name="References of tone").get_by_role("row", name=f"v{version}")
    expect(reference).to_contain_text("0.9")
    assert live(looping) == version
    expect(card.get_by_role("button", name="Compare answers")).to_have_count(0)


@browsing
@pytest.mark.parametrize("served", [LOOPING], indirect=True)
def test_a_no_and_the_kill_switch_of_one_loop_and_of_all(page, looping):
    looping.http.post("/v1/adapters/tone/loop/run").raise_for_status()
    assert eventually(lambda: phase(looping) == "asking")
    use(page, ADMIN)
    show(page, "Loops")
    page.get_by_role("button", name="Details of the loop of tone").click()
    card, row = page.locator("[data-card=tone]"), page.locator("[data-loop=tone]")
    card.get_by_role("button", name="End the try: the loop of tone").click()
    confirm(page, "End the try", "too terse")
    assert eventually(lambda: phase(looping) == "waiting")
    page.get_by_role("tab", name="Loops").click()
    expect(card.get_by_text("too terse").first).to_be_visible()
    assert live(looping) == 1

    for verb, shown in (("Stop", "stopped"), ("Start", "waiting")):
        page.get_by_role("button", name=f"{verb} every loop").click()
        page.get_by_role("dialog").get_by_role("button", name=f"{verb} all").click()
        expect(row.get_by_text(shown, exact=True)).to_be_visible()
    card.get_by_role("button", name="Stop: the loop of tone").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    expect(row.get_by_text("stopped", exact=True)).to_be_visible()
    expect(card.get_by_role("button", name="Open a try")).to_have_count(0)
    card.get_by_role("button", name="Start: the loop of tone").click()
    page.get_by_role("dialog").get_by_role("button", name="Start").click()
    expect(row.get_by_text("waiting", exact=True)).to_be_visible()


@browsing
@pytest.mark.parametrize("served", [LOOPING], indirect=True)
def test_a_tenant_stops_its_own_loops_and_no_others(page, looping, make_adapter):
    body = {"tenant": "acme", "name": "ci", "scopes": ["inference", "adapters:write"]}
    secret = looping.http.post("/v1/keys", json=body).json()["secret"]
    mine = {"authorization": f"Bearer {secret}"}
    looping.http.post("/v1/adapters", **upload(make_adapter(5), name="ours"), headers=mine).raise_for_status()
    looping.http.post("/v1/adapters/ours/loop/run", headers=mine).raise_for_status()
    use(page, secret)
    show(page, "Loops")
    expect(page.locator("[data-loop]")).to_have_count(1)
    expect(page.locator("[data-loop=ours]")).to_be_visible()
    expect(page.get_by_role("button", name="Stop every loop")).to_have_count(0)
    use(page, ADMIN)
    expect(page.locator("[data-loop]")).to_have_count(2)
    assert eventually(lambda: looping.http.get("/v1/adapters/acme/ours/loop").json()["phase"] == "asking")
    page.get_by_role("button", name="Details of the loop of acme/ours").click()
    expect(page.locator("[data-card='acme/ours']").get_by_role("table", name="Gate of try 1")).to_be_visible()
