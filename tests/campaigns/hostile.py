"""`make hostile`: every kind of hostile request in turn, beside a victim who streams and an operator who works.

A live server on the embedded model, three tenants. While each kind is sent for some seconds by four clients in a
process of their own, a victim of another tenant streams answers with log-probabilities, lists and pins its adapter, an
operator promotes and scrapes, and somebody asks /health fifty times a second. Afterwards: did the engine restart, was
anything of the victim's lost or wrong, how long did he wait (against as many honest clients), are memory and
descriptors back?

    python -m tests.campaigns.hostile [--seconds 10] [--settle 120] [--only TEXT ...] [--json FILE]

`--seconds 2 --settle 3` is ten minutes for all kinds. Slow kinds, whose first token takes more than twice that beside
honest requests or whose lists and pins take more than a second, are named at the end; they count on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.support import hostile_adapters, identity
from tests.support.crowd import descriptors, memory
from tests.support.event_lines import event_lines
from tests.support.hostile_kinds import CHAT, COMPLETIONS, KINDS, RESPONSES, SAY, Target, bombs, fuzzed
from tests.support.lora import WORDS, trained, variant
from tests.support.server import ADMIN, KEYS, SMALL, Server, bearer, done

CLIENTS = 4
QUESTION = {"messages": [{"role": "user", "content": "Tell me about rivers."}], "max_tokens": 24, "temperature": 0}
# What the victim's tenant does with its adapter, and how long each may take, in seconds.
OWN = (
    ("GET", "/v1/adapters"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/adapters/own/pin"),
    ("DELETE", "/v1/adapters/own/pin"),
)
LISTED = 1.0
# A token's log-probability moves by this much with what else is in its batch.
ROUNDING = 0.25
VOCABULARY = 49_152
HONEST = "honest requests, as many (what the others are held against)"
HONEST_LONG = "honest requests with prompts of 1,900 tokens, as many (what long prompts are held against)"


@dataclass
class Seen:
    """What one kind did to everybody else."""

    kind: str
    outcome: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    first_token: float = 0.0
    between_tokens: float = 0.0
    health: float = 0.0
    operator: float = 0.0
    lists: float = 0.0
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: float = 0.0
    descriptors: int = 0

    @property
    def failed(self) -> bool:
        broken = [status for status in self.outcome if status.startswith("5") and status not in ("503", "504")]
        return bool(self.restarts or self.wrong or broken)


class Stage:
    """The server, its tenants' keys, and what the victim hears when nobody else is there."""

    def __init__(self, server: Server, adapters: dict[str, Path], head: Path) -> None:
        self.server = server
        self.victim = self._key("victim", "inference")
        self.hostile = self._key("hostile", "inference")
        self.manager = self._key("hostile", "adapters:write")
        self.owner = self._key("victim", "adapters:write")
        done(server.upload("tone", adapters["alpha"]))
        done(server.upload("tone", adapters["bravo"]))
        done(server.http.post("/v1/adapters/tone/visibility", json={"visibility": "shared"}))
        for name, folder, key in (("head", head, self.manager), ("own", adapters["alpha"], self.owner)):
            files = [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]
            done(server.http.post("/v1/adapters", data={"name": name}, files=files, headers=bearer(key)))
        self.quiet = {model: self.ask(model)[2] for model in ("smollm2", "default/tone@v1")}

    def _key(self, tenant: str, scope: str) -> str:
        asked = {"tenant": tenant, "name": scope.partition(":")[0], "scopes": [scope]}
        key: str = done(self.server.http.post("/v1/keys", json=asked))["secret"]
        return key

    def ask(self, model: str) -> tuple[float, list[float], list[tuple[str, float]]]:
        """Seconds to the first token, between tokens, and each token with its log-probability."""
        tokens: list[tuple[str, float]] = []
        gaps: list[float] = []
        body = {"model": model, **QUESTION, "stream": True, "logprobs": True}
        began = last = time.monotonic()
        first = 0.0
        with self.server.http.stream("POST", CHAT, json=body, headers=bearer(self.victim), timeout=120) as answer:
            if answer.status_code != 200:
                raise AssertionError(f"{answer.status_code}: {answer.read()[:200]!r}")
            for line in event_lines(answer):
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line[6:]).get("choices", ()):
                    said = (choice.get("logprobs") or {}).get("content") or ()
                    if said:
                        now = time.monotonic()
                        first, gaps = (now - began, gaps) if not first else (first, [*gaps, now - last])
                        last = now
                    tokens += [(token["token"], token["logprob"]) for token in said]
        return first, gaps, tokens

    def restarts(self) -> int:
        return sum(row.get("restarts", 0) for row in done(self.server.http.get("/v1/engines"))["data"])


def owner(stage: Stage, seen: Seen, stop: threading.Event) -> None:
    """The victim's tenant lists and pins its adapter."""
    with httpx.Client(base_url=stage.server.url, headers=bearer(stage.owner), timeout=60) as client:
        while not stop.wait(0.5):
            for method, path in OWN:
                began = time.monotonic()
                try:
                    answer = client.request(method, path)
                    assert answer.status_code < 300, f"{path}: {answer.status_code} {answer.text[:100]}"
                except (AssertionError, httpx.HTTPError) as error:
                    seen.wrong.append(f"owner: {error!r}"[:200])
                seen.lists = max(seen.lists, time.monotonic() - began)


@contextmanager
def watched(stage: Stage, seen: Seen) -> Iterator[threading.Event]:
    """The victim, the operator and whoever asks for health, until the block ends."""
    stop = threading.Event()
    firsts: list[float] = []
    gaps: list[float] = []
    waits: list[float] = []

    def victim() -> None:
        while not stop.is_set():
            for model, quiet in stage.quiet.items():
                try:
                    first, between, tokens = stage.ask(model)
                except (AssertionError, httpx.HTTPError) as error:
                    seen.wrong.append(f"{model}: {error!r}"[:200])
                    continue
                firsts.append(first)
                gaps.extend(between)
                seen.answers += 1
                if difference := differs(tokens, quiet):
                    seen.wrong.append(f"{model}: {difference}")

    def operator() -> None:
        version = 0
        while not stop.wait(0.5):
            began = time.monotonic()
            version = version % 2 + 1
            with httpx.Client(base_url=stage.server.url, headers=bearer(ADMIN), timeout=60) as client:
                try:
                    done(client.post("/v1/adapters/tone/promote", json={"version": version}))
                    assert client.get("/metrics").status_code == 200
                except (AssertionError, httpx.HTTPError) as error:
                    seen.wrong.append(f"operator: {error!r}"[:200])
            waits.append(time.monotonic() - began)

    parent, child = multiprocessing.Pipe()
    health = multiprocessing.get_context("spawn").Process(target=ask_health, args=(stage.server.port, child))
    threads = [threading.Thread(target=each) for each in (victim, operator)]
    threads.append(threading.Thread(target=owner, args=(stage, seen, stop)))
    health.start()
    parent.recv()
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        parent.send("stop")
        for thread in threads:
            thread.join(180)
        seen.health = p99(parent.recv())
        health.join(10)
        seen.first_token, seen.between_tokens = p99(firsts), p99(gaps)
        seen.operator = max(waits, default=0.0)


def differs(tokens: list[tuple[str, float]], quiet: list[tuple[str, float]]) -> str:
    """What is wrong with an answer, held against the quiet one up to the first token where they may part."""
    for place, ((token, logprob), (expected, before)) in enumerate(zip(tokens, quiet, strict=False)):
        if token != expected:
            return (
                ""
                if abs(logprob - before) < ROUNDING
                else f"token {place}: {token!r} {logprob:.3f}, {expected!r} {before:.3f}"
            )
        if abs(logprob - before) > ROUNDING:
            return f"token {place} {token!r}: {logprob:.3f} was {before:.3f}"
    return "" if len(tokens) >= min(4, len(quiet)) else f"{len(tokens)} tokens of {len(quiet)}"


def ask_health(port: int, pipe: Any) -> None:
    """In a process of its own, so that nobody's work here is taken for the server's."""
    times: list[float] = []
    pipe.send("ready")
    while not pipe.poll(0.02):
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            connection.getresponse().read()
        connection.close()
        times.append(time.monotonic() - began)
    pipe.send(times)


def attack_once(port: int, key: str, manager: str, pipe: Any) -> None:
    """In a process of its own: every kind, once, one after the other."""
    prepare()
    started(pipe)

    async def run() -> dict[str, dict[str, int]]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            target = Target(port, key, manager, client)
            return {kind: dict(await send(target)) for kind, send in KINDS.items()}

    pipe.send(asyncio.run(run()))


def sweep(stage: Stage, seconds: float = 400) -> tuple[dict[str, dict[str, int]], Seen]:
    """Every kind once: what came back of each, and what all of them together did to the others."""
    seen = Seen("all")
    restarts, open_files = stage.restarts(), descriptors(stage.server)
    parent, child = multiprocessing.Pipe()
    words = (stage.server.port, stage.hostile, stage.manager, child)
    attacker = multiprocessing.get_context("spawn").Process(target=attack_once, args=words)
    outcomes: dict[str, dict[str, int]] = {}
    attacker.start()
    parent.recv()
    with watched(stage, seen):
        parent.send("go")
        if parent.poll(seconds):
            outcomes = parent.recv()
        attacker.join(10)
        if attacker.is_alive():
            attacker.kill()
    seen.restarts = stage.restarts() - restarts
    seen.descriptors = descriptors(stage.server) - open_files
    return outcomes, seen


def attack(port: int, key: str, manager: str, kind: str, seconds: float, clients: int, pipe: Any) -> None:
    """In a process of its own: this kind, over and over, for so long; at least once."""
    prepare()
    started(pipe)

    async def run() -> Counter[str]:
        counted: Counter[str] = Counter()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as client:
            target = Target(port, key, manager, client)
            until = time.monotonic() + seconds

            async def send() -> None:
                while True:
                    if kind in (HONEST, HONEST_LONG):
                        counted[await target.post(*honest(kind))] += 1
                    else:
                        counted.update(await KINDS[kind](target))
                    if time.monotonic() >= until:
                        return

            await asyncio.gather(*[send() for _ in range(clients)])
        return counted

    pipe.send(dict(asyncio.run(run())))


def honest(kind: str) -> tuple[str, dict[str, Any]]:
    if kind == HONEST:
        return CHAT, {"model": "smollm2", "messages": SAY, "max_tokens": 16}
    prompt = f"{random.random()} " + "word " * 1880  # none is in the prefix cache
    return COMPLETIONS, {"model": "smollm2", "prompt": prompt, "max_tokens": 16}


def started(pipe: Any) -> None:
    """What this process's own start costs is nobody's request: the others are watched from here on."""
    bombs()
    hostile_adapters.weights()
    pipe.send("ready")
    pipe.recv()


def prepare() -> None:
    """Kinds that come from vLLM's own request models."""
    if any("every field" in kind for kind in KINDS):
        return
    fields = json.loads((Path(tempfile.gettempdir()) / "loradock-request-fields.json").read_text())
    fuzzed(CHAT, fields["chat"], {"messages": SAY, "max_tokens": 2})
    fuzzed(COMPLETIONS, fields["completion"], {"prompt": "Say", "max_tokens": 2})
    fuzzed(RESPONSES, fields["responses"], {"input": "Say", "max_output_tokens": 2})
    fuzzed("/tokenize", fields["tokenize"], {"prompt": "Say"})
    fuzzed("/v1/messages", fields["messages"], {"messages": SAY, "max_tokens": 2})


def write_fields() -> None:
    """The names of the fields of vLLM's request models, for `prepare`."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest

    models = {
        "chat": ChatCompletionRequest,
        "completion": CompletionRequest,
        "responses": ResponsesRequest,
        "tokenize": TokenizeCompletionRequest,
        "messages": AnthropicMessagesRequest,
    }
    names = {name: sorted(set(model.model_fields) - {"model"}) for name, model in models.items()}
    (Path(tempfile.gettempdir()) / "loradock-request-fields.json").write_text(json.dumps(names))


def measure(stage: Stage, kind: str, seconds: float, settle: float, clients: int = CLIENTS) -> Seen:
    """One kind, and what it did."""
    seen = Seen(kind)
    restarts, began, open_files = stage.restarts(), memory(stage.server), descriptors(stage.server)
    parent, child = multiprocessing.Pipe()
    words = (stage.server.port, stage.hostile, stage.manager, kind, seconds, clients, child)
    attacker = multiprocessing.get_context("spawn").Process(target=attack, args=words)
    attacker.start()
    parent.recv()
    with watched(stage, seen):
        parent.send("go")
        if parent.poll(seconds + 300):
            seen.outcome = parent.recv()
        else:
            seen.wrong.append("the hostile clients never ended")
        attacker.join(10)
        if attacker.is_alive():
            attacker.kill()
    until = time.monotonic() + settle
    while True:
        seen.restarts = stage.restarts() - restarts
        seen.memory = memory(stage.server) / began - 1
        seen.descriptors = descriptors(stage.server) - open_files
        back = seen.memory <= 0.05 and seen.descriptors <= max(5, 0.05 * open_files)
        if back or time.monotonic() >= until:
            return seen
        time.sleep(1)


def p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] if ordered else 0.0


def table(rows: list[Seen]) -> str:
    lines = [
        "| kind | what came back | restarts | victim: first token, between tokens, p99 ms "
        "| its lists and pins, worst ms | /health p99 ms | wrong | memory | descriptors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        outcome = ", ".join(f"{count} x {status}" for status, count in sorted(row.outcome.items()))
        waits = f"{row.first_token * 1000:.0f}, {row.between_tokens * 1000:.0f} | {row.lists * 1000:.0f}"
        waits += f" | {row.health * 1000:.0f}"
        after = f"{len(row.wrong)} | {row.memory:+.1%} | {row.descriptors:+d}"
        lines.append(f"| {row.kind} | {outcome} | {row.restarts} | {waits} | {after} |")
    return "\n".join(lines)


def on_head(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """The adapter works on the output layer too."""
    draw = np.random.default_rng(0)
    width = next(value.shape[1] for name, value in tensors.items() if "q_proj.lora_A" in name)
    tensors["base_model.model.lm_head.lora_A.weight"] = draw.standard_normal((8, width), np.float32) * 0.05
    tensors["base_model.model.lm_head.lora_B.weight"] = draw.standard_normal((VOCABULARY, 8), np.float32) * 0.05
    config["target_modules"] = [*config["target_modules"], "lm_head"]


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """The server with its tenants."""
    write_fields()
    prepare()
    adapters = trained(*WORDS)
    head = variant(adapters["charlie"], folder / "head", edit=on_head)
    with identity.running() as provider:
        tokens = ("--oidc-issuer", provider.issuer, "--oidc-audience", identity.AUDIENCE)
        with Server(folder / "data", folder / "log", *SMALL, *tokens, "--client-timeout", "10", **KEYS) as server:
            yield Stage(server, adapters, head)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="how long each kind is sent")
    parser.add_argument("--settle", type=float, default=120, help="how long memory and descriptors have to come back")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="how many send it at a time")
    parser.add_argument("--only", nargs="*", default=[""], help="kinds whose name has one of these texts")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        chosen = [kind for kind in KINDS if any(text in kind for text in words.only)]
        kinds = [HONEST, HONEST_LONG, *chosen, HONEST, HONEST_LONG]
        rows = []
        for number, kind in enumerate(kinds):
            print(f"[{number + 1}/{len(kinds)}] {kind}", file=sys.stderr, flush=True)
            rows.append(measure(stage, kind, words.seconds, words.settle, words.clients))
            row = rows[-1]
            print(f"    {row.outcome}, /health {row.health * 1000:.0f} ms, memory {row.memory:+.1%}", file=sys.stderr)
            for line in [*["the engine restarted"] * bool(row.restarts), *row.wrong[:3]]:
                print(f"    !! {line}", file=sys.stderr, flush=True)
    print(table(rows))
    if words.json:
        words.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    failed = [row.kind for row in rows if row.failed]
    usual = max(row.first_token for row in rows if row.kind == HONEST)
    slow = [row.kind for row in rows if row.first_token > 2 * usual or row.lists > LISTED]
    print(f"\nslow: {', '.join(slow) or 'none'} (first token beside honest requests: {1000 * usual:.0f} ms)")
    print(
        f"\n{len(KINDS)} kinds, {len(failed)} failed: {', '.join(failed)}"
        if failed
        else f"\n{len(KINDS)} kinds, none failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
