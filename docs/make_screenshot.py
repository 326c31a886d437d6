"""Takes the picture of the dashboard that the README shows: a live server, three adapters, real traffic.

    python -m docs.make_screenshot [SECONDS]

It starts `loradock serve smollm2`, pushes adapters, starts a canary, promotes a version and rolls one back, asks for
SECONDS (150) from 8 streams, and photographs /dashboard in headless Chromium. The digest of the page's files is written
beside the picture; a test compares it, so that a picture of another page than today's is noticed.
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
from pathlib import Path

from tests.support.lora import trained, variant
from tests.support.server import ROOT, SMALL, WATCHED, Server, done

PAGE = ROOT / "serve/api/dashboard"
PICTURE = ROOT / "docs/images/dashboard.png"
STREAMS = 8
NAMES = ("sql-helper", "support", "tone")
PROMOTED = {"sql-helper": 1, "support": 2, "tone": 1}  # versions that are pushed as live ones, one after another
TOPICS = ("a refund", "my invoice", "a parcel", "this query", "the index", "a slow join", "her letter", "our contract")
ASKS = ("Explain", "Summarize", "Rewrite", "Improve", "Check", "Translate", "Shorten", "Describe")


def digest() -> str:
    """Of every file that the page is made of."""
    sha = hashlib.sha256()
    for file in sorted(path for path in PAGE.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")):
        sha.update(file.name.encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


def main(seconds: float = 150.0) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with Server(folder / "data", folder / "log", *WATCHED, *SMALL) as server:
            push(server, folder)
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
            photograph(server.url)
            finished.set()
            for stream in streams:
                stream.join()
    (PICTURE.parent / "dashboard.sha256").write_text(digest() + "\n")


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


def photograph(url: str) -> None:
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 860}, color_scheme="light")
        page.goto(f"{url}/dashboard")
        page.locator("[data-adapter=support]").get_by_text("canary 20 %").wait_for()
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
