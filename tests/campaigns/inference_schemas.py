"""Schemathesis over the routes that vLLM answers, against the real engine: every server error, by route and message.

    python -m tests.campaigns.inference_schemas [--examples 50] [--seed 1] [--out FILE]

All of coverage's cases, and so many random ones for each route. An answer of 500 is a finding; each is printed with the
first request that caused it, as curl's body.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.serve.api.test_schemathesis import PROGRAM
from tests.support.lora import trained
from tests.support.server import ADMIN, KEYS, Server

# Answers end soon: most cases do not say how long they may be.
SHORT = ("--max-model-len", "256", "--kv-cache-memory-bytes", "256M")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=50, help="random requests for each route")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where what was found goes as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loradock-schemas-") as name:
        folder = Path(name)
        with Server(folder / "data", folder / "log", *SHORT, **KEYS) as server:
            server.upload("tone", trained("alpha")["alpha"]).raise_for_status()
            entries = run(server.url, folder, asked.examples, asked.seed)
            assert server.ask("tone", tokens=4).done, "the engine answers as before"
    statuses = Counter(entry["response"]["status"] for entry in entries)
    print(f"{len(entries)} requests: " + ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())))
    found = server_errors(entries)
    for finding in found:
        print(
            f"{finding['count']} x {finding['status']} {finding['path']}: {finding['message']}\n    {finding['body']}"
        )
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1))
    return len(found)


def run(url: str, folder: Path, examples: int, seed: int) -> list[dict[str, Any]]:
    """Every request and its answer, as HAR has them."""
    har = folder / "run.har"
    command = [str(PROGRAM), "--no-color", "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {ADMIN}"]
    command += ["--include-tag", "inference", "--phases", "coverage,fuzzing", "--checks", "not_a_server_error"]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure", "--no-shrink"]
    command += ["--request-timeout", "60", "--report-har-path", str(har)]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, timeout=3000, check=False)
    entries: list[dict[str, Any]] = json.loads(har.read_text())["log"]["entries"]
    return entries


def server_errors(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those above 499 that are not an engine's "not now", by route and message."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        status, text = entry["response"]["status"], entry["response"]["content"].get("text") or ""
        if status < 500 or status in (503, 504):
            continue
        path = "/" + entry["request"]["url"].partition("://")[2].partition("/")[2].partition("?")[0]
        message = text[:300]
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            pass
        body = (entry["request"].get("postData") or {}).get("text", "")
        known = found.setdefault(
            (path, message[:120]), {"path": path, "status": status, "message": message, "count": 0}
        )
        known["count"] += 1
        known.setdefault("body", body[:2000])
    return sorted(found.values(), key=lambda finding: (finding["path"], -finding["count"]))


if __name__ == "__main__":
    raise SystemExit(bool(main()))
