"""Requests with a seed whose prompt is computed in parts, on a CPU.

After each part vLLM draws a token that it throws away, and turns the request's generator back by an offset. A CPU's
generator has none ("CPU Generator does not use offset"): the engine dies, of any client's `seed`. Here the generator's
state is kept while such a token is drawn, and vLLM's own turning back passes it over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
