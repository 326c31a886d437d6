"""An adapter: the value that the other packages pass around, and the limits of this deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.errors import AdapterRejected
from serve.names import tenant_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
# What says where it comes from; of each the first bytes are read, and none is kept.
CARD, MANIFEST = "README.md", "manifest.json"
# What says which tokens were added; of those that the base lacks the configuration keeps a list.
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# So many of their first bytes are read.
NOTES = {CARD: 64 << 10, MANIFEST: 64 << 10, TOKENIZER: 2 << 20, TOKENIZER_CONFIG: 256 << 10}
# The `code` of an error that says that a source has no adapter.
ABSENT = "adapter_files_missing"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One immutable version of an adapter; `name` is its full name, with the tenant in it (see serve.names)."""

    name: str
    version: int
    digest: str
    rank: int
    base: str | None
    target_modules: tuple[str, ...]
    nbytes: int
    created: float
    checks: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # What people wrote on it; it means nothing here.
    tags: tuple[str, ...] = field(default=(), compare=False)

    @property
    def id(self) -> str:
        """What the engine calls it; never reused for other bytes."""
        return f"{self.name}@{self.digest[:12]}"

    @property
    def tag(self) -> str:
        """What people call it."""
        return f"{self.name}@v{self.version}"

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return tenant_of(self.name)

    @property
    def is_mixed(self) -> bool:
        """It is made of several adapters, for a request, and is none that is registered."""
        return False

    @property
    def names(self) -> list[str]:
        """The full names of the adapters in it."""
        return [self.name]

    @property
    def labels(self) -> tuple[str, str]:
        """How metrics name it and its version."""
        return self.name, f"v{self.version}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What this deployment takes; a None does not ask. Licences are Hugging Face's identifiers, in lower case."""

    max_rank: int
    allowed_licenses: frozenset[str] | None = None
    allowed_target_modules: frozenset[str] | None = None
    allowed_digests: frozenset[str] | None = None
    max_tensors: int = 200_000
    # Take one whose every product is zero, as before the first step of its training.
    may_change_nothing: bool = False
    # What the conversion of another kind to LoRA may leave out, in the relative Frobenius norm.
    conversion_error: float = 0.05


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a sound adapter turned out to be."""

    rank: int
    base: str | None
    target_modules: tuple[str, ...]
    nbytes: int
    tensors: int
    license: str | None = None
    # What is stated of who trained it, on what (serve.adapters.provenance).
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # Those that it brings whole, or single rows of (serve.adapters.saved_modules).
    saved_modules: tuple[str, ...] = ()
    # The texts of those that its trainer added to the base's.
    added_tokens: tuple[str, ...] = ()
    # Of its classification head.
    labels: tuple[str, ...] = ()


def check_digest(digest: str, limits: Limits) -> str:
    """The digest, if this deployment takes these bytes."""
    if limits.allowed_digests is None or digest in limits.allowed_digests:
        return digest
    raise AdapterRejected(
        f"{digest} is not among the digests that this server takes; have it approved, then push again"
    )
