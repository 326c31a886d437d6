"""ONNX Runtime over an export: logits of whole windows, or tokens one after another through the cache.

The cache stays where ONNX Runtime made it, on a GPU where there is one; so does an adapter's A and B.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimize.checkpoint.model import tokenizer
from optimize.errors import Refused
from optimize.export.layout import longest

GRAPH = "model.onnx"
ADAPTERS = "adapters"
ADAPTER_SUFFIX = ".onnx_adapter"
DEVICES = {"CUDAExecutionProvider": "cuda", "CPUExecutionProvider": "cpu"}


class Session:
    """The graph in `folder`, with one of the adapters beside it or without."""

    def __init__(self, folder: Path, adapter: str = "") -> None:
        import onnxruntime

        if not (folder / GRAPH).is_file():
            raise Refused(f"{folder} is no ONNX export: it has no {GRAPH}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        here = onnxruntime.get_available_providers()
        wanted = [name for name in DEVICES if name in here]
        self.session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=wanted)
        self.provider = self.session.get_providers()[0]
        self.device = DEVICES.get(self.provider, "cpu")
        names = [item.name for item in self.session.get_inputs()]
        self.placed = "position_ids" in names
        # In the order of the outputs, as every exporter writes them.
        self.cache = [name for name in names if "past_key_values" in name]
        self.outputs = [item.name for item in self.session.get_outputs()]
        config = json.loads((folder / "config.json").read_text())
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self.empty = self._value(np.zeros((1, heads, 0, width), np.float32))
        self.longest = longest(config)
        self.positions: int | None = config.get("max_position_embeddings")
        self._folder = folder
        self._adapter: dict[str, Any] = {}
        if adapter:
            self.choose(adapter)

    def choose(self, name: str) -> None:
        """From the next step on, answer with this adapter."""
        import onnxruntime

        folder = self._folder
        here = sorted(file.name.removesuffix(ADAPTER_SUFFIX) for file in folder.glob(f"{ADAPTERS}/*{ADAPTER_SUFFIX}"))
        if name not in here:
            raise Refused(f"{folder} has no adapter {name!r}: it has {', '.join(here) or 'none'}")
        read = onnxruntime.AdapterFormat.read_adapter(str(folder / ADAPTERS / f"{name}{ADAPTER_SUFFIX}"))
        values = read.get_parameters()  # they lie in what was read
        self._adapter = {name: self._value(np.array(value.numpy())) for name, value in values.items()}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, vocabulary) without a cache."""
        return torch.cat([torch.from_numpy(self.step(row.numpy(), None)[0]) for row in ids.split(1)])

    def step(self, ids: np.ndarray, cache: Sequence[Any] | None) -> tuple[np.ndarray, list[Any]]:
        """Logits (1, tokens, vocabulary) of `ids` (1, tokens) behind what the cache holds, and the cache after."""
        cache = cache or [self.empty] * len(self.cache)
        past, now = cache[0].shape()[2], ids.shape[1]
        if self.longest and past + now > self.longest:
            raise Refused(
                f"the export takes {self.longest} tokens of prompt and answer, and these are {past + now}: its graph "
                "has longrope's short factors alone"
            )
        binding = self.session.io_binding()
        feed = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones((1, past + now), np.int64)}
        if self.placed:
            feed["position_ids"] = np.arange(past, past + now, dtype=np.int64)[None]
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in (*zip(self.cache, cache, strict=True), *self._adapter.items()):
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu" if name == self.outputs[0] else self.device)
        self.session.run_with_iobinding(binding)
        first, *rest = binding.get_outputs()
        return first.numpy(), rest

    def tokens(self, ids: Sequence[int], count: int, ends: frozenset[int] = frozenset()) -> Iterator[int]:
        """`count` greedy tokens after `ids`, as they are made, or fewer when one of `ends` comes."""
        logits, cache = self.step(np.array([ids]), None)
        for made in range(1, count + 1):
            token = int(logits[0, -1].argmax())
            if token in ends:
                return
            yield token
            if made < count:
                logits, cache = self.step(np.array([[token]]), cache)

    def greedy(self, prompts: Sequence[list[int]], count: int, end: int | None) -> list[list[int]]:
        """As `optimize.checkpoint.model.greedy`, one after another."""
        ends = frozenset() if end is None else frozenset((end,))
        return [list(self.tokens(prompt, count, ends)) for prompt in prompts]

    def _value(self, array: np.ndarray) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device)


class Answer:
    """A greedy answer to `prompt`, a piece of text after another; then tokens a second."""

    def __init__(self, folder: Path, prompt: str, tokens: int, adapter: str = "") -> None:
        self.session, self.words = Session(folder, adapter), tokenizer(folder)
        self.prompt, self.count = prompt, tokens
        self.ends = {self.words.eos_token_id}
        file = folder / "generation_config.json"
        if file.is_file():
            stops = json.loads(file.read_text()).get("eos_token_id") or []
            self.ends |= set(stops if isinstance(stops, list) else [stops])
        self.speed = 0.0

    def __iter__(self) -> Iterator[str]:
        text, template = self.prompt, self.words.chat_template
        if template:
            message = [{"role": "user", "content": self.prompt}]
            text = self.words.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        start = time.monotonic()
        ids = self.words(text, add_special_tokens=not template).input_ids
        room = (self.session.positions or len(ids) + self.count) - len(ids)
        if room < 1:
            raise Refused(
                f"the prompt has {len(ids)} tokens, and the model was made for {len(ids) + room} with its answer"
            )
        made: list[int] = []
        said = ""
        for token in self.session.tokens(ids, min(self.count, room), frozenset(self.ends)):
            made.append(token)
            whole = self.words.decode(made, skip_special_tokens=True).lstrip()
            if not whole.endswith("\ufffd"):  # a character of several tokens is not whole yet
                yield whole[len(said) :]
                said = whole
        self.speed = max(1, len(made)) / (time.monotonic() - start)
        yield self.words.decode(made, skip_special_tokens=True).lstrip()[len(said) :]
