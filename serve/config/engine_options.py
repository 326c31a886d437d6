"""vLLM's options, each a setting under vLLM's own name, and those that this server answers for itself."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

# What to use instead.
REFUSED = {
    "api_key": "use api_keys and admin_keys",
    "lora_modules": "push adapters with `loradock adapters push`",
    "enable_lora": "adapters are always on here",
    "headless": "one server is one process here",
    "api_server_count": "one server is one process here",
    "grpc": "this server speaks HTTP",
    "grpc_port": "this server speaks HTTP",
    "uds": "use host and port",
    "middleware": "put a proxy in front",
    "uvicorn_log_level": "use log_level",
    "worker_extension_cls": "it is taken by this server",
}


@cache
def engine_options() -> Mapping[str, str]:
    """vLLM's option names and their annotations, read as text: importing vLLM takes eight seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(spec.submodule_search_locations[0])
    options: dict[str, str] = {}
    for file in (root / "engine/arg_utils.py", root / "entrypoints/launchers/cli_args.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("EngineArgs", "FrontendArgs")):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        options[item.target.id] = ast.unparse(item.annotation)
    return MappingProxyType({name: kind for name, kind in options.items() if not name.startswith("_")})


def is_switch(name: str) -> bool:
    """An option that is true or false, so that `--name` needs no value."""
    return engine_options().get(name, "").split(" |")[0] == "bool"
