"""Takes the pictures of the dashboard that README and docs show.

    python -m docs.make_screenshot

It plays `loradock demo` and photographs /dashboard in headless Chromium: while the bad version is a canary, on a
screen and on a phone in the dark; the playground; and the adapter's page once drift is found. A thousand adapters and
the first page are photographed over a server without an engine. The digest of the page's files is written beside the
pictures; a test compares it, so that pictures of another page than today's are noticed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from serve.adapters.adapter import Inspection
from serve.cli.demo.server import own_server
from serve.cli.demo.story import BAD, NAME, QUESTION, Story
from serve.cli.demo.traffic import Traffic
from serve.client.adapter_client import AdapterClient
from serve.config import load
from tests.support import tiny
from tests.support.app import CHAT, upload
from tests.support.known_backend import KnownBackend
from tests.support.served import Served
from tests.support.server import BASE, ROOT, done

PAGE = ROOT / "serve/api/dashboard"
IMAGES = ROOT / "docs/images"
PICTURE = IMAGES / "dashboard.png"
PICTURES = (
    PICTURE,
    *(IMAGES / f"dashboard-{name}.png" for name in ("phone", "thousand", "first-run", "drift", "playground")),
)
SCREEN: dict[str, Any] = {"viewport": {"width": 1220, "height": 900}, "color_scheme": "light"}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
# The canary's answers that are compared before its picture is taken.
COMPARED = 16
# Milliseconds in which three answers of the playground are there, beside the demo's customers on a busy machine.
ANSWERS = 300_000


def digest() -> str:
    """Of every file that the page is made of."""
    sha = hashlib.sha256()
    for file in sorted(path for path in PAGE.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")):
        sha.update(file.name.encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, chromium() as browser:
        with own_server() as url:
            live(browser, url, BASE)
        many(Path(temporary) / "many", browser)
    (IMAGES / "dashboard.sha256").write_text(digest() + "\n")


def live(browser: Browser, url: str, base: str) -> None:
    """The demo on that server."""
    with AdapterClient(url) as client, httpx.Client(base_url=url, timeout=120) as http:
        taken: list[str] = []

        def wait(seconds: float) -> None:
            time.sleep(seconds)
            report = client.drift(NAME).get("canary") or {}
            if not taken and report.get("requests", 0) >= COMPARED:
                taken.append("canary")
                canary(browser, url)

        story = Story(client, http, Traffic(url, None, NAME), print, wait)
        story.push_the_good_version(base)
        with story.traffic:
            story.let_it_work()
            story.try_the_bad_version()
            playground(browser, url)
            story.change_the_language()
            page = browser.new_page(**SCREEN)
            page.goto(f"{url}/dashboard#/adapters/{NAME}")
            page.locator(".alarm").first.wait_for()
            photograph(page, IMAGES / "dashboard-drift.png")
        assert taken, "the canary ended before its picture was taken"


def canary(browser: Browser, url: str) -> None:
    for picture, screen in ((PICTURE, SCREEN), (IMAGES / "dashboard-phone.png", PHONE)):
        page = browser.new_page(**screen)
        page.goto(f"{url}/dashboard")
        page.locator(f"[data-adapter={NAME}]").get_by_text("Canary:").wait_for()
        photograph(page, picture)
        page.close()


def playground(browser: Browser, url: str) -> None:
    page = browser.new_page(**SCREEN)
    page.goto(f"{url}/dashboard#/playground/{NAME}@v{BAD}")
    page.get_by_label("Prompt", exact=True).fill(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Good answer").nth(2).wait_for(timeout=ANSWERS)
    photograph(page, IMAGES / "dashboard-playground.png", height=640)
    page.close()


def many(folder: Path, browser: Browser) -> None:
    """No adapter, then a thousand, over a server without an engine."""
    folder.mkdir()
    config = load([str(tiny.model(folder)), "--name", "base", "--data-dir", str(folder / "data")], {})
    with Served(config, KnownBackend(config.model), "none") as served:
        page = browser.new_page(**SCREEN)
        page.goto(f"{served.url}/dashboard")
        page.locator("#command").wait_for()
        photograph(page, IMAGES / "dashboard-first-run.png", height=420)
        registry = served.app.state.parts.registry
        for number in range(997):
            inspection = Inspection(rank=8, base=None, target_modules=("q_proj",), nbytes=5 << 20, tensors=420)
            registry.add(f"customer-{number:03}", inspection, f"{number:064x}", by="ci")
        for seed, (name, requests) in enumerate((("support", 40), ("tone", 25), ("sql-helper", 12))):
            done(served.http.post("/v1/adapters", **upload(tiny.adapter(folder / name, seed), name=name)))
            for number in range(requests):
                status = 500 if name == "tone" and number % 5 == 0 else 200
                served.http.post(CHAT, json={"model": name, "messages": [], "known": {"status": status}})
        page.reload()
        page.locator("[data-adapter=support]").wait_for()
        photograph(page, IMAGES / "dashboard-thousand.png", height=1100)


@contextmanager
def chromium() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def photograph(page: Page, picture: Path, *, height: int | None = None) -> None:
    """What the window shows, of another height if need be; in 256 colors, so that the file stays small."""
    if height:
        page.set_viewport_size({"width": SCREEN["viewport"]["width"], "height": height})
    page.screenshot(path=picture)
    with Image.open(picture) as taken:
        few = taken.convert("RGB").quantize(256)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    main()
