"""Log-probabilities of prompts, each row with the adapter of its own request.

vLLM computes them after the step's sampling, by the output layer, whose adapters are arranged for one row a request.
With an adapter on `lm_head` a CPU engine dies of the different number of rows, or answers with another request's
adapter where the numbers agree, or where the kernels do not compare them. Here the adapters are arranged anew for the
rows that are computed, whoever computes the adapters' part, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class RowsWithTheirAdapters:
    """Computes logits of rows that are parts of a step's hidden states, each with the adapter of its token.

    `manager` is vLLM's LoRAModelManager. A context: at its end the adapters are arranged as they were.
    """

    def __init__(self, compute: Callable[..., Any], manager: Any, hidden_states: Any) -> None:
        self._compute = compute
        self._manager = manager
        self._hidden_states = hidden_states
        self._step = manager._last_mapping

    def __enter__(self) -> RowsWithTheirAdapters:
        return self

    def __exit__(self, *_: object) -> None:
        if self._step is not None:
            self._manager.set_adapter_mapping(self._step)

    def __call__(self, rows: Any) -> Any:
        if self._step is not None:
            adapters = self._adapters(rows)
            self._manager.set_adapter_mapping(type(self._step)(adapters, adapters, is_prefill=True))
        return self._compute(rows)

    def _adapters(self, rows: Any) -> tuple[int, ...]:
        """The adapters' numbers, 0 for none: where the rows lie in memory says which tokens they are."""
        whole = self._hidden_states
        first, rest = divmod(rows.data_ptr() - whole.data_ptr(), whole.stride(0) * whole.element_size())
        adapters: tuple[int, ...] = self._step.index_mapping[first : first + rows.shape[0]]
        if rest or first < 0 or len(adapters) != rows.shape[0]:
            raise RuntimeError("the log-probabilities of a prompt are computed of rows that are not the step's")
        return adapters


def get_prompt_logprobs_dict(
    original: Callable[..., Any], runner: Any, hidden_states: Any, num_scheduled_tokens: Any
) -> Any:
    """vLLM's first model runner: it calls `compute_logits` of its model."""
    if not runner.num_prompt_logprobs or not runner.lora_config:
        return original(runner, hidden_states, num_scheduled_tokens)
    model = runner.model
    own = vars(model).get("compute_logits")
    with RowsWithTheirAdapters(model.compute_logits, runner.lora_manager._adapter_manager, hidden_states) as compute:
        model.compute_logits = compute
        try:
            return original(runner, hidden_states, num_scheduled_tokens)
        finally:
            if own is None:
                del model.compute_logits
            else:
                model.compute_logits = own


def compute_prompt_logprobs(
    original: Callable[..., Any], worker: Any, logits_fn: Any, hidden_states: Any, *others: Any
) -> Any:
    """vLLM's second model runner: it hands its model's `compute_logits` over."""
    manager = getattr(getattr(logits_fn, "__self__", None), "lora_manager", None)
    if manager is None:
        return original(worker, logits_fn, hidden_states, *others)
    with RowsWithTheirAdapters(logits_fn, manager, hidden_states) as compute:
        return original(worker, compute, hidden_states, *others)
