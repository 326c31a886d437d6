"""Bodies that no honest client sends, to every route: the longest stall of the event loop and the memory for each.

    python -m tests.campaigns.front_door [--bodies 20000] [--most 4194304] [--seed 1] [--only REGEX] [--out FILE]
    python -m tests.campaigns.front_door --replay FILE     # the worst bodies of a run, which wrote them with --worst

Every route of /openapi.json that takes a body, those of inference too, over a backend that looks at a body as vLLM's
routes do (its own request models) and computes nothing. The bodies: wrong types in bulk for every field that the
document names, deep, wide, huge numbers, long keys, halves. An answer of 500, a stall above `--stall` or a peak of
memory above `--times` of the body is a finding; so is memory at the end that the beginning did not have.

A stall is told twice: by the wall, and in CPU time of this process, which other programs on the machine do not
lengthen. The findings go by the second.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from serve.asgi.wrong_field import refused
from serve.config import keys_hashed, load
from serve.server.garbage import collect_in_quiet
from serve.vllm_backend.first_error import validator
from serve.vllm_backend.request_schemas import REQUESTS, request_type
from tests.support import tiny
from tests.support.app import Started, issued
from tests.support.backend import FakeBackend

SIZES = (1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20)
# Below this size of a body the pages of the process say nothing about it.
MEASURED = 64 << 10
# A server has looked for garbage, and given back what is free, once it had nothing to do for so long.
QUIET = 12.0
# Of the memory before, what may be there afterwards.
GROWTH = 0.05
PARAMETERS = {"name": "tone", "version": "1", "id": "none", "model": "base", "worker": "w", "file": "a"}


class Door(FakeBackend):
    """Looks at each body with the models of vLLM's routes, as vLLM's app does."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._models = {path: validator(TypeAdapter(request_type(path)).core_schema) for path in REQUESTS}

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        body = await request.json() if scope["method"] == "POST" else {}
        answer, status = {"model": body.get("model")}, 200
        if model := self._models.get(scope["path"]):
            try:
                model.validate_python(body)
            except ValidationError as error:
                answer, status = refused(error.errors(include_url=False)).body(), 400
            except Exception as error:  # vLLM's own checks
                answer, status = {"error": {"message": str(error)[:500]}}, 400
        await JSONResponse(answer, status)(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request of the campaign, and what its body is like."""

    method: str
    path: str
    body: bytes
    like: str

    @property
    def text(self) -> str:
        return f"{self.like}, {len(self.body)} bytes"

    def line(self, **seen: float) -> str:
        """As --replay reads it."""
        packed = base64.b64encode(zlib.compress(self.body)).decode()
        return json.dumps({"method": self.method, "path": self.path, "like": self.like, **seen, "body": packed})

    @classmethod
    def read(cls, line: str) -> Sent:
        row = json.loads(line)
        return cls(row["method"], row["path"], zlib.decompress(base64.b64decode(row["body"])), row["like"])


@dataclass
class Seen:
    """What came of the requests to one route; stalls in seconds by the wall and of CPU, with what made them."""

    statuses: Counter[int] = field(default_factory=Counter)
    wall: float = 0.0
    cpu: float = 0.0
    slowest: Sent | None = None
    times: float = 0.0
    largest: Sent | None = None
    failures: list[str] = field(default_factory=list)
    failed: list[Sent] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        slowest, largest = (sent.text if sent else "" for sent in (self.slowest, self.largest))
        return {
            "statuses": self.statuses, "wall": self.wall, "cpu": self.cpu, "slowest": slowest,
            "times": self.times, "largest": largest, "failures": self.failures,
        }  # fmt: skip

    def worst(self) -> Iterator[str]:
        """Lines to replay."""
        if self.slowest:
            yield self.slowest.line(wall=round(self.wall, 4), cpu=round(self.cpu, 4))
        if self.largest and self.largest is not self.slowest:
            yield self.largest.line(times=round(self.times, 1))
        yield from (sent.line() for sent in self.failed)


def routes(document: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(method, path, names of fields) of each that takes a body."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if isinstance(operation, dict) and "requestBody" in operation:
                text = json.dumps(operation["requestBody"])
                names = set(re.findall(r'"properties": ({.*)', text)) and set(_properties(operation["requestBody"]))
                for reference in re.findall(r'"#/components/schemas/([^"]+)"', text):
                    names |= set(_properties(document["components"]["schemas"].get(reference, {})))
                named = re.sub(r"{(\w+)(:path)?}", lambda match: PARAMETERS.get(match[1], "none"), path)
                found.append((method.upper(), named, sorted(names) or ["name"]))
    return found


def _properties(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for value in schema.values():
            yield from _properties(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _properties(value)


HONEST = {
    "model": "base",
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "x",
    "input": "x",
    "max_tokens": 4,
    "name": "tone",
}
ATOMS = [
    b"{}",
    b"[]",
    b"0",
    b"1.5",
    b'"x"',
    b"null",
    b'""',
    b"1e308",
    b"[[]]",
    b'{"a":1}',
    b'{"type":"text","text":""}',
]
ATOMS += [b'{"role":"user","content":"x"}', b'{"type":"message","role":"user","content":[{}]}', b'{"type":"function"}']
ATOMS += [b"9" * 40, b'"\\u0000"', b'"\\\\\\""', b"-0", b'{"role":"user","content":[{"type":"input_text","text":""}]}']


def body(chance: random.Random, names: list[str], most: int) -> tuple[str, bytes]:
    """What kind of a body, and its bytes."""
    size = min(most, chance.choice(SIZES))
    name, atom = chance.choice(names), chance.choice(ATOMS)
    kinds: dict[str, Callable[[], bytes]] = {
        "bulk": lambda: b"[" + b",".join([atom] * (size // (len(atom) + 1))) + b"]",
        "few": lambda: b"[" + b",".join([atom] * chance.randrange(1, 300)) + b"]",
        "wide": lambda: b"{" + b",".join(b'"k%d":%b' % (i, atom) for i in range(size // (len(atom) + 10))) + b"}",
        "deep": lambda: (opening := chance.choice([b"[", b'{"a":'])) * (size // len(opening)),
        "nested": lambda: b"[" * (depth := chance.randrange(1, 90)) + atom + b"]" * depth,
        "digits": lambda: b"9" * size,
        "key": lambda: b'{"%b":%b}' % (b"k" * size, atom),
        "text": lambda: b'"%b"' % (chance.choice([b"x", b"\\n", b"\\u00e4", b'\\"', b"[{,"]) * (size // 6)),
    }
    kind = chance.choice(list(kinds))
    honest = {key: value for key, value in HONEST.items() if key != name}
    text = json.dumps({**honest, name: None})[:-5].encode() + kinds[kind]() + b"}"
    if chance.random() < 0.1:
        return f"half of {kind} in {name}", text[: chance.randrange(1, len(text))]
    if chance.random() < 0.05:
        return f"bare {kind}", kinds[kind]()
    return f"{kind} of {atom.decode()[:20]} in {name}", text


class Loop:
    """How long the event loop did nothing else, at most."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    async def watch(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        while True:
            await asyncio.sleep(0)
            now, used = time.perf_counter(), time.process_time()
            self.wall = max(self.wall, now - wall)
            # Of two threads at once this is the time of both, and never more than the wall's.
            self.cpu = max(self.cpu, min(now - wall, used - cpu))
            wall, cpu = now, used

    def begin(self) -> None:
        self.wall = self.cpu = 0.0


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


@asynccontextmanager
async def door(folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """(an operator's client, one with a tenant's key) of a server with keys."""
    (folder / "model").mkdir()
    model = str(tiny.model(folder / "model"))
    many = ["--changes-per-minute", str(10**9), "--reads-per-minute", str(10**9), "--no-drift"]
    config = load([model, "--name", "base", "--data-dir", str(folder / "data"), *many], {})
    object.__setattr__(config, "admin_keys", keys_hashed(["run"]))
    async with Started(config, Door(model)) as operator:
        operator.headers["authorization"] = "Bearer run"
        operator._transport.raise_app_exceptions = False  # type: ignore[attr-defined]
        yield operator, await issued(operator, "hostile", "inference", "adapters:write")


async def drawn(client: httpx.AsyncClient, bodies: int, most: int, seed: int, only: str = "") -> AsyncIterator[Sent]:
    """So many bodies over all routes in turn."""
    document = (await client.get("/openapi.json")).json()
    taken = [route for route in routes(document) if re.search(only, route[1])]
    for number in range(bodies):
        method, path, names = taken[number % len(taken)]
        like, content = body(random.Random(f"{seed} {number}"), names, most)
        yield Sent(method, path, content, like)


async def asked(client: httpx.AsyncClient, requests: AsyncIterator[Sent], progress: int = 0) -> dict[str, Seen]:
    """What was seen of these, by route; told of on stderr after each `progress`."""
    seen: dict[str, Seen] = {}
    loop = Loop()
    watching = asyncio.create_task(loop.watch())
    began, number = time.monotonic(), 0
    async for sent in requests:
        await _ask(client, sent, seen.setdefault(f"{sent.method} {sent.path}", Seen()), loop)
        number += 1
        if progress and not number % progress:
            cpu, rss = max(found.cpu for found in seen.values()), memory("VmRSS") >> 20
            took = time.monotonic() - began
            print(f"{number} in {took:.0f} s, stall {1000 * cpu:.0f} ms of CPU, {rss} MiB", file=sys.stderr)
    watching.cancel()
    return seen


async def _ask(client: httpx.AsyncClient, sent: Sent, found: Seen, loop: Loop) -> None:
    rest = _reset() if len(sent.body) >= MEASURED else 0
    await asyncio.sleep(0)
    loop.begin()
    headers = {"content-type": "application/json"}
    answer = await client.request(sent.method, sent.path, content=sent.body, headers=headers)
    found.statuses[answer.status_code] += 1
    found.wall = max(found.wall, loop.wall)
    if loop.cpu > found.cpu:
        found.cpu, found.slowest = loop.cpu, sent
    if rest and (times := (memory("VmHWM") - rest) / len(sent.body)) > found.times:
        found.times, found.largest = times, sent
    if answer.status_code >= 500 and answer.status_code not in (503, 507):
        found.failures.append(f"{answer.status_code} for {sent.text}: {answer.text[:200]}")
        found.failed.append(sent)


async def sent(client: httpx.AsyncClient, bodies: int, most: int, seed: int, only: str = "") -> dict[str, Seen]:
    """What was seen of so many bodies over all routes, by route."""
    return await asked(client, drawn(client, bodies, most, seed, only))


def _reset() -> int:
    """Begin the peak of memory anew; what is taken now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")  # not VmRSS: a thread may give memory back in between


async def replayed(file: Path) -> AsyncIterator[Sent]:
    for line in file.read_text().splitlines():
        yield Sent.read(line)


async def campaign(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="loradock-door-") as name:
        async with door(Path(name)) as (_, client):
            await sent(client, 2000, arguments.most, arguments.seed + 1)  # what is made once is made
            quiet = asyncio.create_task(collect_in_quiet(lambda: 1))  # as in a server
            await asyncio.sleep(QUIET)
            rest = memory("VmRSS")
            drawing = drawn(client, arguments.bodies, arguments.most, arguments.seed, arguments.only)
            seen = await asked(client, replayed(arguments.replay) if arguments.replay else drawing, 1000)
            await asyncio.sleep(QUIET)
            after = memory("VmRSS")
            quiet.cancel()
    if arguments.worst:
        arguments.worst.write_text("".join(f"{line}\n" for found in seen.values() for line in found.worst()))
    if arguments.out:
        arguments.out.write_text(json.dumps({route: found.described() for route, found in seen.items()}, indent=1))
    return told(seen, rest, after, arguments)


def told(seen: dict[str, Seen], rest: int, after: int, arguments: argparse.Namespace) -> int:
    """The table, and 1 for a finding."""
    print("| route | answers | longest stall (ms of CPU, by the wall) | by | memory (times the body) |")
    print("|---|---|---|---|---|")
    for route, found in sorted(seen.items(), key=lambda item: -item[1].cpu):
        statuses = ", ".join(f"{count} × {status}" for status, count in sorted(found.statuses.items()))
        slowest = found.slowest.text if found.slowest else ""
        stall = f"{1000 * found.cpu:.0f}, {1000 * found.wall:.0f}"
        print(f"| {route} | {statuses} | {stall} | {slowest} | {found.times:.1f} |")
    failures = [failure for found in seen.values() for failure in found.failures]
    print(*failures, sep="\n")
    bodies = sum(found.statuses.total() for found in seen.values())
    cpu, times = (max(getattr(found, what) for found in seen.values()) for what in ("cpu", "times"))
    print(f"{bodies} bodies: longest stall {1000 * cpu:.0f} ms of CPU, peak {times:.1f} times the body, ", end="")
    print(f"memory {rest >> 20} MiB before and {after >> 20} after ({100 * (after - rest) / rest:+.1f} %)")
    grown = after > rest * (1 + GROWTH)
    return int(bool(failures) or cpu > arguments.stall or times > arguments.times or grown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--most", type=int, default=4 << 20, help="bytes of the largest body")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stall", type=float, default=0.25, help="seconds of the event loop that are a finding")
    parser.add_argument("--times", type=float, default=20.0, help="of a body in memory that are a finding")
    parser.add_argument("--only", default="", help="routes whose path this regular expression matches")
    parser.add_argument("--out", type=Path, help="where what was seen goes as JSON")
    parser.add_argument("--worst", type=Path, help="where the worst bodies of each route go")
    parser.add_argument("--replay", type=Path, help="send the bodies of such a file instead")
    return asyncio.run(campaign(parser.parse_args()))


if __name__ == "__main__":
    raise SystemExit(main())
