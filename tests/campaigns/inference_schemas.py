"""Schemathesis over the routes that vLLM answers, against the real engine: every server error, by route and message.

    python -m tests.campaigns.inference_schemas [--examples 50] [--seed 1] [--seconds 1800] [--only REGEX] [--out FILE]

All of coverage's cases (but for /v1/responses), and so many random ones for each route that the model answers, for
/v1/responses ten times as many. They name models that are there and no deadline: else hardly a request comes to an
engine. An answer of 500 is a finding, also as an event of a stream, and so is one that is not as the document says;
each is printed with the first request that caused it, as curl's body.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.serve.api.test_schemathesis import PROGRAM
from tests.support.lora import trained
from tests.support.server import ADMIN, BASE, KEYS, Server

# Answers end soon: most cases do not say how long they may be.
SHORT = ("--max-model-len", "64", "--kv-cache-memory-bytes", "256M")
MODELS = [BASE, "tone"]
DEADLINE = "X-Request-Timeout"
RESPONSES = "/v1/responses"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=50, help="random requests for each route")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=1800, help="after so many it is interrupted, for /v1/responses once more"
    )
    parser.add_argument("--only", help="routes whose path this regular expression matches")
    parser.add_argument("--out", type=Path, help="where what was found goes as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loradock-schemas-") as name:
        folder = Path(name)
        with Server(folder / "data", folder / "log", *SHORT, **KEYS) as server:
            server.upload("tone", trained("alpha")["alpha"]).raise_for_status()
            document = folder / "openapi.json"
            document.write_text(json.dumps(answered(server, asked.only or "")))
            entries = run(server.url, document, asked.examples, asked.seed, asked.seconds)
            assert server.ask("tone", tokens=4).done, "the engine answers as before"
    statuses = Counter(entry["response"]["status"] for entry in entries)
    print(f"{len(entries)} requests: " + ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())))
    found = findings(entries)
    for finding in found:
        print(
            f"{finding['count']} x {finding['status']} {finding['path']}: {finding['message']}\n    {finding['body']}"
        )
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1))
    return len(found)


def answered(server: Server, only: str) -> dict[str, Any]:
    """The document, of the routes that the model answers; it names models and no deadline."""
    document: dict[str, Any] = server.http.get("/openapi.json").raise_for_status().json()
    for path, operations in list(document["paths"].items()):
        ours = "inference" not in next(iter(operations.values())).get("tags", ())
        if (
            ours
            or not re.search(only, path)
            or ("{" not in path and server.http.post(path, json={"model": BASE}).status_code == 404)
        ):
            del document["paths"][path]
        for operation in operations.values():
            operation["parameters"] = [one for one in operation.get("parameters", ()) if one["name"] != DEADLINE]
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": MODELS}
    return document


def run(url: str, document: Path, examples: int, seed: int, seconds: float) -> list[dict[str, Any]]:
    """Every request and its answer, as HAR has them; a route's are there once it is done."""
    found: list[dict[str, Any]] = []
    for words in (
        ["--phases", "coverage,fuzzing", "--max-examples", str(examples), "--exclude-path", RESPONSES],
        # All of coverage's cases are tens of thousands here.
        ["--phases", "fuzzing", "--max-examples", str(10 * examples), "--include-path", RESPONSES],
    ):
        har = document.with_name(f"run-{len(found)}.har")
        command = [
            str(PROGRAM),
            "--no-color",
            "run",
            str(document),
            "--url",
            url,
            "-H",
            f"Authorization: Bearer {ADMIN}",
        ]
        command += ["--workers", "4", "--checks", "not_a_server_error", "--seed", str(seed), "--continue-on-failure"]
        command += ["--no-shrink", "--request-timeout", "60", "--report-har-path", str(har), *words]
        with subprocess.Popen(command, cwd=document.parent, stdout=subprocess.DEVNULL) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                print(f"interrupted after {seconds:.0f} s: {' '.join(words)}")
                process.send_signal(signal.SIGINT)
        if har.exists():
            found += json.loads(har.read_text())["log"]["entries"]
    return found


def findings(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors above 499 that are not an engine's "not now", and errors without a message; by route and message."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        status, text = entry["response"]["status"], entry["response"]["content"].get("text") or ""
        status, message = error_in_stream(text) if status < 400 else (status, message_of(text))
        if status < 400 or (message is not None and (status < 500 or status in (503, 504))):
            continue
        path = "/" + entry["request"]["url"].partition("://")[2].partition("/")[2].partition("?")[0]
        said = text[:300] if message is None else message
        body = (entry["request"].get("postData") or {}).get("text", "")
        new = {"path": path, "status": status, "message": said, "count": 0, "body": body[:2000]}
        found.setdefault((path, said[:120]), new)["count"] += 1
    return sorted(found.values(), key=lambda finding: (finding["path"], -finding["count"]))


def error_in_stream(text: str) -> tuple[int, str | None]:
    """The first error that came as an event of a stream: its status, 500 where it says none; 200 without one."""
    for line in text.splitlines():
        if not line.startswith("data:") or '"error"' not in line:
            continue
        try:
            event = json.loads(line.removeprefix("data:"))
        except ValueError:
            continue
        error = event.get("error") or (event.get("response") or {}).get("error")
        if isinstance(error, dict):
            code = {"invalid_request_error": 400, "overloaded_error": 503}.get(error.get("type"), error.get("code"))
            return code if isinstance(code, int) else 500, error.get("message")
    return 200, None


def message_of(text: str) -> str | None:
    """What an error says, where the document says that it does."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return message if isinstance(message, str) else None


if __name__ == "__main__":
    raise SystemExit(bool(main()))
