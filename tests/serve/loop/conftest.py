"""A server whose trainer is a stand-in, whose traffic is made up, and whose versions score what the test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from serve.loop.examples import Gathered
from serve.loop.likelihood import Example
from serve.rollout import policy
from tests.support.app import upload
from tests.support.trainer import COMMAND

# So few examples prove something at this tolerance.
QUICK = {
    "on": ["schedule"], "every": "300d", "min_examples": 40, "held_out": 0.5, "budget": 2, "wait": "1d", "canary": 0,
    "promote": "auto", "gate": {"tolerance": 0.3, "alpha": 0.2, "golden": 0.3},
}  # fmt: skip


# Seconds for what takes some tenths where nothing else runs.
LONG = 120


@dataclass
class Traffic:
    """Stands for captured traffic: so many examples, each called after `word`."""

    count: int = 60
    word: str = "new"
    asked: list[tuple[float, float]] = field(default_factory=list)

    async def __call__(self, name: str, *, since: float, until: float, held_out: float, seed: int) -> Gathered:
        self.asked.append((since, until))
        examples = [Example(example(self.word, number)) for number in range(self.count)]
        cut = int(self.count * held_out)
        return Gathered(examples[cut:], examples[:cut], {"requests": self.count})


@dataclass
class Scores:
    """Stands for the engine: what a version scores on an example, by its number and the example's word."""

    of: Callable[[int, str], float] = lambda version, word: 0.3 if version == 1 else 0.9
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0

    async def scores(self, version: Any, examples: Sequence[Any]) -> list[float | None]:
        self.asked += len(examples)
        await self.hold.wait()
        words = [example.fields["messages"][0]["content"].split()[0] for example in examples]
        return [self.of(version.version, word) for word in words]


def example(word: str, number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"{word} {number}"}, {"role": "assistant", "content": "yes"}]}


def parts_of(client: Any) -> Any:
    return client._transport.app.state.parts


@pytest.fixture
def looping(connect: Callable[..., Any], config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`async with looping(canary=0.5) as client`: the policy of every adapter has this loop; `looping.scores`,
    `looping.traffic` say what it meets."""

    def started(config: Any = config, how: dict[str, Any] | None = None, backend: Any = None, **loop: Any) -> Any:
        monkeypatch.setenv("STAND_IN", json.dumps(how or {}))
        # What is looked at every few seconds is looked at soon.
        monkeypatch.setattr("serve.jobs.schedule.LOOK_SECONDS", 0.03)
        for name in ("LOOK_SECONDS", "GATHER_SECONDS", "RETRY_SECONDS"):
            monkeypatch.setattr(f"serve.loop.driver.{name}", 0.03)
        policies = policy.parse({"*": {"train_on_traffic": True, "loop": {**QUICK, **loop}}})
        server = connect(replace(config, policies=policies), *([backend] if backend else []))
        parts = server.app.state.parts
        parts.fine_tuning.runner.process.command, parts.fine_tuning.runner.process.nice = COMMAND, 0
        parts.loops.driver.gatekeeper.scorer = started.scores
        if started.traffic is not None:
            parts.loops.candidates.gather = started.traffic
        return server

    started.scores, started.traffic = Scores(), Traffic()
    started.scores.hold.set()
    return started


async def loop_of(client: Any, name: str = "tone") -> dict[str, Any]:
    return (await client.get(f"/v1/adapters/{name}/loop")).json()


async def until(client: Any, wanted: Callable[[dict[str, Any]], bool], name: str = "tone") -> dict[str, Any]:
    """The loop, once it is so."""
    try:
        async with asyncio.timeout(LONG):
            while not wanted(loop := await loop_of(client, name)):
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(loop) from None
    return loop


async def tried(client: Any, number: int = 1, name: str = "tone") -> dict[str, Any]:
    """The try of this number, once it has an outcome."""

    def ended(loop: dict[str, Any]) -> bool:
        return any(one["try"] == number and one["outcome"] for one in loop["tries"])

    loop = await until(client, ended, name)
    return next(one for one in loop["tries"] if one["try"] == number)


async def asked(client: Any, what: str, name: str = "tone", **body: Any) -> Any:
    answer = await client.post(f"/v1/adapters/{name}/loop/{what}", json=body or None)
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


async def pushed(client: Any, make_adapter: Callable[..., Path], name: str = "tone") -> None:
    answer = await client.post("/v1/adapters", **upload(make_adapter(), name=name))
    assert answer.status_code == 201, answer.text
