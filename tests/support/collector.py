"""An OpenTelemetry collector in a process of its own: OTLP over HTTP, decoded with OpenTelemetry's own messages.

with Collector(folder) as collector:
    collector.behave(seconds=2)       # slow; or status=503
    collector.stop(); collector.start()   # gone, and back at the same port
    collector.spans()                 # what has come, also before it was gone
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.support.server import ROOT, environment, free_port
from tests.support.waiting import eventually

FILE = "received.jsonl"


class Collector:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / FILE
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Collector:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        if (kept := self.text()) and not kept.endswith("\n"):
            # It was killed while it wrote: nobody was told that this had come.
            self._file.write_text(kept[: kept.rfind("\n") + 1])
        command = [sys.executable, "-m", "tests.support.otlp_receiver", str(self._port), str(self._file)]
        self._process = subprocess.Popen(command, env=environment(), cwd=ROOT)
        assert eventually(self._answers), "the collector does not start"

    def stop(self) -> None:
        """Gone, at once."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def behave(self, seconds: float = 0.0, status: int = 200, keep: bool = True) -> None:
        """From now on it takes so long for an answer, with this status; what it refuses it does not keep.

        What waits for its answer is answered with the next call.

        Without `keep` it decodes nothing, so that it takes next to no time from a server that is measured beside it.
        """
        behaviour = {"seconds": seconds, "status": status, "keep": keep}
        httpx.post(f"{self.url}/behave", json=behaviour, timeout=60).raise_for_status()

    def forget(self) -> None:
        """Begin anew."""
        self.behave()
        self._file.unlink(missing_ok=True)

    def received(self, signal: str) -> list[dict[str, Any]]:
        """Everything of a signal, in the order in which it came, once each; of an export all or nothing."""
        lines = self.text().splitlines(keepends=True)
        items = [item for line in lines if line.endswith("\n") for item in json.loads(line)]
        return [item for item in items if item["signal"] == signal]

    def spans(self, **attributes: Any) -> list[dict[str, Any]]:
        """Spans, each once, that have these attributes, with _ for the dot."""
        spans = {span["span_id"]: span for span in self.received("traces")}
        named = {name.replace("__", "."): value for name, value in attributes.items()}
        return [span for span in spans.values() if named.items() <= span["attributes"].items()]

    def traces(self) -> dict[str, list[dict[str, Any]]]:
        """Spans by their trace."""
        traces: dict[str, list[dict[str, Any]]] = {}
        for span in self.spans():
            traces.setdefault(span["trace_id"], []).append(span)
        return traces

    def text(self) -> str:
        """Every byte that came, as far as it is known."""
        return self._file.read_text() if self._file.exists() else ""

    def _answers(self) -> bool:
        try:
            return httpx.get(self.url, timeout=1).status_code == 200
        except httpx.TransportError:
            return False
