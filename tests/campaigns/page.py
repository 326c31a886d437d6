"""How soon the dashboard shows a thousand adapters in a real browser, and how many bytes that takes.

    python -m tests.campaigns.page [--adapters 1000] [--rounds 10]

A server over an engine that costs nothing, 30 of the adapters with traffic. Timed from the browser's request for the
page until its cards and the table's rows are there; a new browser context, so nothing is cached, and the key is typed
at once. The bytes are those of all bodies until then. On a busy machine the seconds say little: what the server (with
what drives the browser) and the browser had of the processors says more. Needs Debian's chromium-headless-shell.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

from serve.adapters.adapter import Inspection
from serve.config import keys_hashed, load
from tests.serve.api.test_dashboard import CHROMIUM
from tests.support import tiny
from tests.support.app import upload
from tests.support.backend import FakeBackend
from tests.support.served import Served
from tests.support.server import ADMIN, descendants

BUSY, SHOWN = 30, 12
SECONDS, BYTES = 1.0, 500_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="loradock-page-") as name,
        filled(Path(name), asked.adapters) as served,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened(browser, served.url, asked.adapters)  # the browser's own first page is no round
        before = time.process_time(), browser_seconds()
        rounds = [opened(browser, served.url, asked.adapters) for _ in range(asked.rounds)]
        spent = time.process_time() - before[0], browser_seconds() - before[1]
        browser.close()
    seconds = sorted(took for took, _ in rounds)
    nbytes = max(size for _, size in rounds)
    print(
        f"{asked.adapters} adapters, {asked.rounds} rounds: ready after {statistics.median(seconds):.2f} s "
        f"({seconds[0]:.2f} to {seconds[-1]:.2f}), {nbytes / 1000:.0f} kB; processor time of a page: "
        f"{spent[0] / asked.rounds:.2f} s in the server, {spent[1] / asked.rounds:.2f} s in the browser"
    )
    return int(statistics.median(seconds) > SECONDS or nbytes > BYTES)


def browser_seconds() -> float:
    """Processor time of the processes that this one started, and still run."""
    ticks = 0
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def filled(folder: Path, adapters: int) -> Iterator[Served]:
    """A server with so many adapters, some of which were just asked."""
    (folder / "model").mkdir()
    model = tiny.model(folder / "model")
    config = load([str(model), "--name", "base", "--data-dir", str(folder / "data")], {})
    inspected = Inspection(rank=8, base="toy", target_modules=("q_proj",), nbytes=1234, tensors=4)
    with Served(replace(config, admin_keys=keys_hashed([ADMIN])), FakeBackend(config.model), ADMIN) as served:
        for number in range(adapters - BUSY):
            served.app.state.parts.registry.add(f"adapter-{number:04}", inspected, f"{number:064x}", by="ada")
        for number in range(BUSY):
            form = upload(tiny.adapter(folder / f"adapter-{number}", number), name=f"busy-{number:02}")
            served.http.post("/v1/adapters", **form).raise_for_status()
            for _ in range(5):
                served.http.post("/v1/chat/completions", json={"model": f"busy-{number:02}"}).raise_for_status()
        yield served


def opened(browser: Browser, url: str, adapters: int) -> tuple[float, int]:
    """Seconds until the page is ready, and bytes of bodies."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    bodies = []
    page.on("response", lambda answer: bodies.append(answer))  # playwright marks what it is given
    began = time.perf_counter()
    page.goto(f"{url}/dashboard", wait_until="commit")
    page.get_by_label("API key").fill(ADMIN)
    page.get_by_role("button", name="Use").click()
    page.locator("[data-row]").nth(49).wait_for(state="attached")
    page.locator("[data-adapter]").nth(SHOWN - 1).wait_for()
    took = time.perf_counter() - began
    expect(page.locator("#summary")).to_contain_text(f"{adapters:,} adapters")
    nbytes = sum(len(answer.body()) for answer in bodies)
    context.close()
    return took, nbytes


if __name__ == "__main__":
    sys.exit(main())
