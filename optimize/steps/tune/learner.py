"""A model whose weights stay as they are, and a LoRA over it that learns.

The base computes in bfloat16 where the processor multiplies it; the LoRA's own weights and its optimizer are float32.
Logits are computed where a token is learned, and nowhere else. A head takes the output layer's place, as transformers'
...ForSequenceClassification have it: a product of the last token's hidden state.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from optimize.checkpoint import artifact
from optimize.checkpoint.checkpoint import ADAPTER_CONFIG, adapter_config, write_adapter
from optimize.checkpoint.model import compute_dtype, layers, opened, prefix
from optimize.errors import OptimizeError, Refused
from optimize.steps.tune import attention
from optimize.steps.tune.encoding import Unit
from optimize.steps.tune.packing import Row
from optimize.steps.tune.settings import Settings

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROBED = 32  # tokens of a sequence with which packing is tried out
HEAD = "base_model.model.score.weight"  # as PEFT saves it


@dataclass(frozen=True, slots=True)
class Start:
    """Where a LoRA begins: on a base, from an adapter in `parent` or as PEFT makes a new one with `seed`; with `labels`
    it has a head."""

    base: Path
    parent: Path | None
    seed: int
    targets: Sequence[str] | str
    rslora: bool
    dtype: str
    device: str
    dora: bool = False
    labels: tuple[str, ...] = ()


class Learner:
    """The model in training, which is `model` where that is open already. `state` and `load` are the LoRA's weights;
    `alive` hears of each row."""

    def __init__(
        self, start: Start, settings: Settings, alive: Callable[[], None] = lambda: None, model: Any = None
    ) -> None:
        dtype = compute_dtype(start.device) if start.dtype == "auto" else DTYPES[start.dtype]
        self._start = start
        self._device = start.device
        self.alive = alive
        base = opened(start.base, dtype, rounds=False).to(start.device) if model is None else model
        text = base.config.get_text_config()
        if text._attn_implementation == attention.REPLACED:  # else the model needs more of it, such as a soft cap
            text._attn_implementation = attention.register()
        torch.manual_seed(start.seed)
        self.model = _adapted(base, start, settings)
        self._half = dtype is torch.bfloat16
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._decoder = base.get_submodule(prefix(base).rpartition(".")[0])
        self._head: nn.Parameter | None = None
        if start.labels:
            drawn = torch.randn(len(start.labels), text.hidden_size) * text.hidden_size**-0.5
            self._head = nn.Parameter(drawn.to(start.device))
            self.parameters.append(self._head)
        if settings.gradient_checkpointing:
            _without_dropout(self.model)
            self.model.train()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def groups(self, ratio: float) -> list[dict[str, Any]]:
        """The parameters for an optimizer, with how many times the learning rate each group takes: `ratio` for B and
        magnitudes (LoRA+, Hayou et al. 2024, arXiv:2402.12354; PEFT's groups)."""
        if ratio == 1:
            return [{"params": self.parameters}]
        faster = {
            id(parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and ("lora_B" in name or parameter.ndim == 1)
        }
        parts = ([each for each in self.parameters if (id(each) in faster) is fast] for fast in (False, True))
        return [{"params": part, "ratio": of} for part, of in zip(parts, (1.0, ratio), strict=True)]

    def logps(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities in nats of the learned tokens (answers,) in float32, and whether each is the likeliest."""
        self.alive()
        logits = self._logits(row.ids, row.positions, row.at, row.borders)
        right = row.right.to(self._device)
        return -cross_entropy(logits, right, reduction="none"), logits.detach().argmax(-1) == right

    def packs(self, units: Sequence[Unit]) -> bool:
        """Whether no sequence in a row sees another: other tokens in the first change no bit of the second's logits.
        False for models that carry a state from token to token, and where experts share a budget."""
        first, second = (torch.tensor(units[at][0].ids[:PROBED]) for at in (0, -1))
        positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])
        at = torch.arange(len(first), len(positions))
        borders = torch.tensor([0, len(first), len(positions)], dtype=torch.int32)
        with torch.no_grad():
            one, other = (
                self._logits(torch.cat([each, second]), positions, at, borders)
                for each in (first, torch.zeros_like(first))
            )
        return torch.equal(one, other)

    def state(self) -> dict[str, torch.Tensor]:
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        head = {} if self._head is None else {HEAD: self._head}
        return {name: tensor.detach().clone().cpu() for name, tensor in (state | head).items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        from peft.utils import set_peft_model_state_dict

        set_peft_model_state_dict(self.model, {name: tensor for name, tensor in state.items() if name != HEAD})
        if self._head is not None:
            self._head.data.copy_(state[HEAD])

    def save(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """A PEFT folder of these weights, the same bytes for the same weights."""
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        config = self.model.peft_config["default"]
        config.save_pretrained(str(aside))
        written = adapter_config(aside)
        written |= {"base_model_name_or_path": self._start.base.name, "inference_mode": True}
        written["target_modules"] = sorted(written["target_modules"])
        if labels := self._start.labels:
            written |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
            written["id2label"] = {str(number): label for number, label in enumerate(labels)}
        (aside / ADAPTER_CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        write_adapter(aside, state)
        artifact.publish(aside, folder)

    def _logits(
        self, ids: torch.Tensor, positions: torch.Tensor, at: torch.Tensor, borders: torch.Tensor
    ) -> torch.Tensor:
        """(at, vocabulary) in float32; (at, labels) of a head."""
        from peft.helpers import disable_input_dtype_casting

        device = torch.device(self._device)
        with (
            disable_input_dtype_casting(self.model, self._half),
            torch.autocast(device.type, torch.bfloat16, enabled=self._half),
        ):
            row = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device), "use_cache": False}
            if self._head is None:
                out = self.model(**row, logits_to_keep=at.to(device), cu_seq_lens_q=borders)
            else:
                out = self._decoder(**row, cu_seq_lens_q=borders)
        if self._head is not None:
            return out.last_hidden_state[0, at.to(device)].float() @ self._head.T
        logits: torch.Tensor = out.logits[0].float()
        return logits


def linears(model: nn.Module) -> list[str]:
    """The last names of the linear layers in the decoder's layers."""
    named = layers(model).named_modules()
    return sorted({name.rpartition(".")[2] for name, part in named if isinstance(part, nn.Linear)})


def _adapted(base: Any, start: Start, settings: Settings) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if start.parent is not None:
            try:
                return PeftModel.from_pretrained(base, str(start.parent), is_trainable=True)
            except (ValueError, RuntimeError, KeyError) as error:
                raise OptimizeError(
                    f"PEFT does not load the adapter in {start.parent}: {' '.join(str(error).split())[:300]}"
                ) from error
        there = linears(base)
        targets = there if start.targets == "all-linear" else list(start.targets)
        if unknown := sorted(set(targets) - set(there)):
            raise Refused(f"the model has no linear layer {unknown[0]!r}; its layers have {', '.join(there)}")
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, use_rslora=start.rslora,
            use_dora=start.dora, task_type="CAUSAL_LM",
        )  # fmt: skip
        return get_peft_model(base, config)


def _without_dropout(model: nn.Module) -> None:
    """What is drawn at random would have to be kept in every checkpoint, and small data gains nothing by it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
