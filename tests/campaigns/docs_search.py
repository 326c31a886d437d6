"""Twenty things that somebody new wants to know, looked up with the search of the documentation's site alone.

    python -m tests.campaigns.docs_search [--site DIR] [--results 8]

Builds the site, types words into its search in a real browser, opens the results from the first one on, and stops at
the page that has the answer. Printed: the place of that page among the results, and the seconds of the machine, to
which a reader adds reading. A question whose page is not among the first three results, or whose answer is not on it,
is a failure. Needs Debian's chromium-headless-shell.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Page

from docs.make_screenshot import chromium
from tests.support.server import ROOT

NEAR = 3
# Pages for those who change loradock or check its proofs.
ABOUT_ITSELF = r"/(lab/|architecture|decisions|upstream|contributing|benchmarks)"


@dataclass(frozen=True)
class Task:
    question: str
    words: str
    answer: str  # a regular expression that the page with the answer holds


# Written before any of them was tried; words are what somebody would type who knows no word of ours.
TASKS = (
    Task("Put another LoRA adapter onto a running server", "upload lora adapter", r"loradock adapters push tone"),
    Task(
        "What happens to running requests when a version changes?",
        "switch version running requests",
        r"finish on version 1|end(s)? on the version they began on",
    ),
    Task("Does Llama-3.1-8B with adapters fit one A100?", "llama 8b a100 memory", r"Llama-3\.1-8B.*\n?.*A100|a100"),
    Task("Turn drift detection off", "disable drift", r"--no-drift"),
    Task("Run three replicas", "replicas", r"--replicas \d"),
    Task("A key for a team, with a limit", "api key rate limit", r"--requests-per-minute"),
    Task("Alerts into Slack or PagerDuty", "slack alerts", r"[Ss]lack"),
    Task("The drift alert fired: what now?", "drift alert what to do", r"drift accept|drift acknowledge"),
    Task("Is Gemma 3 supported?", "gemma supported models", r"Gemma ?3"),
    Task("The format of training examples", "training data format jsonl", r'"messages": \[\{"role"'),
    Task("Make the model smaller for a CPU", "quantize int8", r"loradock optimize int8-cpu"),
    Task("Roll back by itself when a new version is bad", "automatic rollback", r"rolled back|rolls? .*back"),
    Task("Push an adapter from the Hugging Face hub", "hugging face adapter", r"hf://"),
    Task("Back up and upgrade", "backup upgrade", r"loradock backup"),
    Task("Use it with LangChain", "langchain", r"LangChain"),
    Task("Are prompts stored?", "are prompts stored privacy", r"capture_text|--capture-text|kept as text"),
    Task("Why is the answer not random: default temperature", "default temperature", r"0\.2"),
    Task("Does it take DoRA adapters?", "dora", r"DoRA"),
    Task("Install on Kubernetes", "helm install kubernetes", r"helm install"),
    Task("Tokens that a team used last month", "usage per team tokens", r"loradock usage"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", type=Path, help="a site that is built already")
    parser.add_argument("--results", type=int, default=8, help="how many results are opened at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loradock-site-") as name:
        site = options.site or built(Path(name))
        with served(site) as url, chromium() as browser:
            page = browser.new_page()
            failed = [task for task in TASKS if not found(page, url, task, options.results)]
    print(f"{len(TASKS) - len(failed)} of {len(TASKS)} are answered by one of the first {NEAR} results")
    return int(bool(failed))


def built(folder: Path) -> Path:
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", str(ROOT / "docs"), str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@contextmanager
def served(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def found(page: Page, url: str, task: Task, most: int) -> bool:
    """Whether one of the first results has the answer; says which."""
    began = time.monotonic()
    page.goto(f"{url}/search.html")
    page.locator("#search-documentation input[name=q], .sidebar-search").first.fill(task.words)
    page.keyboard.press("Enter")
    page.locator(".search-summary").wait_for()
    page.wait_for_function("/finished|did not match|found/i.test(document.querySelector('.search-summary').innerText)")
    links = page.locator("ul.search > li > a").evaluate_all("links => links.map(link => link.href)")
    place = 0
    answered = False
    for link in dict.fromkeys(links[:most]):
        place += 1
        page.goto(link)
        text = page.locator("article").inner_text()
        answered = re.search(task.answer, text) is not None and not re.search(ABOUT_ITSELF, page.url)
        if answered:
            break
    shown = re.sub(r"^http://[^/]+/|\?[^#]*", "", page.url) if answered else f"not in {', '.join(links[:most])}"
    print(f"{time.monotonic() - began:4.1f} s  result {place}  {task.question} ({task.words}): {shown}", flush=True)
    return answered and place <= NEAR


if __name__ == "__main__":
    sys.exit(main())
