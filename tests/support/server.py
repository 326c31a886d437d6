"""The real server in a process of its own, and the words to speak with it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from serve.cpu_kernels.build import MARCH
from serve.vllm_backend.patches.switches import VARIABLE
from serve.vllm_backend.patches.table import PATCHES
from tests.support.event_lines import event_lines
from tests.support.lora import WORDS

ROOT = Path(__file__).parents[2]
BASE = "smollm2"
ADMIN, KEY = "an-admin-key-of-the-tests", "an-inference-key-of-the-tests"
KEYS = {"LORADOCK_ADMIN_KEYS": ADMIN, "LORADOCK_API_KEYS": f"another-key,{KEY}"}
MAX_UPLOAD = 16 << 20
SMALL = ("--max-model-len", "4096", "--kv-cache-memory-bytes", "1G")
# A reference that some seconds of traffic fill, and an alarm as soon.
WATCHED = ("--drift-reference", "60", "--drift-threshold", "1e4")
START_SECONDS = 900  # 40 on a quiet machine
# Nobody is given one of these without asking for it by its number.
PORTS = range(20_000, 32_000)
_claimed: list[socket.socket] = []
# Servers run as on a GPU, but for the device: without what is changed in vLLM for a CPU's speed. Their engines are
# spawned then, and not forked.
AS_ON_A_GPU = "LORADOCK_TEST_AS_ON_A_GPU" in os.environ
# Whether this process itself was started with preloaded libraries.
PRELOADS = b"\0LD_PRELOAD=" in b"\0" + Path("/proc/self/environ").read_bytes()


def environment(**more: str) -> dict[str, str]:
    """Ours without anybody's LORADOCK_* settings, and without what vLLM preloads once it has made settings here. The
    kernels stay those of the processor that is asked for.
    """
    own = [name for name in os.environ if name.startswith("LORADOCK_") and name != MARCH]
    own += ["LD_PRELOAD"] * (not PRELOADS)
    clean = {name: value for name, value in os.environ.items() if name not in own}
    if AS_ON_A_GPU:
        clean[VARIABLE] = ",".join(patches_of_a_gpu())
    return {**clean, "PYTHONPATH": str(ROOT), **more}


def patches_of_a_gpu() -> list[str]:
    """The setting `vllm_patches` that leaves out what is for a CPU's speed alone."""
    return [f"no-{patch.name}" for patch in PATCHES if patch.on == "cpu" and patch.kind == "speed"]


def loradock(*arguments: str | Path, timeout: float = 120, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command run to its end."""
    command = [sys.executable, "-m", "serve.cli", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(**environ), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


class Server:
    """`loradock serve smollm2` on a free port, or on this one; a context that ends with the process."""

    def __init__(
        self,
        data: Path,
        log: Path,
        *arguments: str,
        model: str = BASE,
        module: str = "serve.cli",
        root: Path = ROOT,
        port: int = 0,
        **environ: str,
    ) -> None:
        self.data = data
        self.log = log
        # What vLLM's processes say too.
        self.full_log = data / "log" / "server.log"
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.seconds_to_ready = 0.0
        self._began = time.monotonic()
        command = [sys.executable, "-m", module, "serve", model, "--port", str(self.port), "--data-dir", str(data)]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*command, *arguments],
                env=environment(**{"PYTHONPATH": str(root), **environ}),
                cwd=root,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        key = ADMIN if "LORADOCK_ADMIN_KEYS" in environ else None
        self.http = httpx.Client(base_url=self.url, timeout=120, headers=bearer(key))
        self.family: set[int] = set()

    def __enter__(self) -> Server:
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        self.family = descendants(self.process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.family |= descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(45)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.family:  # an engine that outlived its server would take the next one's memory
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def upload(self, name: str, folder: Path, promote: bool | None = True) -> httpx.Response:
        every = [folder] if folder.is_file() else sorted(folder.iterdir())
        files = [("files", (file.name, file.read_bytes())) for file in every]
        return self.push(files, name=name, **({} if promote is None else {"promote": str(promote).lower()}))

    def push(self, files: list[tuple[str, tuple[str, bytes]]], **fields: str) -> httpx.Response:
        return self.http.post("/v1/adapters", data=fields, files=files)

    def promote(self, name: str, version: int) -> dict[str, Any]:
        return done(self.http.post(f"/v1/adapters/{name}/promote", json={"version": version}))

    def adapter(self, name: str) -> dict[str, Any]:
        return done(self.http.get(f"/v1/adapters/{name}"))

    def engine(self) -> dict[str, Any]:
        """The only row of /v1/engines."""
        (row,) = done(self.http.get("/v1/engines"))["data"]
        return row

    def resident(self, name: str) -> set[str]:
        """Ids of the versions of `name` whose weights are in the engine."""
        return {one for one in self.engine()["resident"] if one.partition("@")[0] == name}

    def stored(self) -> set[Path]:
        """Every file in the data directory but the registry's, mixtures, and what is noted of versions that answer."""
        noted = ("registry.sqlite", "popular.")
        # Not rglob: a folder that goes while one looks is an error there.
        every = [Path(folder, name) for folder, _, names in os.walk(self.data) for name in names]
        files = {path for path in every if path.is_file() and not path.name.startswith(noted)}
        return {file for file in files if file.relative_to(self.data).parts[0] not in ("drift", "log", "mixtures")}

    def ask(self, model: str, question: str = "What is the capital of France?", **more: Any) -> Answer:
        """One greedy answer, streamed, read to its end."""
        answer = Answer()
        for _ in self.answering(answer, model, question, **more):
            pass
        return answer

    def answering(self, answer: Answer, model: str, question: str, tokens: int = 16, **more: Any) -> Iterator[None]:
        """Fill `answer` while it streams; yields at each piece of text."""
        body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens}
        body |= {"temperature": 0, "stream": True, **more}
        answer.begun = time.monotonic()
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise AssertionError(f"{response.status_code}: {response.text}")
            for line in event_lines(response):
                if line == "data: [DONE]":
                    answer.done, answer.ended = True, time.monotonic()
                elif line.startswith("data: ") and answer.take(json.loads(line[6:])):
                    yield

    def _wait_until_ready(self) -> None:
        while time.monotonic() - self._began < START_SECONDS:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self.process.returncode}:\n{tail(self.log)}\n{tail(self.full_log)}"
                )
            with suppress(httpx.TransportError):
                if self.http.get("/ready", timeout=5).status_code == 200:
                    self.seconds_to_ready = time.monotonic() - self._began
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the server is not ready after {START_SECONDS} s:\n{self._tails()}")

    def _tails(self) -> str:
        return "\n".join(tail(log) for log in (self.log, self.full_log) if log.exists())


@dataclass
class Answer:
    """What a stream said, by whom, and when; times are the monotonic clock's."""

    begun: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    text: str = ""
    models: set[str] = field(default_factory=set)
    finish: str | None = None
    done: bool = False

    @property
    def model(self) -> str:
        (model,) = self.models
        return model

    @property
    def word(self) -> str | None:
        """The one word that all of the text repeats; None when there is another between."""
        text = self.text.removeprefix(" ")  # a quantized base may begin with one
        for word in WORDS:
            if text and (f"{word} " * len(text)).startswith(text):
                return word
        return None

    def take(self, chunk: dict[str, Any]) -> bool:
        """Whether the chunk had text."""
        if "error" in chunk:
            raise AssertionError(f"the stream broke off: {chunk}")
        self.models.add(chunk["model"])
        for choice in chunk["choices"]:
            self.finish = choice["finish_reason"] or self.finish
            if piece := choice["delta"].get("content"):
                self.first = self.first or time.monotonic()
                self.text += piece
                return True
        return False


def done(response: httpx.Response) -> dict[str, Any]:
    """The body of an answer that must have succeeded."""
    assert response.is_success, f"{response.status_code}: {response.text}"
    body: dict[str, Any] = response.json()
    return body


def refused(response: httpx.Response, status: int) -> str:
    """The message of an error that must have this status and OpenAI's shape."""
    assert response.status_code == status, f"{response.status_code}: {response.text}"
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"] and error["type"]
    assert "Traceback" not in response.text
    message: str = error["message"]
    return message


def bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def free_port() -> int:
    """A port that stays free until the server of it has started, and between two of its starts.

    It is below those that the kernel gives to whoever asks for any, each client's connection too, and no other
    process of tests gets it while this one lives.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0loradock-test-port-{port}")
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claimed.append(claim)
        return port
    raise RuntimeError("no port is free")


def listens(pid: int, port: int) -> bool:
    """Whether this process does, on this port."""
    with suppress(psutil.Error):
        return any(it.status == "LISTEN" and it.laddr.port == port for it in psutil.Process(pid).net_connections())
    return False


def descendants(pid: int) -> set[int]:
    """Ids of the processes that came from `pid` and still have their line of parents to it."""
    found: set[int] = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {child} | descendants(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of the processes that run. A zombie does not, nor one that was killed and that the kernel has not let go
    yet: a guest's was seen to keep one for minutes (serve.vllm_backend.forkserver)."""
    running = set()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            told = {line[0]: line[1] for line in lines if len(line) > 1}
            killed = (int(told["SigPnd:"], 16) | int(told["ShdPnd:"], 16)) >> (signal.SIGKILL - 1) & 1
            if told["State:"] != "Z" and not killed:
                running.add(pid)
    return running


def tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
