"""Client libraries and load tools of others against the real engine, each in an environment of its own.

    python -m tests.campaigns.clients [NAME ...] [--folder DIR] [--json FILE]

Each is installed from its registry (PyPI by pip, npm) into DIR, or a folder that is removed afterwards, and asks a
server with the embedded model and one adapter: a chat, a stream, an adapter by its name, a structured answer, as far as
it can. What fails is named with its reason; the exit code is 1 then. Needs npm for those in JavaScript, which are
skipped without it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.lora import trained
from tests.support.server import BASE, ROOT, SMALL, Server, environment

SCRIPTS = ROOT / "tests/support/clients"
ADAPTER, WORD = "voice", "alpha"
INSTALL_SECONDS, CLIENT_SECONDS = 900.0, 300.0


@dataclass(frozen=True)
class Client:
    """A library by its name in SCRIPTS, and what is installed for it; the first package is the library itself."""

    name: str
    packages: tuple[str, ...]
    script: str = "python_clients.py"

    @property
    def in_javascript(self) -> bool:
        return not self.script.endswith(".py")

    @property
    def package(self) -> str:
        return re.sub(r"(?<=.)[=@].*", "", self.packages[0])


CLIENTS = (
    Client("langchain_openai", ("langchain-openai==1.7.4",)),
    Client("litellm", ("litellm==1.110.2",)),
    Client("llm", ("llm==0.36",)),
    Client("instructor", ("instructor==1.17.0",)),
    Client("pydantic_ai", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("openai_agents", ("openai-agents==0.24.0",)),
    Client("llama_index", ("llama-index-llms-openai-like==0.8.1",)),
    Client("dspy", ("dspy==3.4.1",)),
    Client("outlines", ("outlines==1.3.3", "openai")),
    Client("haystack", ("haystack-ai==3.4.1",)),
    Client("smolagents", ("smolagents[openai]==1.26.0",)),
    Client("semantic_kernel", ("semantic-kernel==1.45.0",)),
    Client("openai", ("openai@6.49.0",), "javascript_clients.mjs"),
    Client("anthropic", ("@anthropic-ai/sdk@1.14.0",), "javascript_clients.mjs"),
    Client("ai", ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92"), "javascript_clients.mjs"),
    Client("langchain", ("@langchain/openai@1.5.8", "@langchain/core@1.4.0"), "javascript_clients.mjs"),
    Client("autocannon", ("autocannon@9.0.0",), "autocannon"),
    Client("aiperf", ("aiperf==0.13.0",), "aiperf.py"),
)


@dataclass(frozen=True)
class Outcome:
    client: Client
    version: str = ""
    works: tuple[str, ...] = ()
    fails: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        said = f"fails: {self.fails}" if self.fails else ", ".join(self.works)
        return f"{self.client.package} {self.version}  ({self.seconds:.0f} s)  {said}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="which of them (default: all)")
    parser.add_argument("--folder", type=Path, help="where they are installed, and kept")
    parser.add_argument("--json", type=Path, help="where the outcomes go, too")
    options = parser.parse_args()
    unknown = set(options.names) - {client.name for client in CLIENTS}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there is {', '.join(each.name for each in CLIENTS)}")
    chosen = [client for client in CLIENTS if not options.names or client.name in options.names]
    if shutil.which("npm") is None:
        print("npm is not installed: those in JavaScript are skipped")
        chosen = [client for client in chosen if not client.in_javascript]
    with (
        _folder(options.folder) as folder,
        tempfile.TemporaryDirectory(prefix="loradock-clients-") as data,
        Server(Path(data) / "data", Path(data) / "log", *SMALL) as server,
    ):
        server.upload(ADAPTER, trained(WORD)[WORD]).raise_for_status()
        outcomes = [_tried(client, folder / client.name, server.url) for client in chosen]
    if options.json:
        rows = [{"client": each.client.package, "version": each.version, "works": each.works, "fails": each.fails}
                for each in outcomes]  # fmt: skip
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = [outcome for outcome in outcomes if outcome.fails]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} work")
    return int(bool(failed))


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given:
        yield given.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="loradock-clients-") as name:
        yield Path(name)


def _tried(client: Client, folder: Path, url: str) -> Outcome:
    began, version = time.monotonic(), ""
    try:
        version = _installed_by_npm(client, folder) if client.in_javascript else _installed_by_pip(client, folder)
        works = LOADS.get(client.name, _asked)(client, folder, url)
        outcome = Outcome(client, version, tuple(works), seconds=time.monotonic() - began)
    except (AssertionError, subprocess.SubprocessError) as error:
        outcome = Outcome(client, version, fails=" ".join(str(error).split()), seconds=time.monotonic() - began)
    print(outcome, flush=True)
    return outcome


def _installed_by_pip(client: Client, folder: Path) -> str:
    python = folder / "bin/python"
    if not python.exists():
        uv = folder.parent / "uv/bin/uv"  # in a fraction of pip's time
        if not uv.exists():
            pip = [str(uv.with_name("python")), "-m", "pip", "install", "--quiet", "uv"]
            for command in ([sys.executable, "-m", "venv", str(uv.parents[1])], pip):
                _done(command, folder.parent, INSTALL_SECONDS)
        install = [str(uv), "pip", "install", "--quiet", "--python", str(python), *client.packages]
        for command in ([str(uv), "venv", "--quiet", "--python", sys.executable, str(folder)], install):
            _done(command, folder.parent, INSTALL_SECONDS)
    code = f"import importlib.metadata; print(importlib.metadata.version({client.package.partition('[')[0]!r}))"
    return _done([str(python), "-c", code], folder, CLIENT_SECONDS).strip()


def _installed_by_npm(client: Client, folder: Path) -> str:
    if not (folder / "node_modules").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}\n')
        _done(["npm", "install", "--silent", "--no-audit", "--no-fund", *client.packages], folder, INSTALL_SECONDS)
    return str(json.loads((folder / "node_modules" / client.package / "package.json").read_text())["version"])


def _asked(client: Client, folder: Path, url: str) -> list[str]:
    """The kinds of what it asked; each must have been answered rightly."""
    if client.in_javascript:
        shutil.copy(SCRIPTS / client.script, folder)
        command = ["node", client.script, client.name]
    else:
        command = [str(folder / "bin/python"), str(SCRIPTS / client.script), client.name]
    told = {"URL": f"{url}/v1", "KEY": "none", "MODEL": BASE, "ADAPTER": ADAPTER, "HOME": str(folder)}
    answers = json.loads(_done(command, folder, CLIENT_SECONDS, told).splitlines()[-1])
    wrong = {kind: answer for kind, answer in answers.items() if not _is_right(kind, answer)}
    assert not wrong, f"answers that are not right: {wrong}"
    return list(answers)


def _is_right(kind: str, answer: Any) -> bool:
    if kind == "stream":
        return len(answer) > 2 and "Paris" in "".join(answer)
    if kind == "structured":
        return isinstance(answer, str) and bool(answer)
    return str(answer).lower().startswith(WORD) if kind == "adapter" else "Paris" in answer


def _autocannon(client: Client, folder: Path, url: str) -> list[str]:
    body = {"model": ADAPTER, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    command = ["node_modules/.bin/autocannon", "--json", "--amount", "12", "--connections", "3", "--method", "POST",
               "--headers", "content-type=application/json", "--body", json.dumps(body),
               f"{url}/v1/chat/completions"]  # fmt: skip
    result = json.loads(_done(command, folder, CLIENT_SECONDS))
    assert (result["2xx"], result["non2xx"], result["errors"]) == (12, 0, 0), result
    return ["12 chats"]


def _aiperf(client: Client, folder: Path, url: str) -> list[str]:
    from serve.models.embedded import ensure

    command = [str(folder / "bin/aiperf"), "profile", "--model", ADAPTER, "--url", url, "--endpoint-type", "chat",
               "--streaming", "--request-count", "12", "--concurrency", "3", "--synthetic-input-tokens-mean", "32",
               "--output-tokens-mean", "8", "--tokenizer", str(ensure(BASE)), "--ui", "none",
               "--artifact-dir", str(folder / "artifacts")]  # fmt: skip
    _done(command, folder, CLIENT_SECONDS, {"HOME": str(folder)})
    (file,) = (folder / "artifacts").rglob("profile_export_aiperf.json")
    result = json.loads(file.read_text())
    assert result["request_count"]["avg"] == 12, result
    return ["12 streams"]


LOADS: dict[str, Callable[[Client, Path, str], list[str]]] = {"autocannon": _autocannon, "aiperf": _aiperf}


def _done(command: list[str], folder: Path, seconds: float, more: dict[str, str] | None = None) -> str:
    """What it prints; else AssertionError with its last words."""
    environ = {name: value for name, value in environment(**more or {}).items() if name != "PYTHONPATH"}
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=seconds, check=False
    )
    said = (done.stderr or done.stdout)[-600:]
    assert done.returncode == 0, f"{Path(command[0]).name} ended with {done.returncode}: {said}"
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
