"""What somebody does who has just installed loradock: type commands, ask, push; all of it is written down."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.support.server import START_SECONDS, descendants, tail


class Terminal:
    """An empty folder, an environment without a checkout, and a log of what was typed there and what came."""

    def __init__(self, folder: Path, environ: Mapping[str, str], shown: Mapping[str, str] = {}) -> None:
        self.folder = folder
        self.environ = dict(environ)
        self.lines: list[str] = []
        self._shown = shown  # paths of this machine -> what stands for them in the log

    def type(self, command: str, lines: int = 12, timeout: float = 3600) -> str:
        """Run a command in bash; what it prints. It must succeed."""
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        self.note(f"$ {command}", *done.stdout.rstrip().splitlines()[-lines:])
        self.note(f"({time.monotonic() - began:.0f} s)")
        if done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout

    def note(self, *lines: str) -> None:
        """Write lines into the log, and show them."""
        for line in lines:
            for path, words in self._shown.items():
                line = line.replace(path, words)
            self.lines.append(line)
            print(line, flush=True)

    @contextmanager
    def serving(self, command: Sequence[str], url: str, server: Callable[[int], int] = int) -> Iterator[int]:
        """The id of a process that serves meanwhile, and ends in exit code 0 when its `server` gets SIGTERM."""
        began = time.monotonic()
        self.note(f"$ {' '.join(command)} &")
        with tempfile.NamedTemporaryFile(prefix="loradock-", suffix=".log") as out:
            log = Path(out.name)
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
            try:
                while not answers(f"{url}/ready"):
                    if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                        raise AssertionError(f"the server is not ready:\n{tail(log)}")
                    time.sleep(0.2)
                self.note(f"(ready after {time.monotonic() - began:.0f} s)")
                yield process.pid
                began = time.monotonic()
                os.kill(server(process.pid), signal.SIGTERM)
                code = process.wait(90)
                self.note(f"(SIGTERM: exit code {code} after {time.monotonic() - began:.0f} s)")
                assert code == 0, tail(log)
            finally:
                family = descendants(process.pid)
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                for pid in family:  # a container's processes have groups of their own
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


def chat(model: str, url: str) -> str:
    """The command that asks for the capital of France, as on the pages."""
    body = (
        f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}], '
        '"temperature": 0, "max_tokens": 16}'
    )
    return f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def content(answer: str) -> str:
    """What the model said."""
    text = re.search(r'"content":\s*"((?:[^"\\]|\\.)*)"', answer)
    assert text, answer
    return text[1]
