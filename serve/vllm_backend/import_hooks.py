"""What is done around the execution of a module that is imported later, whoever imports it.

vLLM waits for modules of torch's compiler in the same way (`vllm.env_override`). A module that nobody imports costs
nothing; one that is found in another way than by a loader with `exec_module` is imported as if nobody waited.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# A context that is entered before a module's code runs and left after it.
Around = Callable[[ModuleType], AbstractContextManager[object]]


def around(name: str, context: Around) -> None:
    """Enter a context around the code of a module, once, when it is imported. Nothing, if it has been."""
    if name not in sys.modules:
        sys.meta_path.insert(0, _Finder(name, context))


class _Finder(MetaPathFinder):
    def __init__(self, name: str, context: Around) -> None:
        self._name = name
        self._context = context

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(fullname)
        loader: Any = spec.loader if spec else None
        if (execute := getattr(loader, "exec_module", None)) is not None:

            def exec_module(module: ModuleType) -> None:
                with self._context(module):
                    execute(module)

            loader.exec_module = exec_module
        return spec
