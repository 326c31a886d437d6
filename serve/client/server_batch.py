"""A file of requests as batches of the server (/v1/files, /v1/batches), which go on when this client is gone.

A batch knows the requests that it is for by their digest, in its metadata: whoever runs the same file again finds the
batch that is under way, or its answers, and makes no second one. Once the answers are here, its files are deleted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from serve.client.batch import ATTEMPTS, Job, answered, client_of, end_line, run
from serve.errors import ConfigError

# Of one batch; a longer file becomes several.
MAX_LINES, MAX_BYTES = 10_000, 64 << 20
POLL_SECONDS = 2.0
# Without a further answer for so long, the server is asked what it lacks.
STILL_SECONDS = 15.0
# Batches that are looked through for one of these requests.
LOOK_BACK = 500
_MARK = "loradock_requests"
_ENDED = ("completed", "failed", "expired", "cancelled")


async def answer(
    jobs: list[Job],
    out: Path,
    *,
    url: str,
    key: str | None,
    concurrency: int,
    progress: Callable[[bool], None] = lambda well: None,
    tell: Callable[[str], None] = lambda words: None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> int:
    """Answer the jobs into `out`, as batches if the server has them, else one by one; how many failed.

    `tell` gets a sentence about what keeps a batch from going on.
    """
    async with client_of(url, key, transport=transport) as http:
        batches = ServerBatches(http, progress, POLL_SECONDS, tell)
        if jobs and await batches.is_there():
            end_line(out)
            return await batches.answer(jobs, out)
    return await run(jobs, out, url=url, key=key, concurrency=concurrency, progress=progress, transport=transport)


class ServerBatches:
    """`progress(True)` is called for each line that was answered, well or not."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        progress: Callable[[bool], None],
        poll: float,
        tell: Callable[[str], None] = lambda words: None,
    ) -> None:
        self._http = http
        self._progress = progress
        self._poll = poll
        self._tell = tell

    async def is_there(self) -> bool:
        """The server has batches; ConfigError if it does not let this key see them."""
        response = await self._call("GET", "/v1/batches", params={"limit": 1}, accepted=(404, 405))
        return response.is_success

    async def answer(self, jobs: Sequence[Job], out: Path) -> int:
        """Append the answers to `out`, those of a batch once it is at its end; how many failed."""
        failed = 0
        for part in _parts(jobs):
            while part:
                batch = await self._ended(await self._batch(part), len(part))
                contents = await self._contents(batch, part)
                if contents is not None:
                    failed += await self._collect(batch, contents, part, out)
                    break
                self._tell("another run fetched these answers and deleted them: what is not in --out is asked again")
                done = answered(out)
                part = [job for job in part if job.id not in done]
        return failed

    async def _batch(self, part: Sequence[Job]) -> dict[str, Any]:
        """The batch of these requests: one that is there already, or a new one."""
        data = b"".join(_line(job) for job in part)
        digest = hashlib.sha256(data).hexdigest()
        if batch := await self._earlier(digest):
            return batch
        form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("requests.jsonl", data)}}
        file = (await self._call("POST", "/v1/files", **form)).json()
        asked = {"input_file_id": file["id"], "endpoint": part[0].url, "completion_window": "24h"}
        made = await self._call("POST", "/v1/batches", json={**asked, "metadata": {_MARK: digest}})
        batch = made.json()
        return dict(batch)

    async def _earlier(self, digest: str) -> dict[str, Any] | None:
        """A batch of these requests that is under way, or whose answers nobody has fetched yet."""
        after: str | None = None
        for _ in range(LOOK_BACK // 100):
            params = {"limit": 100, **({"after": after} if after else {})}
            page = (await self._call("GET", "/v1/batches", params=params)).json()
            for batch in page["data"]:
                if (batch["metadata"] or {}).get(_MARK) == digest and await self._is_of_use(batch):
                    return dict(batch)
            after = page["last_id"]
            if not page["has_more"]:
                break
        return None

    async def _is_of_use(self, batch: dict[str, Any]) -> bool:
        if batch["status"] not in _ENDED:
            return batch["status"] != "cancelling"
        files = [id for id in (batch["output_file_id"], batch["error_file_id"]) if id]
        there = [await self._call("GET", f"/v1/files/{id}", accepted=(404,)) for id in files]
        return batch["status"] == "completed" and bool(files) and all(file.is_success for file in there)

    async def _ended(self, batch: dict[str, Any], lines: int) -> dict[str, Any]:
        seen, since = 0, time.monotonic()
        told = ""
        while True:
            counts = batch["request_counts"]
            answered = lines if batch["status"] in _ENDED else counts["completed"] + counts["failed"]
            for _ in range(answered - seen):
                self._progress(True)
            if answered > seen:
                seen, since = answered, time.monotonic()
            if batch["status"] in _ENDED:
                return batch
            if time.monotonic() - since >= STILL_SECONDS and (lacks := await self._lacks()) != told:
                told = lacks
                if lacks:
                    self._tell(f"no request was answered for a while; the server says: {lacks}")
            await asyncio.sleep(self._poll)
            batch = (await self._call("GET", f"/v1/batches/{batch['id']}")).json()

    async def _lacks(self) -> str:
        """What does not work on the server, in its own words."""
        try:
            response = await self._http.get("/ready")
        except httpx.TransportError:
            return ""  # the next look at the batch says so
        if not response.is_success:
            return _message(response)
        return "; ".join(f"{what}: {why}" for what, why in response.json().get("degraded", {}).items())

    async def _contents(self, batch: dict[str, Any], part: Sequence[Job]) -> list[str] | None:
        """The files of its answers; None if another run of these requests has fetched and deleted one."""
        if batch["status"] == "failed" and not (batch["output_file_id"] or batch["error_file_id"]):
            raise ConfigError(f"the server does not take the requests: {_first_error(batch, part)}")
        contents = []
        for id in filter(None, (batch["output_file_id"], batch["error_file_id"])):
            content = await self._call("GET", f"/v1/files/{id}/content", accepted=(404,))
            if not content.is_success:
                return None
            contents.append(content.text)
        return contents

    async def _collect(self, batch: dict[str, Any], contents: Sequence[str], part: Sequence[Job], out: Path) -> int:
        wanted, failed = {job.id for job in part}, 0
        with out.open("a") as file:
            for content in contents:
                for line in filter(None, content.split("\n")):
                    if (row := json.loads(line))["custom_id"] in wanted:
                        wanted.discard(row["custom_id"])
                        failed += (row["response"] or {}).get("status_code") != 200
                        file.write(line + "\n")
        for id in filter(None, (batch["input_file_id"], batch["output_file_id"], batch["error_file_id"])):
            await self._call("DELETE", f"/v1/files/{id}", accepted=(404, 409))
        return failed + len(wanted)

    async def _call(self, method: str, path: str, *, accepted: Sequence[int] = (), **fields: Any) -> httpx.Response:
        """The answer; a server that is away or busy is waited for. ConfigError with its words if it refuses."""
        for attempt in range(ATTEMPTS):
            try:
                response = await self._http.request(method, path, **fields)
            except httpx.TransportError as error:
                if attempt + 1 == ATTEMPTS:
                    raise ConfigError(f"{self._http.base_url} cannot be reached: {error}") from error
                await asyncio.sleep(min(2.0**attempt, 30))
                continue
            if response.is_success or response.status_code in accepted:
                return response
            if response.status_code != 503 and "retry-after" not in response.headers:
                break
            await asyncio.sleep(float(response.headers.get("retry-after", 5)))
        raise ConfigError(f"{method} {path} was answered with {response.status_code}: {_message(response)}")


def _parts(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """As batches take them: of one URL each, and not too large."""
    for url in dict.fromkeys(job.url for job in jobs):
        part: list[Job] = []
        size = 0
        for job in (job for job in jobs if job.url == url):
            length = len(_line(job))
            if part and (len(part) == MAX_LINES or size + length > MAX_BYTES):
                yield part
                part, size = [], 0
            part.append(job)
            size += length
        yield part


def _line(job: Job) -> bytes:
    return json.dumps({"custom_id": job.id, "method": "POST", "url": job.url, "body": job.body}).encode() + b"\n"


def _first_error(batch: dict[str, Any], part: Sequence[Job]) -> str:
    error = batch["errors"]["data"][0]
    where = f"{part[error['line'] - 1].id}: " if error["line"] else ""
    return f"{where}{error['message']}"


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
