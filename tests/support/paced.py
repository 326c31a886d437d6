"""An engine whose steps and loads take so many seconds at least, as if they were another device's: it sleeps the rest.

Imported before vLLM is, by a `sitecustomize` of the processes of a server; `VARIABLE` has `Paces` as JSON. All else is
the real thing: what a step computes, and in which order. Two engines on one processor so have the times of two
processors, as long as what they really compute takes less.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.vllm_backend import import_hooks

ROOT = Path(__file__).parents[2]
VARIABLE = "TESTS_PACED"


@dataclass(frozen=True, slots=True)
class Paces:
    """Seconds of a step, of each answer in it, of each token of a prompt in it, and of an adapter that is read."""

    step: float
    step_per_answer: float
    prompt_token: float
    load: float

    def environ(self, folder: Path) -> dict[str, str]:
        """Of a server whose engines are paced so; `folder` takes what its processes import first."""
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text("from tests.support import paced\npaced.install()\n")
        return {VARIABLE: json.dumps(asdict(self)), "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def install() -> None:
    if given := os.environ.get(VARIABLE):
        paces = Paces(**json.loads(given))
        import_hooks.around("vllm.v1.worker.gpu_worker", lambda module: _steps(module, paces))
        import_hooks.around("vllm.lora.worker_manager", lambda module: _loads(module, paces))


@contextmanager
def _steps(module: Any, paces: Paces) -> Iterator[None]:
    yield

    def seconds(output: Any) -> float:
        answers = tokens = 0
        new = {one.req_id: len(one.prompt_token_ids) - one.num_computed_tokens for one in output.scheduled_new_reqs}
        left.update(new)
        for name in output.finished_req_ids:
            left.pop(name, None)
        for name, count in output.num_scheduled_tokens.items():
            if left.get(name, 0) > 0:
                tokens += count
                left[name] -= count
            else:
                answers += 1
        return paces.step + paces.step_per_answer * answers + paces.prompt_token * tokens

    left: dict[str, int] = {}
    execute = module.Worker.execute_model

    def execute_model(self: Any, scheduler_output: Any) -> Any:
        began = time.perf_counter()
        made = execute(self, scheduler_output)
        if scheduler_output.total_num_scheduled_tokens:
            _rest(began, seconds(scheduler_output))
        return made

    module.Worker.execute_model = execute_model


@contextmanager
def _loads(module: Any, paces: Paces) -> Iterator[None]:
    yield
    read: Callable[..., Any] = module.WorkerLoRAManager._load_adapter

    def _load_adapter(self: Any, request: Any) -> Any:
        began = time.perf_counter()
        made = read(self, request)
        _rest(began, paces.load)
        return made

    module.WorkerLoRAManager._load_adapter = _load_adapter


def _rest(began: float, seconds: float) -> None:
    time.sleep(max(0.0, began + seconds - time.perf_counter()))
