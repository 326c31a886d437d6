"""OpenAI's batch file format against a running server, behind everybody who waits for an answer.

One JSON object a line: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}. Each gets a line in the
output, in the order in which they were answered; a run that was broken off goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serve.errors import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
# Behind interactive requests (0), before shadows.
PRIORITY = 100
ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    url: str
    body: dict[str, Any]


def read(file: Path) -> list[Job]:
    """The jobs of an input file; ConfigError names the line that is none."""
    jobs: list[Job] = []
    seen: set[str] = set()
    for number, line in enumerate(_lines(file), 1):
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of {file} is not JSON: {error}") from error
        job = _job(fields, f"line {number} of {file}")
        if job.id in seen:
            raise ConfigError(f"line {number} of {file} has the custom_id {job.id!r}, which an earlier line has too")
        seen.add(job.id)
        jobs.append(job)
    return jobs


def answered(file: Path) -> set[str]:
    """Whose answers are in an output file already; a line that was broken off counts for nothing."""
    done = set()
    for line in _lines(file) if file.exists() else ():
        try:
            answer = json.loads(line)
            if answer["response"]["status_code"] == 200:
                done.add(answer["custom_id"])
        except (ValueError, KeyError, TypeError):
            continue
    return done


async def run(
    jobs: list[Job],
    out: Path,
    *,
    url: str,
    key: str | None,
    concurrency: int,
    progress: Callable[[bool], None] = lambda well: None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> int:
    """Answer the jobs into `out`; how many failed."""
    failed = 0
    turns = asyncio.Semaphore(concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency)
    whole = not out.exists() or out.read_bytes()[-1:] in (b"", b"\n")
    async with httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=None, limits=limits, transport=transport
    ) as http:
        with out.open("a") as file:
            if not whole:
                file.write("\n")

            async def answer(job: Job) -> None:
                nonlocal failed
                async with turns:
                    result = await _ask(http, job)
                well = result["response"] is not None and result["response"]["status_code"] == 200
                failed += not well
                file.write(json.dumps(result) + "\n")
                file.flush()
                progress(well)

            async with asyncio.TaskGroup() as tasks:
                for job in jobs:
                    tasks.create_task(answer(job))
    return failed


async def _ask(http: httpx.AsyncClient, job: Job) -> dict[str, Any]:
    """One line of output; the server's 429 and 503 are waited out."""
    result: dict[str, Any] = {"id": f"batch_req_{job.id}", "custom_id": job.id, "response": None, "error": None}
    for attempt in range(ATTEMPTS):
        try:
            response = await http.post(job.url, json={"priority": PRIORITY, **job.body})
        except httpx.TransportError as error:
            result["error"] = {"code": "connection", "message": str(error) or type(error).__name__}
            await asyncio.sleep(min(2.0**attempt, 30))
            continue
        result["error"] = None
        result["response"] = {
            "status_code": response.status_code,
            "request_id": response.headers.get("x-request-id", ""),
            "body": _body(response),
        }
        again = response.status_code == 503 or (response.status_code == 429 and "retry-after" in response.headers)
        if not again:
            break
        await asyncio.sleep(float(response.headers.get("retry-after", 5)))
    return result


def _body(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text


def _job(fields: Any, where: str) -> Job:
    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("custom_id"), str)
        or not isinstance(fields.get("body"), dict)
    ):
        raise ConfigError(f'{where} needs "custom_id" (text), "url" and "body" (an object)')
    if fields.get("method", "POST") != "POST" or fields.get("url") not in URLS:
        raise ConfigError(
            f"{where} asks {fields.get('method')} {fields.get('url')}: it takes POST and one of {', '.join(URLS)}"
        )
    if fields["body"].get("stream"):
        raise ConfigError(f"{where} asks for a stream: a batch has whole answers")
    return Job(fields["custom_id"], fields["url"], fields["body"])


def _lines(file: Path) -> Iterator[str]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    return (line for line in text.splitlines() if line.strip())
