"""Requests with a seed whose prompt is computed in parts, on a CPU.

After each part vLLM draws a token that it throws away, and turns the request's generator back by an offset. A CPU's
generator has none ("CPU Generator does not use offset"): the engine dies, of any client's `seed`. Here the generator's
state is kept while such a token is drawn, and vLLM's own turning back passes it over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.cpu_kernels.patches import Patch, apply

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_WHY = "a seeded request whose prompt comes in parts ends the engine on a CPU"

PATCHES = [
    Patch(_RUNNER, "_sample", "self logits spec_decode_metadata", f"{__name__}:sample", _WHY),
    Patch(
        _RUNNER,
        "_bookkeeping_sync",
        "self scheduler_output sampler_output logits hidden_states num_scheduled_tokens",
        f"{__name__}:bookkeeping_sync",
        _WHY,
    ),
]


def install() -> None:
    """In each of vLLM's processes; where generators have an offset nothing changes."""
    apply(PATCHES)


def sample(original: Callable[..., Any], runner: Any, *args: Any) -> Any:
    """vLLM's, after which the generators of prompts that are not whole are as they were."""
    states = [(generator, generator.get_state()) for generator in _in_parts(runner).values()]
    output = original(runner, *args)
    for generator, state in states:
        generator.set_state(state)
    return output


def bookkeeping_sync(original: Callable[..., Any], runner: Any, *args: Any) -> Any:
    """vLLM's, which does not see those generators."""
    generators = runner.input_batch.generators
    hidden = {row: generators.pop(row) for row in _in_parts(runner)}
    try:
        return original(runner, *args)
    finally:
        generators.update(hidden)


def _in_parts(runner: Any) -> dict[int, Any]:
    """The CPU's generators of this step's requests whose token is thrown away, by row."""
    batch = runner.input_batch
    if not batch.generators:
        return {}
    rows = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    drawn = {row: batch.generators[row] for row in rows if batch.generators.get(row) is not None}
    return {row: generator for row, generator in drawn.items() if generator.device.type == "cpu"}
