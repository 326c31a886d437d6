"""vLLM's functions as this process has them: where they are, what is over them, and the digest of vLLM's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from serve.cpu_kernels import digest
from serve.vllm_backend.patches.patch import Function


def current_digest(function: Function) -> str | None:
    """Of what this process has: vLLM's own below all that replaced it."""
    try:
        return digest.of_function(layers_of(bare(stock_of(function)))[-1])
    except (ImportError, AttributeError):
        return None
    except (OSError, TypeError, SyntaxError):
        return ""  # it has no source that could be read


def bound(place: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Our function of this place, with what it replaces as its first argument."""
    replacement = resolved(place)

    @wraps(replacement)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    replaced.loradock_original = original  # type: ignore[attr-defined]
    replaced.loradock_replacements = (*getattr(original, "loradock_replacements", ()), place)  # type: ignore[attr-defined]
    return replaced


def resolved(place: str) -> Any:
    module, _, name = place.partition(":")
    found = import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def owner_of(function: Function) -> tuple[Any, str]:
    module, _, path = function.place.partition(":")
    owner, _, name = path.rpartition(".")
    return resolved(f"{module}:{owner}"), name


def stock_of(function: Function) -> Any:
    owner, name = owner_of(function)
    return inspect.getattr_static(owner, name)


def bare(stock: Any) -> Callable[..., Any]:
    function: Callable[..., Any] = stock.__func__ if isinstance(stock, (staticmethod, classmethod)) else stock
    return function


def layers_of(function: Any) -> list[Any]:
    """The function, what it replaces, and so on down to vLLM's own."""
    layers = [function]
    while (below := getattr(layers[-1], "loradock_original", None)) is not None:
        layers.append(below)
    return layers
