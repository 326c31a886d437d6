"""OpenAI's batch file format against a running server, behind everybody who waits for an answer.

A server with batches of its own gets the whole file (serve.client.server_batch); one without is asked line by line.

One JSON object a line: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}. Each gets a line in the
output, in the order in which they were answered; a run that was broken off goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
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


def failures(file: Path, jobs: Iterable[Job]) -> Iterator[tuple[str, str]]:
    """The jobs that an output file has no good answer to: custom_id and why."""
    reasons: dict[str, str] = {}
    for line in _lines(file) if file.exists() else ():
        try:
            row = json.loads(line)
            reasons[row["custom_id"]] = _reason(row)
        except (ValueError, KeyError, TypeError):
            continue
    for job in jobs:
        if reason := reasons.get(job.id, "it was not answered"):
            yield job.id, reason


def _reason(row: dict[str, Any]) -> str:
    """Why a line of output is no answer; "" for one that is."""
    response = row["response"]
    if response is None:
        return str(row["error"]["message"])
    if response["status_code"] == 200:
        return ""
    body = response["body"]
    message = body["error"]["message"] if isinstance(body, dict) and "error" in body else body
    return f"{response['status_code']} {message}"


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
    """Answer the jobs into `out`, one request each; how many failed."""
    failed = 0
    turns = asyncio.Semaphore(concurrency)
    end_line(out)
    async with client_of(url, key, concurrency, transport) as http:
        with out.open("a") as file:

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


def end_line(out: Path) -> None:
    """The next line of an output begins on a line of its own, also after one that was broken off."""
    if out.exists() and out.read_bytes()[-1:] not in (b"", b"\n"):
        with out.open("a") as file:
            file.write("\n")


def client_of(
    url: str, key: str | None, connections: int = 4, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """A client of the server at this URL, with or without /v1."""
    return httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=None,
        limits=httpx.Limits(max_connections=connections),
        transport=transport,
    )


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
    # Not `splitlines`, which takes characters that JSON holds as they are (U+2028) for the end of a line.
    return (line for line in text.split("\n") if line.strip())
