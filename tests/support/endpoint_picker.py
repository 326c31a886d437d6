"""A gateway's endpoint picker, as far as it reads a model server: llm-d-router's rules, in Python.

The Gateway API inference extension's picker moved there. Followed line by line, at commit ebab687:
`pkg/epp/framework/plugins/datalayer/source/metrics/datasource.go` (the text parser of prometheus/common, which refuses
a second HELP or TYPE line of a name and samples before their TYPE), `.../extractor/metrics/extractor.go`, `loraspec.go`
and `spec.go` (which series of a family counts), and `.../scheduling/scorer/loraaffinity/lora_affinity.go`. What becomes
of `vllm:lora_adapter_loaded` is in that project's pull request 2792 and in its docs ("LoRA Adapter Residency").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

Families = Mapping[str, Sequence[Sample]]


@dataclass
class Endpoint:
    """What the picker knows of a server after a scrape; `errors` are counted and leave the rest as it is."""

    active: set[str] = field(default_factory=set)
    waiting_models: set[str] = field(default_factory=set)
    max_active: int = 0
    running: int = 0
    waiting: int = 0
    kv_cache: float = 0.0
    block_size: int = 0
    blocks: int = 0
    loaded: dict[str, tuple[str, bool, int]] | None = None  # adapter -> level, pinned, rank
    on_gpu: int = 0
    base: str = ""
    errors: list[str] = field(default_factory=list)

    def affinity(self, model: str) -> float:
        """What the LoRA affinity scorer gives this server for a request to `model`, 0 to 1."""
        if model in self.active:
            return 1.0
        if len(self.active) + len(self.waiting_models) < self.max_active:
            return 0.8
        return 0.6 if model in self.waiting_models else 0.0


def scraped(text: str) -> Endpoint:
    """What a scrape of this text tells a picker that had known nothing."""
    families, endpoint = parsed(text), Endpoint()
    for name, attribute, kind in (
        ("vllm:num_requests_waiting", "waiting", int),
        ("vllm:num_requests_running", "running", int),
        ("vllm:kv_cache_usage_perc", "kv_cache", float),
    ):
        if name in families:
            # Of equal timestamps the first is taken.
            setattr(endpoint, attribute, kind(families[name][0].value))
        else:
            endpoint.errors.append(f"metric family {name} not found")
    _lora_requests(endpoint, families)
    _cache(endpoint, families)
    _residency(endpoint, families)
    return endpoint


def parsed(text: str) -> Families:
    """Samples by family. ValueError where Go's parser has one and Python's has none."""
    types: Counter[str] = Counter()
    seen: set[str] = set()
    for line in text.splitlines():
        mark, kind, name = [*line.split(" ", 3), "", "", ""][:3]
        if mark == "#" and kind in ("TYPE", "HELP"):
            types[kind + name] += 1
            if types[kind + name] > 1 or (kind == "TYPE" and name in seen):
                raise ValueError(f"second {kind} line for metric name {name}, or after its samples")
        elif line:
            seen.add(line.partition("{")[0].partition(" ")[0])
    return {family.name: family.samples for family in text_string_to_metric_families(text) if family.samples}


def _lora_requests(endpoint: Endpoint, families: Families) -> None:
    """The value of each series is when it was made: the newest counts, the first of several."""
    samples = families.get("vllm:lora_requests_info", ())
    if not samples:
        return
    labels = max(samples, key=lambda sample: sample.value).labels
    endpoint.active = _split(labels.get("running_lora_adapters", ""))
    endpoint.waiting_models = _split(labels.get("waiting_lora_adapters", ""))
    endpoint.max_active = _number(endpoint, labels.get("max_lora", "")) or 0


def _cache(endpoint: Endpoint, families: Families) -> None:
    if "vllm:cache_config_info" not in families:
        endpoint.errors.append("metric family vllm:cache_config_info not found")
        return
    labels = families["vllm:cache_config_info"][0].labels
    endpoint.block_size = _number(endpoint, labels.get("block_size", "")) or 0
    endpoint.blocks = _number(endpoint, labels.get("num_gpu_blocks", "")) or 0


def _residency(endpoint: Endpoint, families: Families) -> None:
    """That there is a number of loaded adapters says that this server tells which they are, though it be 0."""
    counts = families.get("vllm:num_gpu_loaded_lora_adapters", ())
    if not counts:
        return
    endpoint.on_gpu = int(max(sample.value for sample in counts))
    endpoint.base = counts[0].labels.get("model_name", "")
    slots = families.get("vllm:max_gpu_lora_adapters", ())
    endpoint.max_active = int(max((sample.value for sample in slots), default=endpoint.max_active))
    endpoint.loaded = {}
    for sample in families.get("vllm:lora_adapter_loaded", ()):
        labels = sample.labels
        name, level = labels.get("adapter_name", ""), labels.get("level", "")
        if not name or not sample.value or endpoint.loaded.get(name, ("",))[0] == "gpu":
            continue
        endpoint.loaded[name] = (level, labels.get("pinned") == "true", int(labels.get("rank", 0)))


def _number(endpoint: Endpoint, text: str) -> int | None:
    """As Go's Atoi; an empty label is passed over."""
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        endpoint.errors.append(f"parsing {text!r}: invalid syntax")
        return None


def _split(names: str) -> set[str]:
    return {name.strip() for name in names.split(",") if name.strip()}
