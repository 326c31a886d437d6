"""The README, typed by a program: an empty home, a fresh clone, and no command that is not in the README.

    python3 -m tests.campaigns.first_hour [--folder DIR] [--log FILE]

Clones this checkout's last commit below an empty home directory, starts `make serve` in one terminal, and types the
other blocks of the README one after another into a second one. Each command must end well and print what it should.
What was typed, what came and when, is the log; also how long processors worked at least, and what they did beside it.
docs/lab/first-hour.txt is such a log. Any Python runs it: it imports nothing that is not in the standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
SERVER = "http://127.0.0.1:8000"
# Where packages and certificates come from is the machine's to say; all else is as on a fresh one.
PASSED_ON = ("PIP_", "SSL_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "no_proxy")
SETUP_SECONDS, COMMAND_SECONDS, STOP_SECONDS = 1800.0, 1200.0, 60.0
LINES, WIDTH = 24, 220

# Of each command that has to be there: a part of it, and what its output has to say.
EXPECTED = (
    (r'"model": "smollm2"', r'"content":\s*"[^"]*Paris'),
    (r"loradock demo", r"The server took v2 back by itself[\s\S]*German requests, drift: [\s\S]*Nothing is left of it"),
    (r"adapters push tone", r"tone@v1 .*is live"),
    (r'"model": "tone"', r'"content":\s*"[A-Z][^"]{20,}'),
    (r"range\(200\)", r"(?m)^succeeded tone@v2 None\nArr! 14 it is"),
    (r"adapters canary tone@v2 10%", r"tone@v2 answers 10% of the requests"),
    (r"adapters show tone", r"tone@v2 answers 10% of the requests"),
    (r"adapters promote tone@v2", r"tone@v2 is live"),
    (r"adapters rollback tone", r"tone@v1 is live again"),
)


@dataclass(slots=True)
class Log:
    """What was typed and what came, with the seconds since the beginning."""

    hidden: dict[str, str]
    began: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)

    def write(self, *lines: str) -> None:
        for line in lines:
            for path, words in self.hidden.items():
                line = line.replace(path, words)
            line = line if len(line) <= WIDTH else f"{line[:WIDTH]} ..."
            self.lines.append(line)
            print(line, flush=True)

    def typed(self, command: str) -> None:
        first, *rest = command.splitlines()
        self.write(f"[{self.clock()}] $ {first}", *(f"          {line}" for line in rest))

    def came(self, output: str) -> None:
        lines = output.rstrip().splitlines()
        dots = ["..."] if len(lines) > LINES else []
        self.write(*dots, *lines[-LINES:])

    def clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        return f"{minutes:02}:{seconds:02}"


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code that is to be typed."""
    found = re.findall(r"^```(bash|console|py)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [(kind, text) for kind, text in found]


def commands(kind: str, block: str) -> list[str]:
    """What is typed for a block: each command that bash takes as whole; a block of Python goes to `python`."""
    if kind == "py":
        return [f"python - <<'PYTHON'\n{block}PYTHON"]
    whole, part = [], ""
    for line in block.splitlines():
        line = line.removeprefix("$ ") if kind == "console" else line
        part = f"{part}\n{line}" if part else line
        if not part.strip() or part.strip().startswith("#"):
            part = ""
        elif not part.endswith("\\") and _is_whole(part):
            whole.append(part)
            part = ""
    assert not part, f"bash waits for more after {part}"
    return whole


def _is_whole(command: str) -> bool:
    read = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    return read.returncode == 0 and not read.stderr


class Terminal:
    """A shell that keeps what `source` set, as that of a reader does."""

    def __init__(self, folder: Path, environ: dict[str, str], log: Log) -> None:
        self._log = log
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the shell
        told, self._keys = os.pipe()
        ended, said = os.pipe()
        self._ended: IO[bytes] = os.fdopen(ended, "rb", buffering=0)
        self._said = said
        self._shell = subprocess.Popen(
            ["bash", "--norc", f"/dev/fd/{told}"], cwd=folder, env=environ, pass_fds=(told, said),
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output, start_new_session=True,
        )  # fmt: skip
        os.close(told)
        os.close(said)

    def type(self, command: str) -> str:
        """Run it; what it prints. It must succeed."""
        began, at = time.monotonic(), os.fstat(self._output.fileno()).st_size
        self._log.typed(command)
        os.write(self._keys, f"{command}\necho $? >&{self._said}\n".encode())
        alarm = signal.signal(signal.SIGALRM, self._too_long)
        signal.alarm(int(COMMAND_SECONDS))
        try:
            code = self._ended.readline().decode().strip()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, alarm)
        self._output.seek(at)
        output = self._output.read().decode(errors="replace")
        self._log.came(output)
        self._log.write(f"({time.monotonic() - began:.1f} s)")
        if code != "0":
            raise SystemExit(f"{command}\nended with {code or 'the shell'}:\n{output}")
        return output

    def _too_long(self, *_: object) -> None:
        raise SystemExit(f"no end after {COMMAND_SECONDS:.0f} s")

    def close(self) -> None:
        os.close(self._keys)
        with suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGHUP)
        self._shell.wait()


@contextmanager
def serving(command: str, folder: Path, environ: dict[str, str], log: Log) -> Iterator[int]:
    """The first terminal: the command runs there until Ctrl-C."""
    log.typed(command)
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(
            ["bash", "--norc", "-c", command], cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=output,
            stderr=output, start_new_session=True,
        )  # fmt: skip

        def printed() -> str:
            output.seek(0)
            return output.read().decode(errors="replace")

        try:
            while not _is_ready():
                if server.poll() is not None or time.monotonic() - began > SETUP_SECONDS:
                    raise SystemExit(f"{command} is not ready:\n{printed()[-6000:]}")
                time.sleep(0.5)
            log.came(printed())
            log.write(f"(ready after {time.monotonic() - began:.0f} s)")
            yield server.pid
            began = time.monotonic()
            log.write(f"[{log.clock()}] Ctrl-C in the first terminal")
            os.killpg(server.pid, signal.SIGINT)
            server.wait(STOP_SECONDS)
            log.write(f"(it has ended after {time.monotonic() - began:.1f} s)")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _is_ready() -> bool:
    with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{SERVER}/ready", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _processor_seconds() -> tuple[float, float]:
    """Worked for this program's processes and those that they waited for; for anybody."""
    ticks = os.sysconf("SC_CLK_TCK")
    own = 0
    for pid in _family(os.getpid()):
        with suppress(OSError):
            values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += sum(map(int, values[11:15]))
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
    return own / ticks, (user + nice + system + irq + softirq) / ticks


def _family(pid: int) -> set[int]:
    members = {pid}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                members |= _family(int(child))
    return members


def play(home: Path, log: Log) -> None:
    clone = home / "loradock"
    environ = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    environ |= {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "COLUMNS": "120"}
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    (_, start), *rest = blocks((clone / "README.md").read_text())
    serve = commands("bash", start)[0].partition("#")[0].strip()
    assert serve == "make serve", "the first command of the README serves"
    printed: list[tuple[str, str]] = []
    log.began = time.monotonic()
    with serving(serve, clone, environ, log):
        terminal = Terminal(clone, environ, log)
        try:
            for kind, block in rest:
                for command in commands(kind, block):
                    printed.append((command, terminal.type(command)))
                    judged(*printed[-1])
        finally:
            terminal.close()
    missing = [part for part, _ in EXPECTED if not any(re.search(part, command) for command, _ in printed)]
    if missing:
        raise SystemExit(f"the README has no command with {', '.join(missing)}")


def judged(command: str, output: str) -> None:
    """Whether the output says what the command promises."""
    if re.search(r'"error": ?\{', output):
        raise SystemExit(f"{command}\nis refused:\n{output}")
    for part, says in EXPECTED:
        if re.search(part, command) and not re.search(says, output):
            raise SystemExit(f"{command}\ndoes not say {says}:\n{output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the empty home is made; it is removed afterwards")
    parser.add_argument("--log", type=Path, help="where the log goes, too")
    options = parser.parse_args()
    if _is_ready():
        raise SystemExit(f"something answers at {SERVER} already")
    home = Path(tempfile.mkdtemp(prefix="home-", dir=options.folder))
    log = Log({str(home): "~"})
    own, all_of_them = _processor_seconds()
    try:
        play(home, log)
        seconds = time.monotonic() - log.began
        own, all_of_them = (
            after - before for after, before in zip(_processor_seconds(), (own, all_of_them), strict=True)
        )
        log.write(
            f"{seconds / 60:.1f} minutes; of {seconds * (os.cpu_count() or 1):.0f} s of {os.cpu_count()} cores "
            f"{all_of_them:.0f} s were worked, {own:.0f} s at least for this"
        )
    finally:
        if options.log:
            options.log.write_text("\n".join(log.lines) + "\n")
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
