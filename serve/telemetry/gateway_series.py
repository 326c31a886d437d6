"""vLLM's series as gateways read them: how much an engine has to do, and which adapters it holds.

An endpoint picker of a gateway (the Gateway API inference extension's, llm-d's) chooses a server for each request by
them. The contract is llm-d-router's "Plugin Metric Protocol"; what vLLM does not have yet is named as in vLLM's pull
request 54830. Adapters have public names here: NAME for the live version, NAME@vN for any other.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.registry.registry import Registry
from serve.engine.engine import LOW_PRIORITY, Phase
from serve.engine.fleet import Fleet
from serve.engine.supervisor import Supervisor
from serve.errors import NotFound

WAITING, REASONS = "vllm:num_requests_waiting", "vllm:num_requests_waiting_by_reason"
# The engine's own that a picker reads; the rest of what it reads is in `AdapterSeries`.
READ = (WAITING, "vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:cache_config_info")
# vLLM grows a series for every combination of adapters there and never removes one: `AdapterSeries` has it instead.
REQUESTS = "vllm:lora_requests_info"
LOADED = "vllm:lora_adapter_loaded"
ON_GPU, ON_CPU = "vllm:num_gpu_loaded_lora_adapters", "vllm:num_cpu_loaded_lora_adapters"
SLOTS = "vllm:max_gpu_lora_adapters"
REPLACED = frozenset({REQUESTS, LOADED, ON_GPU, ON_CPU, SLOTS})
# Grafana Mimir refuses samples with a longer label value, unless it is told otherwise.
LABEL_CHARACTERS = 2048


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter version in an engine's memory: in a slot of the batch, or merely in the host's."""

    base: str
    name: str
    in_slot: bool
    pinned: bool
    rank: int


class AdapterSeries(Collector):
    """Which adapters are loaded and which are waited for; at most `limit` of them by name, the latest used first."""

    def __init__(self, fleet: Fleet, registry: Registry, limit: int) -> None:
        self._fleet = fleet
        self._registry = registry
        self._limit = limit

    def collect(self) -> Iterator[Metric]:
        bases = [base for base in self._fleet if _serves(base)]
        if not bases:
            return
        loaded = [adapter for base in bases for adapter in self._loaded(base)]
        waiting = [name for base in bases for name in self._waiting(base)]
        requests = GaugeMetricFamily(
            REQUESTS,
            "The adapters that a batch can use at once, and those that requests wait for, by name; the value is the "
            "time in seconds since 1970.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        # One series for all bases: a picker takes the newest one alone.
        slots = sum(base.backend.slots for base in bases)
        in_slots = _listed(adapter.name for adapter in loaded if adapter.in_slot)
        requests.add_metric((str(slots), in_slots, _listed(waiting)), time.time())
        yield requests
        yield self._by_name(loaded)
        yield from _counts(bases, loaded)

    def _by_name(self, loaded: Sequence[Loaded]) -> Metric:
        family = GaugeMetricFamily(
            LOADED,
            "1 for an adapter that is loaded when it is scraped: level gpu in a slot of the batch (on a CPU too), cpu "
            "in the host's memory alone; pinned ones are not evicted.",
            labels=("model_name", "adapter_name", "level", "pinned", "rank"),
        )
        for adapter in loaded[: self._limit]:
            level, pinned = "gpu" if adapter.in_slot else "cpu", str(adapter.pinned).lower()
            family.add_metric((adapter.base, adapter.name, level, pinned, str(adapter.rank)), 1)
        return family

    def _loaded(self, base: Supervisor) -> Iterator[Loaded]:
        """The latest used first."""
        pinned = base.engine.pinned
        for id, state in reversed(base.engine.states.items()):
            if state in ("slot", "host") and (named := self._named(id)):
                name, rank = named
                yield Loaded(base.name, name, state == "slot", id in pinned, rank)

    def _waiting(self, base: Supervisor) -> Iterator[str]:
        """Names of adapters that have requests and no slot yet."""
        states = base.engine.states
        for residence in base.residents:
            if residence.leases and states.get(residence.id) != "slot" and (named := self._named(residence.id)):
                yield named[0]

    def _named(self, id: str) -> tuple[str, int] | None:
        """A version's public name and its rank; None once it is removed from the registry."""
        try:
            adapter = self._registry.resolve(id)
        except NotFound:
            return None
        return (adapter.name if self._registry.live(adapter.name) == adapter else adapter.tag), adapter.rank


class EngineSeries(CollectorRegistry):
    """vLLM's own series of every engine that serves, each series once: all as the engine has them, or these `names`."""

    def __init__(self, fleet: Fleet, names: Collection[str] = ()) -> None:
        super().__init__()
        self._fleet = fleet
        self._names = names

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for base in self._fleet:
            if _serves(base):
                for family in self._of(base):
                    known = families.setdefault(family.name, family)
                    if known is not family:
                        known.samples.extend(family.samples)
        yield from families.values()

    def _of(self, base: Supervisor) -> Iterable[Metric]:
        return base.backend.metrics(self._names)


class GatewaySeries(EngineSeries):
    """The same, but for what `AdapterSeries` has instead; who waits in the server's own queue waits here too."""

    def _of(self, base: Supervisor) -> Iterator[Metric]:
        for family in base.backend.metrics(self._names):
            if family.name in (WAITING, REASONS) and family.samples:
                yield _with_queue(family, _waiting_clients(base))
            elif family.name not in REPLACED:
                yield family


def _serves(base: Supervisor) -> bool:
    return base.phase is Phase.READY and not base.backend.dead


def _with_queue(family: Metric, waiting: int) -> Metric:
    """Counted with the first of an engine's data-parallel ranks: a picker reads the first series, others the sum."""
    first, *others = family.samples
    queued = Metric(family.name, family.documentation, family.type)
    if family.name == REASONS:  # the sum of all reasons is what waits
        own = first._replace(labels={**first.labels, "reason": "fair_queue"}, value=float(waiting))
        queued.samples = [*family.samples, own]
    else:
        queued.samples = [first._replace(value=first.value + waiting), *others]
    return queued


def _waiting_clients(base: Supervisor) -> int:
    """Requests of clients in the server's own queue; its own requests and background work give way to any client."""
    return sum(backlog.tickets for (tenant, _), backlog in base.engine.queue.backlog(LOW_PRIORITY).items() if tenant)


def _counts(bases: Sequence[Supervisor], loaded: Sequence[Loaded]) -> Iterator[Metric]:
    labels = ("model_name",)
    on_gpu = GaugeMetricFamily(ON_GPU, "Adapters in the slots of the batch when it is scraped.", labels=labels)
    on_cpu = GaugeMetricFamily(ON_CPU, "Adapters in the host's memory when it is scraped.", labels=labels)
    slots = GaugeMetricFamily(SLOTS, "Slots for adapters in the batch (max_loras).", labels=labels)
    for base in bases:
        own = [adapter for adapter in loaded if adapter.base == base.name]
        on_gpu.add_metric((base.name,), sum(adapter.in_slot for adapter in own))
        on_cpu.add_metric((base.name,), len(own))
        slots.add_metric((base.name,), base.backend.slots)
    yield from (on_gpu, on_cpu, slots)


def _listed(names: Iterable[str]) -> str:
    """As many names as fit in a label, in an order that only changes when they do: each other value is a new series."""
    kept, length = [], 0
    for name in dict.fromkeys(names):
        length += len(name) + 1
        if length > LABEL_CHARACTERS:
            break
        kept.append(name)
    return ",".join(sorted(kept))
