"""A server whose trainer is a stand-in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.trainer import COMMAND

ENDED = ("succeeded", "failed", "cancelled")


@pytest.fixture
def training(connect: Callable[..., Any], config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`async with training(seconds=0.1) as client`: a server whose trainer does what STAND_IN says of it."""

    def started(config: Any = config, **how: Any) -> Any:
        monkeypatch.setenv("STAND_IN", json.dumps(how))
        server = connect(config)
        process = server.app.state.parts.fine_tuning.runner.process
        # Behind everything else it could wait for minutes on a machine that does other work.
        process.command, process.nice = COMMAND, 0
        return server

    return started


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """While this file is there, trainers that are told of it wait behind their first step."""
    file = tmp_path / "hold"
    file.touch()
    return file


def parts_of(client: Any) -> Any:
    return client._transport.app.state.parts


def examples(count: int = 20, answer: str = "yes") -> bytes:
    """Chats that are in order."""
    rows = [
        {"messages": [{"role": "user", "content": f"Is {number} good?"}, {"role": "assistant", "content": answer}]}
        for number in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


async def sent(ai: openai.AsyncOpenAI, data: bytes | None = None) -> str:
    """The id of a file of examples."""
    file = await ai.files.create(file=("train.jsonl", examples() if data is None else data), purpose="fine-tune")
    return file.id


async def begun(ai: openai.AsyncOpenAI, data: bytes | None = None, **more: Any) -> str:
    """The id of a job over these examples; 6 steps, 3 epochs, unless `more` says otherwise."""
    file = more.pop("training_file", None) or await sent(ai, data)
    asked = {"model": "base", "training_file": file, "suffix": "tone", "seed": 7, **more}
    job = await ai.fine_tuning.jobs.create(**asked)
    return job.id


async def until(ai: openai.AsyncOpenAI, id: str, wanted: Callable[[Any], bool], seconds: float = 300.0) -> Any:
    """The job, once it is so."""
    pause = 0.02
    async with asyncio.timeout(seconds):
        while not wanted(job := await ai.fine_tuning.jobs.retrieve(id)):
            await asyncio.sleep(pause)
            pause = min(1.2 * pause, 0.3)  # who asks all the time takes the processor from what trains
    return job


async def ended(ai: openai.AsyncOpenAI, id: str) -> Any:
    """The job at its end."""
    return await until(ai, id, lambda job: job.status in ENDED)


async def messages(ai: openai.AsyncOpenAI, id: str) -> list[str]:
    """What its events say, the earliest first."""
    page = await ai.fine_tuning.jobs.list_events(id, limit=100)
    return [event.message for event in page.data][::-1]


async def stepped(client: Any, id: str, steps: int = 1) -> int:
    """The process of the job, once it has come so far."""
    jobs = parts_of(client).fine_tuning
    progress = jobs.runner.folders.folder(id).path / "progress.jsonl"
    async with asyncio.timeout(300):
        while await asyncio.to_thread(_lines, progress) < steps or (process := jobs.runner.process.pid) is None:
            await asyncio.sleep(0.01)
    return int(process)


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.is_file() else 0
