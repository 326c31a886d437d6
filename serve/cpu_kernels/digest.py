"""What a function computes, as a digest of its source without comments, docstrings, annotations and formatting."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

LENGTH = 12
# Fields that say nothing of what is computed, or that one version of Python has and another has not.
_SILENT = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx"})


def of_function(function: Callable[..., Any]) -> str:
    """The digest of a function's source, without what decorators put around it; OSError where there is none."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return of_node(ast.parse(source).body[0])


def of_node(node: ast.AST) -> str:
    """The digest of a parsed function, its decorators included; the same with every version of Python."""
    text = "".join(_words(node))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        yield "["
        for item in value:
            yield from _words(item)
        yield "]"
    elif isinstance(value, ast.AST):
        yield f"({type(value).__name__}"
        for name, field in ast.iter_fields(value):
            if name in _SILENT or field is None or field == []:
                continue
            yield f" {name}="
            yield from _words(_without_docstring(value, field) if name == "body" else field)
        yield ")"
    else:
        yield repr(value)


def _without_docstring(node: ast.AST, body: Any) -> Any:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return body
    first = body[0]
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_text else body
