"""A worker whose trainer is the stand-in: `python -m tests.support.training_worker URL FOLDER MODEL`."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import httpx

from serve.client.api_client import Retry
from serve.client.fine_tuning_work_client import WorkClient
from serve.jobs.finetuning import remote_worker as finetune_worker
from serve.jobs.finetuning.remote_worker import Bases, Worker, named
from serve.jobs.finetuning.training_process import TrainingProcess
from serve.models.checkpoint import digest_of
from tests.support.trainer import COMMAND


class Bridge(httpx.BaseTransport):
    """To an app in this process, for a client on another thread than the app's loop."""

    def __init__(self, transport: Any) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(self._answered(request), self._loop).result(60)

    async def _answered(self, request: httpx.Request) -> httpx.Response:
        asked = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
        answer = await self._transport.handle_async_request(asked)
        return httpx.Response(answer.status_code, headers=answer.headers, content=await answer.aread())


def worker(url: str, folder: Path, model: Path, key: str | None = None, transport: Any = None) -> Worker:
    """Over this base, behind nobody."""
    folder.mkdir(parents=True, exist_ok=True)
    client = WorkClient(url, key, named(folder), retry=Retry(attempts=1), transport=transport)
    bases = Bases({digest_of(str(model)): model})
    return Worker(client, folder, bases, TrainingProcess(command=COMMAND, nice=0))


def main(url: str, folder: str, model: str) -> None:
    finetune_worker.LOOK_SECONDS = 0.1
    working = worker(url, Path(folder), Path(model))
    signal.signal(signal.SIGTERM, lambda *_: working.stop())
    print("ready", flush=True)
    working.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
