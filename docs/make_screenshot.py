"""Takes the pictures of the dashboard that README and docs show.

    python -m docs.make_screenshot [SECONDS]

It starts `loradock serve smollm2`, pushes adapters with a golden set, starts a canary, promotes a version and rolls one
back, asks for SECONDS (150) from 8 streams, and photographs /dashboard in headless Chromium: on a screen, and on a
phone in the dark. A thousand adapters and the first page are photographed over a server without an engine. The digest
of the page's files is written beside the pictures; a test compares it, so that pictures of another page than today's
are noticed.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from serve.adapters.adapter import Inspection
from serve.config import load
from tests.support import tiny
from tests.support.app import CHAT, upload
from tests.support.known_backend import KnownBackend
from tests.support.lora import trained, variant
from tests.support.served import Served
from tests.support.server import ROOT, SMALL, WATCHED, Server, done

PAGE = ROOT / "serve/api/dashboard"
IMAGES = ROOT / "docs/images"
PICTURE = IMAGES / "dashboard.png"
PICTURES = (PICTURE, *(IMAGES / f"dashboard-{name}.png" for name in ("phone", "thousand", "first-run")))
SCREEN: dict[str, Any] = {"viewport": {"width": 1220, "height": 900}, "color_scheme": "light"}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
STREAMS = 8
NAMES = ("sql-helper", "support", "tone")
PROMOTED = {"sql-helper": 1, "support": 2, "tone": 1}  # versions that are pushed as live ones, one after another
TOPICS = ("a refund", "my invoice", "a parcel", "this query", "the index", "a slow join", "her letter", "our contract")
GOLDEN = [{"prompt": f"{number} plus 1 is", "regex": "[0-9]", "max_tokens": 8} for number in range(20)]
ASKS = ("Explain", "Summarize", "Rewrite", "Improve", "Check", "Translate", "Shorten", "Describe")


def digest() -> str:
    """Of every file that the page is made of."""
    sha = hashlib.sha256()
    for file in sorted(path for path in PAGE.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")):
        sha.update(file.name.encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


def main(seconds: float = 150.0) -> None:
    with tempfile.TemporaryDirectory() as temporary, chromium() as browser:
        folder = Path(temporary)
        live(folder / "live", browser, seconds)
        many(folder / "many", browser)
    (IMAGES / "dashboard.sha256").write_text(digest() + "\n")


def live(folder: Path, browser: Browser, seconds: float) -> None:
    """A real server with traffic."""
    folder.mkdir()
    with Server(folder / "data", folder / "log", *WATCHED, *SMALL) as server:
        push(server, folder)
        done(server.http.put("/v1/adapters/support/golden", json={"cases": GOLDEN}))
        finished = threading.Event()
        streams = [threading.Thread(target=ask, args=(server, number, finished)) for number in range(STREAMS)]
        for stream in streams:
            stream.start()
        time.sleep(seconds / 3)
        done(server.http.post("/v1/adapters/support/canary", json={"version": 3, "weight": 0.2, "why": "try it"}))
        server.promote("tone", 2)
        time.sleep(seconds / 3)
        done(server.http.post("/v1/adapters/tone/rollback", json={"why": "too terse"}))
        time.sleep(seconds / 3)
        for picture, screen in ((PICTURE, SCREEN), (IMAGES / "dashboard-phone.png", PHONE)):
            page = browser.new_page(**screen)
            page.goto(f"{server.url}/dashboard")
            page.locator("[data-adapter=support]").get_by_text("canary 20 %").wait_for()
            photograph(page, picture)
        finished.set()
        for stream in streams:
            stream.join()


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


def push(server: Server, folder: Path) -> None:
    """Two or three versions of each name; the first two of `support` are promoted in turn."""
    words = trained("alpha", "bravo", "charlie")
    strength = itertools.count(6)
    for name, word, versions in zip(NAMES, words.values(), (1, 3, 2), strict=True):
        for version in range(versions):
            adapter = variant(word, folder / f"{name}-{version}", scale=next(strength) / 100)
            done(server.upload(name, adapter, promote=version < PROMOTED[name]))


def ask(server: Server, number: int, finished: threading.Event) -> None:
    """One stream: a question after another, until it is over."""
    dice = random.Random(number)
    while not finished.is_set():
        question = f"{dice.choice(ASKS)} {dice.choice(TOPICS)}, {dice.randrange(1000)} for {dice.randrange(1000)}."
        name = dice.choices(NAMES, (2, 5, 3))[0]
        server.ask(name, question, tokens=dice.randrange(8, 48), user=f"user-{dice.random()}")
        time.sleep(dice.random() / 2)


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
    main(*map(float, sys.argv[1:]))
