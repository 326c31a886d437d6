"""What one operation of a chat template may make: one alone can take the machine's memory, and nothing ends it.

Jinja's sandbox bounds ranges. Operators, filters and calls are bounded here before they are done, and what is written
before it is put together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import isgenerator
from math import prod
from typing import Any

from jinja2 import nodes, sandbox
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from transformers.utils import chat_template_utils

# Characters of a text, items of a list or bits of a number that an operator makes of two, and characters of a chat.
LARGEST = 1 << 24
# What a filter or a call makes is no longer than the product of what it is given.
LARGEST_PRODUCT = 1 << 28

_WIDTHS = re.compile(r"\d{1,12}")


class BoundedEnvironment(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox in which transformers compiles chat templates."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.filters = _Filters({name: _bounded(name, function) for name, function in self.filters.items()})
        self.code_generator_class = _Generator
        self.concat = _written  # type: ignore[method-assign]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > LARGEST:
            raise _too_large(f"`{operator}`", LARGEST)
        return self.binop_table[operator](left, right)

    def call(__self, __context: Context, __object: Any, *args: Any, **named: Any) -> Any:
        name = getattr(__object, "__name__", "a call")
        if name != "safe_range":  # has a bound of its own
            method = getattr(__object, "__wrapped__", __object)  # the sandbox wraps str.format
            _check_call(name, (getattr(method, "__self__", None), *args, *named.values()))
        return super().call(__context, __object, *args, **named)


class _Generator(CodeGenerator):
    """Jinja's, whose `~` is bounded as what is written is."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Filters(dict[str, Any]):
    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _bounded(name, function))


def install() -> None:
    """For each template that transformers compiles from now on, and vLLM looks through."""
    sandbox.ImmutableSandboxedEnvironment = BoundedEnvironment  # type: ignore[misc]
    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **named: Any) -> Any:
        if name == "join":  # what it puts together may come from a generator
            args = tuple(list(value) if isgenerator(value) else value for value in args)
        _check_call(name, (*args, *named.values()))
        return function(*args, **named)

    return bounded


def _check_call(name: str, given: tuple[Any, ...]) -> None:
    sizes = [max(1, _length(value)) for value in given]
    if name in ("format", "format_map"):
        sizes += [max(1, int(width)) for text in given if isinstance(text, str) for width in _WIDTHS.findall(text)]
    if prod(sizes) > LARGEST_PRODUCT:
        raise _too_large(f"`{name}`", LARGEST_PRODUCT)


def _size(operator: str, left: Any, right: Any) -> int:
    """Of what the operator makes, at most; 0 for what needs no bound."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    if operator == "*":
        return _length(left) * _length(right)
    if operator == "+":
        return _length(left) + _length(right) if isinstance(left, str | bytes | list | tuple) else 0
    if operator == "%" and isinstance(left, str):
        widths = sum(map(int, _WIDTHS.findall(left)))
        given = right if isinstance(right, tuple) else (right,)
        return len(left) + widths + sum(_length(value) for value in given if "*" in left or isinstance(value, str))
    return 0


def _length(value: Any) -> int:
    """In characters or items, those of a list's texts too; a number's is the number, since it may be a width."""
    if isinstance(value, list | tuple):
        return len(value) + sum(len(item) for item in value if isinstance(item, str | bytes))
    if isinstance(value, str | bytes):
        return len(value)
    return value if isinstance(value, int) else 0


def _written(parts: Iterable[str]) -> str:
    pieces: list[str] = []
    length = 0
    for piece in parts:
        length += len(piece)
        if length > LARGEST:
            raise _too_large("putting texts together", LARGEST)
        pieces.append(piece)
    return "".join(pieces)


def _too_large(what: str, most: int) -> SecurityError:
    return SecurityError(f"the chat template makes more than {most:,} characters or items of one by {what}")
