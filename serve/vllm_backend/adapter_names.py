"""An adapter's names of modules, as vLLM's model calls them.

vLLM maps what models call their modules on the hub, and drops in silence what fits none of its own. It does not know
what a model is called without its head, which embeddings are trained on (serve.adapters.module_names).
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.utils import WeightsMapper

from serve.adapters.module_names import spellings
from serve.names import shown

# What comes behind a module's name in an adapter's file.
PARTS = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B", ".weight", ".bias")


class Names:
    """One worker's adapters by any names that fit. `worker` is vLLM's LoRA worker manager."""

    def __init__(self, worker: Any, runner: Any) -> None:
        self._worker = worker
        self._read = worker._load_adapter
        worker._load_adapter = self._load

    def advance(self, lora: Any) -> bool:
        return True

    def _load(self, request: Any) -> Any:
        """vLLM's. ValueError, if it would drop a part of the adapter and nobody would see: a model that pools is not
        probed, and one that takes pictures not with any.
        """
        adapters = self._worker._adapter_manager
        mapper = getattr(adapters.model, "hf_to_vllm_mapper", None)
        if not isinstance(mapper, AnySpelling):
            adapters.model.hf_to_vllm_mapper = AnySpelling.of(mapper, served(adapters))
        lora = self._read(request)
        unseen = adapters.is_pooling_model or adapters.supports_mm
        strays = sorted(lora.loras.keys() - served(adapters)) if unseen else []
        if strays and not adapters._is_moe:
            raise ValueError(f"the engine puts no LoRA on {shown(', '.join(strays), 300)}: train it on other modules")
        return lora


class AnySpelling(WeightsMapper):
    """A model's own mapper, whose mapper of renames also knows a module by what it is called in other classes."""

    modules: frozenset[str] = frozenset()

    @classmethod
    def of(cls, mapper: WeightsMapper | None, modules: frozenset[str]) -> AnySpelling:
        own = cls(**vars(mapper)) if mapper is not None else cls()
        own.modules = modules
        return own

    def get_rename_mapper(self) -> Any:
        return Fitting(super().get_rename_mapper(), self.modules)


class Fitting:
    """Maps a name by the first of its spellings that is a module's."""

    def __init__(self, mapper: WeightsMapper, modules: frozenset[str]) -> None:
        self._mapper = mapper
        self._modules = modules

    def _map_name(self, name: str) -> str | None:
        mapped: str | None = self._mapper.map_name(name)
        for spelling in spellings(name):
            other: str | None = self._mapper.map_name(spelling)
            if other is not None and _module(other) in self._modules:
                return other
        return mapped


def served(adapters: Any) -> frozenset[str]:
    """The modules that take a LoRA, by their names before some are packed into one."""
    packed = adapters.packed_modules
    return frozenset(part for name in adapters.modules for part in (name, *packed.get(name, ())))


def _module(name: str) -> str:
    return min((name.partition(part)[0] for part in PARTS), key=len)
