"""vLLM's options, each a setting under vLLM's own name, and those that this server answers for itself."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serve.config.values import SIZES
from serve.errors import ConfigError

# What this server prefers to vLLM's.
ADAPTERS = {"max_loras": 8, "max_cpu_loras": 32, "max_lora_rank": 16}

_PROXY = "put a proxy in front"
_ONE_PROCESS = "one server is one process here"
_NO_ACCESS_LOG = "this server writes no access log"
_NO_DOCS = "this server has pages of its own: /docs, and /openapi.json for programs"

# Options that would have no effect here, and what to use instead.
REFUSED = {
    "api_key": "use api_keys and admin_keys",
    "lora_modules": "push adapters with `loradock adapters push`",
    "enable_lora": "adapters are always on here",
    "headless": _ONE_PROCESS,
    "api_server_count": _ONE_PROCESS,
    "grpc": "this server speaks HTTP",
    "grpc_port": "this server speaks HTTP",
    "uds": "use host and port",
    "middleware": _PROXY,
    "uvicorn_log_level": "use log_level",
    "worker_extension_cls": "it is taken by this server",
    # Its graphs count adapters; its kernels count the rows without one, too, and leave the last adapter out.
    "specialize_active_lora": "with it vLLM answers an adapter's requests with the base beside requests of the base",
    "served_model_name": "use name, or `name:` of an entry of `engines:`",
    "ssl_ca_certs": _PROXY,
    "ssl_cert_reqs": _PROXY,
    "ssl_ciphers": _PROXY,
    "enable_ssl_refresh": _PROXY,
    "root_path": _PROXY,
    "disable_uvicorn_access_log": _NO_ACCESS_LOG,
    "disable_access_log_for_endpoints": _NO_ACCESS_LOG,
    "disable_fastapi_docs": _NO_DOCS,
    "enable_offline_docs": _NO_DOCS,
    "enable_server_load_tracking": "see loradock_* in /metrics, and /v1/engines",
    "enable_tokenizer_info_endpoint": "/tokenizer_info is not served here",
    "data_parallel_supervisor_port": _ONE_PROCESS,
    "dp_supervisor_probe_interval_s": _ONE_PROCESS,
    "dp_supervisor_probe_timeout_s": _ONE_PROCESS,
    "dp_supervisor_probe_failure_threshold": _ONE_PROCESS,
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


def whole(engine: Mapping[str, Any], option: str) -> int:
    """A whole number above 0 of an engine's option; 1 where it is not given."""
    text = str(engine.get(option, 1)).strip()
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ConfigError(f"{option} takes a whole number above 0, not {engine[option]!r}")
    return int(text)


def kv_cache(engine: Mapping[str, Any]) -> int:
    """Bytes of KV cache that an engine's options ask for, of all ranks together; 0 where they do not say."""
    value = engine.get("kv_cache_memory_bytes", 0)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", str(value))
    if not match:
        raise ConfigError(f"kv_cache_memory_bytes takes bytes or a size like 2G, not {value!r}")
    unit = match[2].lower() + ("i" if match[2].isupper() else "")
    return whole(engine, "data_parallel_size") * int(float(match[1]) * SIZES[unit])
