"""Embeddings and output layers that an adapter brings whole, or single rows of, in vLLM's layers and in the fused step.

The embedding's rows take the place of the base's. The output layer's logits too, by one product more for the rows of
such an adapter, in float32. A table is read in the adapter's own file, whose pages the kernel takes back where memory
is short. Where most of its rows are the base's, the others alone are kept: as exact, and the product is a small one.

Not where layers were compiled or recorded before the first such adapter came, for embeddings; nor where a model is
spread over devices; nor whole on a GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from serve.adapters.adapter import CONFIG, WEIGHTS
from serve.adapters.saved_modules import (
    BIAS,
    EMBEDDINGS,
    MAX_BEYOND,
    OUTPUT,
    ROWS,
    WHOLE,
    is_head,
    saved_module,
    token_indices,
)
from serve.vllm_backend.eager_layers import is_eager, slots_of

Lookup = Callable[[torch.Tensor], torch.Tensor]

# Rows that are compared, or multiplied, at a time; and seconds of comparing between two steps.
BLOCK, BUDGET = 4096, 0.05
# Rows of single tokens are kept instead of a table where they are at most such a part of it.
FEW = 0.25


@dataclass(frozen=True, slots=True)
class Table:
    """Rows (tokens, width) in the place of the base's: of these tokens, in order, or of all."""

    rows: torch.Tensor
    tokens: torch.Tensor | None = None

    def look_up(self, tokens: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The rows of these tokens; the base's, where it has none."""
        if self.tokens is None:
            return self.rows[tokens.clamp(max=len(self.rows) - 1)].to(base.dtype)
        at = torch.searchsorted(self.tokens, tokens).clamp(max=len(self.tokens) - 1)
        mine = (self.tokens[at] == tokens).unsqueeze(-1)
        return torch.where(mine, self.rows[at].to(base.dtype), base)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, its tokens) in float32."""
        rows = hidden.float()
        return torch.cat([rows @ block.float().T for block in self.rows.split(BLOCK)], -1)

    @property
    def columns(self) -> torch.Tensor:
        return torch.arange(len(self.rows), device=self.rows.device) if self.tokens is None else self.tokens

    @property
    def end(self) -> int:
        """One more than its last token."""
        return len(self.rows) if self.tokens is None else int(self.tokens.max()) + 1

    def on(self, device: torch.device) -> Table:
        return Table(self.rows.to(device), None if self.tokens is None else self.tokens.to(device))


@dataclass(frozen=True, slots=True)
class Scores:
    """A head (labels, width) that classifies, in the place of logits: its scores, and behind them a 0."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def logits(self, hidden: torch.Tensor, width: int) -> torch.Tensor:
        """(rows, width) in float32, of no probability but where there is a label."""
        scores = hidden.float() @ self.weight.float().T
        if self.bias is not None:
            scores = scores + self.bias.float()
        scores = torch.nn.functional.pad(scores, (0, 1))
        return torch.nn.functional.pad(scores, (0, width - scores.shape[1]), value=-torch.inf)

    def on(self, device: torch.device) -> Scores:
        return Scores(self.weight.to(device), None if self.bias is None else self.bias.to(device))


@dataclass(frozen=True, slots=True)
class Saved:
    """What an adapter brings; None is the base's."""

    embedding: Table | None = None
    output: Table | None = None
    head: Scores | None = None


class SavedModules:
    """One worker's adapters with such modules. `worker` is vLLM's LoRA worker manager, `runner` the model runner."""

    def __init__(self, worker: Any, runner: Any) -> None:
        self._worker = worker
        self._runner = runner
        self._read = worker._load_adapter
        worker._load_adapter = self._load
        self._comparing: dict[int, Iterator[None]] = {}
        self._base: Base | None = None
        # By slot, of those that hold such an adapter.
        self._embeddings: dict[int, Table] = {}
        self._outputs: dict[int, Table] = {}
        self._heads: dict[int, Scores] = {}
        # Columns of all logits, with those of tokens beyond the vocabulary; 0 as long as nobody had some.
        self._width = 0

    def advance(self, lora: Any) -> bool:
        """Go on comparing an adapter that was read with the base, for a moment; whether it has all it needs."""
        if getattr(lora, "loradock_saved", None) is None or getattr(lora, "loradock_compared", False):
            return True
        until = perf_counter() + BUDGET
        # Not kept while it runs: one that failed begins anew.
        comparing = self._comparing.pop(lora.id, None) or self._compare(lora)
        for _ in comparing:
            if perf_counter() > until:
                self._comparing[lora.id] = comparing
                return False
        self._watch()
        self._widen(lora.loradock_saved)
        lora.loradock_compared = True
        return True

    def embeds(self) -> bool:
        """Whether a row of this step has an adapter with an embedding of its own."""
        return bool(self._embeddings) and not self._embeddings.keys().isdisjoint(
            self._punica().token_lora_indices.tolist()
        )

    def _load(self, request: Any) -> Any:
        """vLLM's, of the adapter without what it would refuse."""
        folder = Path(request.lora_path)
        places = _places(folder / WEIGHTS)
        if not places:
            return self._read(request)
        if self._runner.is_pooling_model:
            self._check_heads(places)
            return self._read(request)
        settings, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        saved = _saved({place: tensors.pop(name) for name, place in places.items()}, settings, self._known().tied)
        self._check(saved)
        with tempfile.TemporaryDirectory() as plain:
            without = {**settings, "modules_to_save": None, "trainable_token_indices": None}
            (Path(plain) / CONFIG).write_text(json.dumps(without))
            save_file(tensors, Path(plain) / WEIGHTS)
            own = copy(request)
            own.lora_path = plain
            lora = self._read(own)
        lora.loradock_saved = saved
        return lora

    def _check_heads(self, places: Mapping[str, tuple[str, str]]) -> None:
        """ValueError, unless the adapter brings a head, and nothing else, to a model that classifies by itself."""
        heads = [is_head(module) for module, _ in places.values()]
        if not all(heads):
            raise ValueError("tables and tokens of its own are served where text is generated: merge them")
        if self._worker._adapter_manager._classification_head is None:
            raise ValueError(
                "it brings a classification head, and this base has none whose place it could take: push it on a base "
                "that generates, or on one with such a head (...ForSequenceClassification)"
            )

    def _known(self) -> Base:
        if self._base is None:
            self._base = Base(self._worker._adapter_manager.model, self._runner.vllm_config.model_config)
        return self._base

    def _punica(self) -> Any:
        return next(iter(self._worker._adapter_manager.modules.values())).punica_wrapper

    def _check(self, saved: Saved) -> None:
        config, base = self._runner.vllm_config, self._known()
        if config.parallel_config.world_size > 1:
            raise ValueError("a table of its own is not served where a model is spread over devices: merge it")
        if saved.embedding is not None and not is_eager(config):
            raise ValueError("an embedding of its own needs layers that are not compiled: start with enforce_eager")
        if saved.head is not None and (
            saved.head.weight.shape[1] != base.width or len(saved.head.weight) >= base.vocabulary
        ):
            raise ValueError(f"its head is {list(saved.head.weight.shape)}, and the base has {base.width} columns")
        tables = [table for table in (saved.embedding, saved.output) if table is not None]
        end = max((table.end for table in tables), default=0)
        on_cpu = torch.device(self._punica().device).type == "cpu"
        if not on_cpu and (end > base.vocabulary or any(table.tokens is None for table in tables)):
            raise ValueError("a whole table, or tokens beyond the vocabulary, are served on a CPU alone: merge it")
        if end > max(base.vocabulary, saved.embedding.end if saved.embedding else 0):
            raise ValueError("its output layer has more tokens than its embedding")
        for table in tables:
            short = table.tokens is None and table.end < base.vocabulary
            if table.rows.shape[1] != base.width or table.end > base.vocabulary + MAX_BEYOND or short:
                raise ValueError(
                    f"its table is of {table.end} tokens and {table.rows.shape[1]} columns, and the base's of "
                    f"{base.vocabulary} and {base.width}"
                )

    def _compare(self, lora: Any) -> Iterator[None]:
        """Keep the rows that differ from the base's, where those are few; with a pause after each block."""
        base, saved = self._known(), lora.loradock_saved
        embedding = yield from _differing(saved.embedding, base.embedded, base.vocabulary)
        output = embedding
        if saved.output is not saved.embedding:
            output = yield from _differing(saved.output, base.output, base.vocabulary)
        lora.loradock_saved = replace(saved, embedding=embedding, output=output)

    def _watch(self) -> None:
        """From the first such adapter on, the embedding and the logits are followed by its rows."""
        if hasattr(self._runner, "loradock_embeds"):
            return
        adapters, base = self._worker._adapter_manager, self._known()
        adapters.activate_adapter = partial(self._activate, adapters.activate_adapter)
        base.embedding.forward = partial(self._look_up, base.embedding.forward)
        original = base.model.compute_logits
        # A method: vLLM's second model runner asks it whose it is.
        base.model.compute_logits = MethodType(
            lambda _, hidden, *args, **kwargs: self._logits(hidden, original(hidden, *args, **kwargs)), base.model
        )
        self._runner.loradock_embeds = self.embeds

    def _widen(self, saved: Saved) -> None:
        """From the first adapter with tokens beyond the vocabulary on, all logits have columns for them."""
        width = max((table.end for table in (saved.embedding, saved.output) if table is not None), default=0)
        batch = getattr(self._runner, "input_batch", None)
        if width <= max(self._width, self._known().vocabulary):
            return
        self._width = width
        if batch is None:
            return
        # It pads with this number, which must be no token's; and its masks say which tokens a request may not have.
        batch.vocab_size = width
        for name in ("allowed_token_ids_mask", "allowed_token_ids_mask_cpu_tensor"):
            if (mask := getattr(batch, name, None)) is not None:
                setattr(batch, name, torch.nn.functional.pad(mask, (0, width - mask.shape[1]), value=True))

    def _activate(self, original: Callable[[int], bool], lora_id: int) -> bool:
        adapters = self._worker._adapter_manager
        while not self.advance(adapters.get_adapter(lora_id)):
            continue  # vLLM itself has read it again
        changed = original(lora_id)
        if changed:
            slot = adapters.lora_index_to_id.index(lora_id)
            saved = getattr(adapters.get_adapter(lora_id), "loradock_saved", None) or Saved()
            device = torch.device(self._punica().device)
            _hold(self._embeddings, slot, saved.embedding, device)
            _hold(self._outputs, slot, saved.output, device)
            _hold(self._heads, slot, saved.head, device)
        return changed

    def _look_up(self, original: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        known = tokens.clamp(max=self._known().vocabulary - 1) if self._width else tokens
        out = original(known)
        if not self._embeddings:
            return out
        flat, rows = tokens.reshape(-1).long(), out.reshape(-1, out.shape[-1])
        slots = slots_of(self._punica(), len(flat))
        for slot in self._embeddings.keys() & set(slots.tolist()):
            mine = (slots == slot).nonzero().flatten()
            rows[mine] = self._embeddings[slot].look_up(flat[mine], rows[mine])
        return rows.view(out.shape)

    def _logits(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor | None:
        if logits is not None and logits.shape[1] < self._width:
            logits = torch.nn.functional.pad(logits, (0, self._width - logits.shape[1]), value=-torch.inf)
        if logits is None or not (self._outputs or self._heads):
            return logits
        slots = self._punica().sampler_indices
        for slot in (self._outputs.keys() | self._heads.keys()) & set(slots.tolist()):
            if len(slots) != len(hidden):
                raise RuntimeError("logits are computed of other rows than the step's")
            mine = (slots == slot).nonzero().flatten()
            if slot in self._heads:
                logits[mine] = self._heads[slot].logits(hidden[mine], logits.shape[1]).to(logits.dtype)
                continue
            table = self._outputs[slot]
            own = self._known().finished(table.product(hidden[mine])).to(logits.dtype)
            logits[mine] = logits[mine].index_copy(1, table.columns, own)
        return logits


def _hold(held: dict[int, Any], slot: int, part: Any, device: torch.device) -> None:
    """Have a slot hold a part of its adapter, or none."""
    held.pop(slot, None)
    if part is not None:
        held[slot] = part.on(device)


class Base:
    """A model's own embedding and output layer. `config` is vLLM's of the model."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model = model
        tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
        self._table = next(module for module in tables if not isinstance(module, ParallelLMHead))
        self._head = next((module for module in tables if isinstance(module, ParallelLMHead)), None)
        wrapped = (module for module in model.modules() if isinstance(module, VocabParallelEmbeddingWithLoRA))
        # What looks tokens up, with its LoRA where it takes one.
        self.embedding = next(wrapped, self._table)
        self._processor = next(module for module in model.modules() if isinstance(module, LogitsProcessor))
        self.vocabulary, self.width = int(self._table.org_vocab_size), int(self._table.embedding_dim)
        configs = (config.hf_text_config, config.hf_config)
        self.tied = any(getattr(each, "tie_word_embeddings", False) for each in configs)

    @torch.no_grad()
    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """The base's own rows of these tokens, on the host."""
        weight = self._table.weight
        return self._table.quant_method.embedding(self._table, tokens.to(weight.device)).cpu()

    @property
    def output(self) -> Lookup | None:
        """As `embedded`, of the output layer; None where its rows cannot be had."""
        if self.tied or self._head is None:
            return self.embedded if self.tied else None
        head = self._head
        if getattr(head, "weight", None) is not None and head.weight.ndim == 2 and head.weight.is_floating_point():
            return lambda tokens: head.weight[tokens.to(head.weight.device)].cpu()
        if not hasattr(head, "loradock_matrix"):
            return None
        from serve.cpu_kernels import one_copy
        from serve.cpu_kernels.build import library

        kernels = library()
        return partial(one_copy.rows, head) if kernels and kernels.loradock_unpacks(head.loradock_matrix) else None

    def finished(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model makes of its output layer's product."""
        if cap := self._processor.soft_cap:
            logits = torch.tanh(logits / cap) * cap
        return logits * self._processor.scale


def _saved(tensors: dict[tuple[str, str], torch.Tensor], settings: dict[str, Any], tied: bool) -> Saved:
    """By PEFT's names. Rows of one table are both tables' where the base ties them, unless both have their own."""
    tables: dict[str, Table] = {}
    head, whole = None, False
    for module in dict.fromkeys(module for module, _ in tensors):
        if is_head(module):
            head = Scores(tensors[module, WHOLE], tensors.get((module, BIAS)))
            continue
        kind = "output" if module.rpartition(".")[2] == OUTPUT else "embedding"
        rows, trained = tensors.get((module, WHOLE)), tensors.get((module, ROWS))
        whole |= kind == "embedding" and trained is None
        tables[kind] = _table(rows, trained, token_indices(settings, module) or [])
    saved = Saved(tables.get("embedding"), tables.get("output"), head)
    if saved.embedding is None or saved.output is not None or not tied:
        return saved
    # A copy that PEFT trains for the embedding alone leaves the base's table to the output layer.
    named = any(name.rpartition(".")[2] in EMBEDDINGS for name in settings.get("modules_to_save") or ())
    if whole and named and not settings.get("ensure_weight_tying"):
        return saved
    return replace(saved, output=saved.embedding)


def _table(rows: torch.Tensor | None, trained: torch.Tensor | None, indices: list[int]) -> Table:
    """Of a whole table, of the trained rows of some tokens, or of both where it was resized."""
    tokens, order = torch.tensor(indices, dtype=torch.int64).sort()
    if trained is None:
        assert rows is not None
        return Table(rows)
    if rows is None:
        return Table(trained[order], tokens)
    return Table(rows.index_copy(0, tokens, trained[order].to(rows.dtype)))


def _places(file: Path) -> dict[str, tuple[str, str]]:
    """Which tensors of an adapter's file are saved modules, by name."""
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as opened:
        return {
            name: place
            for name in opened.keys()  # noqa: SIM118
            if (place := saved_module(name))
        }


def _differing(table: Table | None, base: Lookup | None, vocabulary: int) -> Generator[None, None, Table | None]:
    """Of a whole table the rows that differ from the base's, if they are few; None if none does."""
    if table is None or table.tokens is not None or base is None:
        return table
    changed = []
    for begin in range(0, vocabulary, BLOCK):
        tokens = torch.arange(begin, min(begin + BLOCK, vocabulary))
        theirs = base(tokens)
        changed.append(tokens[(table.rows[tokens].to(theirs.dtype) != theirs).any(1)])
        yield
    tokens = torch.cat([*changed, torch.arange(vocabulary, len(table.rows))])
    if len(tokens) > FEW * len(table.rows):
        return table
    return Table(table.rows[tokens], tokens) if len(tokens) else None
