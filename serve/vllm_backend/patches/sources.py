"""vLLM's functions as text, out of a folder or a wheel: nothing is imported, so any version can be read."""

from __future__ import annotations

import ast
import importlib.util
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from serve.cpu_kernels import digest

Definition = ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """One version of packages, read file by file. `read` gives a file by its path from the root, or KeyError."""

    def __init__(self, read: Callable[[str], str]) -> None:
        self.read = read
        self._module = cache(self._parsed)

    @classmethod
    def installed(cls) -> Sources:
        """Of this environment."""
        return cls(_installed)

    @classmethod
    def wheel(cls, path: Path) -> Sources:
        archive = zipfile.ZipFile(path)
        return cls(lambda name: archive.read(name).decode())

    def digest(self, target: str) -> str | None:
        """The digest of `module:function` or `module:Class.method`, inherited ones included; None if it is gone."""
        function = self.function(target)
        return digest.of_node(function) if function is not None else None

    def function(self, target: str) -> Definition | None:
        module, _, name = target.partition(":")
        owner, _, method = name.rpartition(".")
        found = self._method(module, owner, method) if owner else self._named(module, name)
        return found if isinstance(found, Definition) else None

    def has(self, module: str, name: str = "") -> bool:
        """Whether `from module import name` finds something."""
        if not name:
            return self._module(module) is not None
        return self._named(module, name) is not None or self._module(f"{module}.{name}") is not None

    def member(self, target: str) -> ast.AST | None:
        """A field, property or method of `module:Class.name`, inherited ones included."""
        module, _, name = target.partition(":")
        owner, _, member = name.rpartition(".")
        return self._method(module, owner, member)

    def is_package(self, module: str) -> bool:
        try:
            self.read(f"{module.replace('.', '/')}/__init__.py")
        except KeyError:
            return False
        return True

    def _parsed(self, module: str) -> ast.Module | None:
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            try:
                return ast.parse(self.read(name))
            except KeyError:
                continue
        return None

    def _named(self, module: str, name: str) -> ast.AST | None:
        """What a module calls so, followed through its imports."""
        place = self._place(module, name)
        return place[1] if place else None

    def _place(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        tree = self._module(module)
        if tree is None:
            return None
        for node in _statements(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
                return module, node
            if isinstance(node, ast.ImportFrom) and (original := _imported(node, name)):
                source = _absolute(self, module, node)
                if place := self._place(source, original):
                    return place
                if (tree := self._module(f"{source}.{original}")) is not None:
                    return f"{source}.{original}", tree
            if isinstance(node, ast.Import) and any((it.asname or it.name) == name for it in node.names):
                return module, node
        return None

    def _method(self, module: str, owner: str, method: str) -> ast.AST | None:
        """A method or field of a class, or of the first of its bases that has one."""
        place = self._place(module, owner)
        if place is None or not isinstance(place[1], ast.ClassDef):
            return None
        where, kind = place
        assert isinstance(kind, ast.ClassDef)
        for node in kind.body:
            if isinstance(node, Definition) and node.name == method:
                return node
            if isinstance(node, ast.Assign | ast.AnnAssign) and method in _assigned(node):
                return node
        for base in kind.bases:
            name = ast.unparse(base).partition("[")[0]
            if (found := self._method(where, name, method)) is not None:
                return found
        return None


def _installed(name: str) -> str:
    package, _, rest = name.partition("/")
    spec = importlib.util.find_spec(package.removesuffix(".py"))
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder, rest)
        if path.is_file():
            return path.read_text()
    raise KeyError(name)


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """A module's own statements, those below `if` and `try` too."""
    found: list[ast.stmt] = []
    ahead = list(tree.body)
    while ahead:
        node = ahead.pop(0)
        found.append(node)
        if isinstance(node, ast.If | ast.Try | ast.With):
            inner = [*node.body, *getattr(node, "orelse", ())]
            inner += [each for handler in getattr(node, "handlers", ()) for each in handler.body]
            ahead = [*inner, *ahead]
    return found


def _assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def _imported(node: ast.ImportFrom, name: str) -> str:
    return next((it.name for it in node.names if (it.asname or it.name) == name), "")


def _absolute(sources: Sources, module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = sources.is_package(module)
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])
