"""The house keeps its shape: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [path for package in ("serve", "optimize") for path in (ROOT / package).rglob("*.py")]

# In the order of imports: a module may use what stands on the shelves below its own.
SHELVES = [
    {"errors", "lora_cpu", "forkserver", "preload"},
    {"slo", "policy", "series", "express"},
    {"config", "machine", "drift", "thinning", "plugin", "worker", "tenant", "limits"},
    {
        "adapter",
        "auth",
        "base",
        "embedded",
        "tap",
        "client",
        "bench",
        "usage",
        "probe",
        "traffic",
        "embedding",
        "export",
        "monitoring",
        "page",
        "compare",
        "cutoff",
        "line",
        "popularity",
        "ranks",
    },
    {"schema"},
    {"blobs", "checkpoint", "registry", "upload", "source", "audit", "signals", "recent"},
    {"store"},
    {"admission", "backup", "plan", "batch"},
    {"engine", "keys", "baseline", "feedback", "trial", "capture"},
    {"transfer"},
    {"watcher", "fleet", "outputs"},
    {"router", "lifecycle", "monitor", "backend", "shadow"},
    {"inference", "wayback", "prober", "rehearsal", "follower"},
    {"alerts", "referee"},
    {"parts", "bodies"},
    {"routes"},
    {"app"},
    {"launch", "terminal"},
    {"cluster"},
    {"cli_adapters", "cli_bench", "cli_keys", "cli_monitoring", "cli_baseline", "cli_engines", "cli_operate"},
    {"cli"},
]
SHELF = {name: level for level, names in enumerate(SHELVES) for name in names}


def imported(path: Path) -> set[str]:
    """Dotted names of every module that `path` imports, at the top or later."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str | None:
    """`serve.bench.load` lies in the room `bench`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "serve" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_two_packages_do_not_import_one_another(path):
    mine = path.relative_to(ROOT).parts[0]
    other = {"serve": "optimize", "optimize": "serve"}[mine]
    meets = {name for name in imported(path) if name.split(".")[0] == other}
    assert not meets or path.name == "cli.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_vllm_is_known_to_the_backend_and_to_what_runs_inside_of_it(path):
    knows = any(name.split(".")[0] == "vllm" for name in imported(path))
    inside = path.parent.name == "lora_cpu" or path.name in ("forkserver.py", "preload.py")
    measures = path == ROOT / "optimize/engine.py"  # in a process of its own
    assert not knows or inside or measures or path.name in ("backend.py", "outputs.py")


@pytest.mark.parametrize("path", [p for p in MODULES if p.is_relative_to(ROOT / "serve")], ids=lambda path: path.stem)
def test_imports_go_downwards(path):
    parts = path.relative_to(ROOT / "serve").with_suffix("").parts
    mine = parts[0]
    if mine == "__init__":
        return
    assert mine in SHELF, f"{mine} has no shelf yet: say where it stands"
    for name in imported(path):
        other = room(name)
        if other in SHELF and other != mine:
            assert SHELF[other] < SHELF[mine], f"{mine} imports {other}, which stands above or beside it"
