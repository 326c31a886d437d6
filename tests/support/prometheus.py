"""Debian's Prometheus on the rendered files, and what tests ask of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve.telemetry.rendered.render import SCRAPE_KEY, Places, write
from serve.telemetry.slo import DEFAULT_SLOS
from tests.support.server import free_port, tail
from tests.support.waiting import eventually

Sample = dict[str, Any]
HAS_PROMETHEUS = shutil.which("prometheus") is not None


@contextmanager
def running(folder: Path, url: str, *command: str) -> Iterator[httpx.Client]:
    """The program, and a client of it once it is ready."""
    log = folder / "log"
    with log.open("w") as out, httpx.Client(base_url=url, timeout=30) as client:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
        try:

            def ready() -> bool:
                with suppress(httpx.TransportError):
                    return client.get("/-/ready").status_code == 200
                assert process.poll() is None, tail(log)
                return False

            assert eventually(ready), tail(log)
            yield client
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def prometheus(folder: Path, port: int, key: str, *, every: str | None = None) -> Iterator[httpx.Client]:
    """Prometheus on the rendered files over a server on this port; `every` replaces all their intervals."""
    address = f"127.0.0.1:{free_port()}"
    write(folder, DEFAULT_SLOS, Places(f"127.0.0.1:{port}", address, f"127.0.0.1:{free_port()}"))
    (folder / "prometheus" / SCRAPE_KEY).write_text(key)
    for name in ("prometheus.yml", "rules.yml") if every else ():
        file = folder / "prometheus" / name
        read = yaml.safe_load(file.read_text())
        if "global" in read:
            read["global"] = {"scrape_interval": every, "evaluation_interval": every}
        for group in read.get("groups", []):
            group["interval"] = every
        file.write_text(yaml.safe_dump(read))
    # Debian keeps the data of all in one place, unless it is told otherwise.
    command = (
        "prometheus",
        "--config.file=prometheus.yml",
        f"--web.listen-address={address}",
        "--storage.tsdb.path=data",
    )
    with running(folder / "prometheus", f"http://{address}", *command, "--enable-feature=exemplar-storage") as client:
        yield client


def ask(client: httpx.Client, expr: str, at: float | None = None) -> list[Sample]:
    """The samples of an instant query, now or at a time."""
    data = {"query": expr} | ({} if at is None else {"time": f"{at:.3f}"})
    answer = client.post("/api/v1/query", data=data).json()
    assert answer["status"] == "success", f"{answer.get('error')}\n{expr}"
    result: list[Sample] = answer["data"]["result"]
    return result


def says_something(client: httpx.Client, expr: str) -> bool:
    """A sample that is a number and not zero."""
    values = [float(sample["value"][1]) for sample in ask(client, expr)]
    return any(value == value and value != 0 for value in values)


def scraped_at(client: httpx.Client) -> float:
    """The time of the latest scrape of the server."""
    samples = ask(client, 'timestamp(up{job="loradock"})')
    assert len(samples) == 1, samples
    (sample,) = samples
    return float(sample["value"][1])


def await_scrapes(client: httpx.Client, count: int = 3, seconds: float = 60) -> float:
    """Wait for so many scrapes more; the time of the last. The server renders once a second at most."""
    times = {scraped_at(client)}

    def passed() -> bool:
        times.add(scraped_at(client))
        return len(times) > count

    assert eventually(passed, seconds), "Prometheus does not scrape"
    return max(times)


def filled(expr: str, choices: Mapping[str, str]) -> str:
    """As Grafana fills in what stands for a choice."""
    return re.sub(r"\$(\w+)", lambda match: choices[match[1]], expr)
