"""A step in a child process: it may use so much memory, says how far it is, and ends with the run."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from optimize import processor
from optimize.errors import OptimizeError, OutOfMemory, Refused, Stopped
from optimize.job import Job
from optimize.pipeline.resident import Resident
from optimize.pipeline.signals import SENTENCE, Process, Signals
from optimize.pipeline.step_code import ROOT
from optimize.processes import ProcessGroup

Tell = Callable[[str, float, float, str], None]  # step, done, total, what
ERRORS = {"Refused": Refused, "OutOfMemory": OutOfMemory, "Stopped": Stopped}


@dataclass(frozen=True, slots=True)
class Child:
    """How a step's process is run: its files go to `folder`, `served` are the variables of a served engine, and
    `resident` is what most are forked from."""

    folder: Path
    memory: int
    tell: Tell
    served: Mapping[str, str]
    resident: Resident
    signals: Signals = field(default_factory=Signals)

    def run(self, job: Job) -> dict[str, Any]:
        """The step's notes; an error that says so when it is killed, or grows above its memory."""
        file, log = self.folder / "job.json", self.folder / f"{job.kind}.log"
        file.write_bytes(msgspec.json.encode(job))
        read, write = os.pipe()
        with os.fdopen(read, "rb", buffering=0) as pipe, log.open("w") as output, ProcessGroup() as group:
            try:
                process = self._started(job, file, write, output.fileno(), group)
            finally:
                os.close(write)
            self.signals.running(process)
            try:
                last, peak = self._listen(job.kind, process, pipe.fileno())
            finally:
                self.signals.running(None)
        if "notes" in last:
            return {**last["notes"], "memory": peak}
        if "error" in last:
            raise ERRORS.get(last["class"], OptimizeError)(f"{job.kind}: {last['error']}")
        if process.returncode == -signal.SIGTERM:
            raise Stopped(f"{job.kind}: {SENTENCE}")
        if process.returncode == -signal.SIGKILL:
            raise OutOfMemory(
                f"{job.kind}: the step was killed at {peak / 1e9:.1f} GB, most likely because the machine "
                "ran out of memory; close other programs and go on with --resume"
            )
        tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise OptimizeError(
            f"{job.kind}: the step ended with {process.returncode}: {''.join(tail)[:300]} (all of it in {log})"
        )

    def _started(self, job: Job, file: Path, write: int, output: int, group: ProcessGroup) -> Process:
        environ = self._environ(job.kind)
        # The engine and tasks have an environment of their own, and what uses a GPU is not to be forked.
        if job.kind not in ("engine", "tasks") and processor.gpu() is None:
            return self.resident.start(file, write, output, group.number, environ, job.reference or job.model)
        return group.start(
            [sys.executable, "-m", "optimize.pipeline.worker", str(file), str(write)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, pass_fds=[write],
        )  # fmt: skip

    def _environ(self, kind: str) -> dict[str, str]:
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            # Everything is here by now, but for the data of lm-eval's tasks, which it fetches itself.
            "HF_HUB_OFFLINE": "0" if kind == "tasks" else "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONHASHSEED": "0",
            # cuBLAS gives the same sums each time with a workspace of a fixed size.
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
            # Threads that spin while they wait for one another take the cores from whatever else runs.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        }
        if kind == "engine":
            del environ["OMP_WAIT_POLICY"]
            environ |= self.served
        return environ

    def _listen(self, kind: str, process: Process, pipe: int) -> tuple[dict[str, Any], int]:
        """The process's last message, and the most memory that it had."""
        last: dict[str, Any] = {}
        peak, unfinished = 0, b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                used = resident_bytes(process.pid)
                peak = max(peak, used)
                if used > self.memory:
                    raise OutOfMemory(
                        f"{kind}: the step used {used / 1e9:.1f} GB and was stopped at the bound of "
                        f"{self.memory / 1e9:.1f} GB; raise it with --memory and go on with --resume"
                    )
                if not selector.select(0.2):
                    continue
                received = os.read(pipe, 65536)
                if not received:
                    process.wait()
                    return last, peak
                *lines, unfinished = (unfinished + received).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if "done" in message:
                        self.tell(kind, message["done"], message["total"], message["what"])
                    else:
                        last = message


def resident_bytes(pid: int) -> int:
    """Bytes of a process and its children that no file backs."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon", "RssShmem")):
                total += int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return total
    return total + sum(resident_bytes(int(child)) for child in children)
