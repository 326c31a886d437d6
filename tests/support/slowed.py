"""`loradock` with a fault at the engine's edge: tokens of one adapter version take a quarter longer to come.

    SLOWED=FILE python -m tests.support.slowed serve smollm2 ...

FILE holds the version's id, from when on it is slow. The engine's steps are what they are; what it sent of that version
is held back between engine and server, so that each gap between two tokens is longer by `MORE`. All else is the real
thing: the versions share their batches, so that nothing but this one version's own requests is slower.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

MORE = 0.25


def slowed(processor: type) -> type:
    """vLLM's output processor as the server has it, which hands on late what a slow version says."""
    from vllm.v1.metrics.stats import IterationStats

    file = Path(os.environ["SLOWED"])

    class Slowed(processor):  # type: ignore[misc]
        def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            super().add_request(request, *args, **kwargs)
            lora = request.lora_request
            if lora is not None and file.exists() and lora.lora_name == file.read_text():
                self.request_states[request.request_id].late = None

        def process_outputs(self, outputs: Any, timestamp: Any = None, stats: Any = None, **more: Any) -> Any:
            prompt = []
            for output in outputs:
                state = self.request_states.get(output.request_id)
                if hasattr(state, "late"):
                    self._hold(state, output, timestamp, more)
                else:
                    prompt.append(output)
            return super().process_outputs(prompt, timestamp, stats, **more)

        def _hold(self, state: Any, output: Any, came: float, more: dict[str, Any]) -> None:
            if state.late is None:
                due = came
            else:
                came_before, due_before = state.late
                due = max(came, due_before + (1 + MORE) * (came - came_before))
            state.late = came, due
            hand_on = super().process_outputs
            # Both are the monotonic clock's.
            asyncio.get_running_loop().call_at(due, lambda: hand_on([output], due, IterationStats(), **more))

    return Slowed


def main() -> None:
    import serve.server.assembly
    from serve.cli.main import app

    build = serve.server.assembly.build_app

    def build_app(*args: Any) -> Any:
        import serve.vllm_backend.backend

        serve.vllm_backend.backend.Outputs = slowed(serve.vllm_backend.backend.Outputs)  # type: ignore[misc]
        return build(*args)

    serve.server.assembly.build_app = build_app
    app(sys.argv[1:])


if __name__ == "__main__":
    main()
