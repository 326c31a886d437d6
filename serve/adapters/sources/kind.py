"""A kind of source that an installed package adds, by an entry point of the group `loradock.adapter_sources`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from serve.errors import ConfigError

GROUP = "loradock.adapter_sources"


@dataclass(frozen=True, slots=True)
class SourceKind:
    """Addresses `scheme://PATH`. What of PATH is kept is the group `at` of `form`, which takes the whole of it;
    `example` is one, for errors.

    `bring(source, files)` copies the adapter's files (`serve.adapters.adapter.FILES`) by `files.copy(remote, name)`,
    which counts their bytes and seconds, and returns the source, with the version that was read where an address may
    move. It blocks. Unless it is `public`, only tenant `default` may name it: it runs in this server, with all that
    this server may read.
    """

    scheme: str
    form: re.Pattern[str]
    example: str
    bring: Callable[[Any, Any], Any]
    public: bool = False


@cache
def offered() -> Mapping[str, SourceKind]:
    """By scheme; ConfigError for a package whose kind cannot be loaded."""
    kinds: dict[str, SourceKind] = {}
    for point in metadata.entry_points(group=GROUP):
        owner = point.dist.name if point.dist else "a package"
        try:
            kind: SourceKind = point.load()
        except Exception as error:
            raise ConfigError(
                f"{owner} offers the source {point.name!r}, and {point.value} cannot be loaded "
                f"({type(error).__name__}: {error}): mend it, or pip uninstall {owner}"
            ) from error
        if kinds.setdefault(kind.scheme, kind) is not kind:
            raise ConfigError(f"two packages offer the source {kind.scheme}://: uninstall one of them")
    return kinds
