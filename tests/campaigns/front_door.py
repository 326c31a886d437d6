"""Bodies that no honest client sends, to every route: the longest stall of the event loop and the memory for each.

    python -m tests.campaigns.front_door [--bodies 20000] [--most 4194304] [--seed 1] [--only REGEX] [--out FILE]

Every route of /openapi.json that takes a body, those of inference too, over a backend that looks at a body as vLLM's
routes do (its own request models) and computes nothing. The bodies: wrong types in bulk for every field that the
document names, deep, wide, huge numbers, long keys, halves. An answer of 500, a stall above `--stall` or a peak of
memory above `--times` of the body is a finding; so is memory at the end that the beginning did not have.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaValidator
from starlette.requests import Request
from starlette.responses import JSONResponse

from serve.config import keys_hashed, load
from serve.vllm_backend.first_error import ends_at_first_error, refused
from serve.vllm_backend.request_schemas import REQUESTS, request_type
from tests.support import tiny
from tests.support.app import Started, issued
from tests.support.backend import FakeBackend

SIZES = (1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20)
# Below this size of a body the pages of the process say nothing about it.
MEASURED = 64 << 10
PARAMETERS = {"name": "tone", "version": "1", "id": "none", "model": "base", "worker": "w", "file": "a"}


class Door(FakeBackend):
    """Looks at each body with the models of vLLM's routes, as vLLM's app does."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        schemas = {path: TypeAdapter(request_type(path)).core_schema for path in REQUESTS}
        self._models = {
            path: SchemaValidator(ends_at_first_error(schema), _use_prebuilt=False) for path, schema in schemas.items()
        }

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        body = await request.json() if scope["method"] == "POST" else {}
        answer, status = {"model": body.get("model")}, 200
        if validator := self._models.get(scope["path"]):
            try:
                validator.validate_python(body)
            except ValidationError as error:
                answer, status = refused(error.errors(include_url=False)).body(), 400
            except Exception as error:  # vLLM's own checks
                answer, status = {"error": {"message": str(error)[:500]}}, 400
        await JSONResponse(answer, status)(scope, receive, send)


@dataclass
class Seen:
    """What came of the bodies to one route."""

    statuses: Counter[int] = field(default_factory=Counter)
    stall: float = 0.0
    slowest: str = ""
    times: float = 0.0
    failures: list[str] = field(default_factory=list)


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
        self.longest = 0.0

    async def watch(self) -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            self.longest = max(self.longest, now - before)
            before = now


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


async def sent(client: httpx.AsyncClient, bodies: int, most: int, seed: int, only: str = "") -> dict[str, Seen]:
    """So many bodies over all routes in turn; what was seen, by route."""
    chance, seen = random.Random(seed), {}
    document = (await client.get("/openapi.json")).json()
    taken = [route for route in routes(document) if re.search(only, route[1])]
    headers = {"content-type": "application/json"}
    loop = Loop()
    watching = asyncio.create_task(loop.watch())
    for number in range(bodies):
        method, path, names = taken[number % len(taken)]
        said, content = body(chance, names, most)
        found = seen.setdefault(f"{method} {path}", Seen())
        gc.collect(1)
        rest = _reset() if len(content) >= MEASURED else 0
        await asyncio.sleep(0)
        loop.longest = 0.0
        answer = await client.request(method, path, content=content, headers=headers)
        found.statuses[answer.status_code] += 1
        if loop.longest > found.stall:
            found.stall, found.slowest = loop.longest, f"{said}, {len(content)} bytes"
        if rest:
            found.times = max(found.times, (memory("VmHWM") - rest) / len(content))
        if answer.status_code >= 500 and answer.status_code not in (503, 507):
            found.failures.append(f"{answer.status_code} for {said}, {len(content)} bytes: {answer.text[:200]}")
    watching.cancel()
    return seen


def _reset() -> int:
    """Begin the peak of memory anew; what is taken now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


async def campaign(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="loradock-door-") as name:
        async with door(Path(name)) as (_, client):
            await sent(client, 400, arguments.most, arguments.seed + 1)  # what is made once is made
            # A server looks for garbage when it is quiet, and not through what was there when it had started.
            gc.collect()
            gc.freeze()
            gc.set_threshold(700, 10, 1_000_000)
            rest = memory("VmRSS")
            seen = await sent(client, arguments.bodies, arguments.most, arguments.seed, arguments.only)
            gc.collect()
            after = memory("VmRSS")
    print("| route | answers | longest stall (ms) | by | peak of memory (times the body) |\n|---|---|---|---|---|")
    for route, found in sorted(seen.items(), key=lambda item: -item[1].stall):
        statuses = ", ".join(f"{count} × {status}" for status, count in sorted(found.statuses.items()))
        print(f"| {route} | {statuses} | {1000 * found.stall:.0f} | {found.slowest} | {found.times:.1f} |")
    failures = [failure for found in seen.values() for failure in found.failures]
    print(*failures, sep="\n")
    stall, times = (max(getattr(found, what) for found in seen.values()) for what in ("stall", "times"))
    print(f"{arguments.bodies} bodies: longest stall {1000 * stall:.0f} ms, peak {times:.1f} times the body, ", end="")
    print(f"memory {rest >> 20} MiB before and {after >> 20} after ({100 * (after - rest) / rest:+.1f} %)")
    if arguments.out:
        arguments.out.write_text(json.dumps({route: vars(found) for route, found in seen.items()}, indent=1))
    return int(bool(failures) or stall > arguments.stall or times > arguments.times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--most", type=int, default=4 << 20, help="bytes of the largest body")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stall", type=float, default=0.25, help="seconds of the event loop that are a finding")
    parser.add_argument("--times", type=float, default=20.0, help="of a body in memory that are a finding")
    parser.add_argument("--only", default="", help="routes whose path this regular expression matches")
    parser.add_argument("--out", type=Path, help="where what was seen goes as JSON")
    return asyncio.run(campaign(parser.parse_args()))


if __name__ == "__main__":
    raise SystemExit(main())
