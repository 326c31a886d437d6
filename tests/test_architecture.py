"""The house keeps its shape. Who may import whom is import-linter's (`make lint`, contracts in pyproject.toml)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [path for package in ("serve", "optimize") for path in (ROOT / package).rglob("*.py")]
PACKAGES = [path for path in MODULES if path.name == "__init__.py"]

MODULE_LINES = 700
FUNCTION_LINES = 60
PARAMETERS = 8
CALLBACKS = 3
METHODS = 20
# What is above a bound: parameters and callbacks of a constructor, public methods of a class. The lists only shrink: no
# entry grows, and who has come below a bound leaves its list.
WIDE_CONSTRUCTORS: dict[str, tuple[int, int]] = {
    "serve/dataset/datasets.py Datasets": (11, 4),
    "serve/drift/detector/detector.py Drift": (9, 0),
    "serve/gateway/inference.py Inference": (14, 6),
    "serve/jobs/batches/batch_runner.py BatchRunner": (9, 2),
    "serve/jobs/batches/batches.py Batches": (12, 2),
    "serve/jobs/finetuning/finetuning.py FineTuning": (16, 2),
    "serve/jobs/finetuning/job_runner.py JobRunner": (10, 1),
    "serve/jobs/finetuning/workers.py Workers": (10, 0),
}
WIDE_CLASSES: dict[str, int] = {
    "serve/adapters/registry/registry.py Registry": 29,
    "serve/adapters/registry/snapshot.py SnapshotReader": 22,
    "serve/client/adapter_client.py AdapterClient": 39,
    "serve/drift/monitor.py DriftMonitor": 22,
    "serve/drift/signal.py Signal": 27,
    "serve/engine/backend.py Backend": 31,
    "serve/engine/supervisor.py Supervisor": 30,
    "serve/loop/loop_rows.py LoopRows": 27,
    "serve/rollout/lifecycle.py Lifecycle": 23,
    "serve/vllm_backend/backend.py VLLMBackend": 31,
}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGES, ids=named)
def test_a_package_says_what_lives_there_and_what_may_not(path):
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    top = path.parent.parent == ROOT
    assert said if top else len([line for line in said.splitlines() if line]) >= 2


def test_the_top_of_serve_is_read_at_a_glance():
    entries = [path for path in (ROOT / "serve").iterdir() if path.name not in ("__pycache__", "__init__.py")]
    assert len(entries) <= 24, sorted(path.name for path in entries)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_nothing_is_called_after_nothing(path):
    assert not {"utils", "util", "common", "misc", "helpers"} & set(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_and_its_functions_stay_short(path):
    """Ruff has no such rules. A function that must be longer says why in a comment `# long:` on its first line."""
    source = path.read_text()
    lines = source.splitlines()
    assert len(lines) <= MODULE_LINES, f"{len(lines)} lines; does it still hold one thing?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "# long:" not in lines[node.lineno - 1]:
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} has over {FUNCTION_LINES} lines"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_line_assigns_one_thing_or_a_pair(path):
    """Three values in a line save lines, and cost whoever looks for a name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Tuple):
            if not isinstance(node.value, ast.Tuple):
                continue
            assert len(node.value.elts) < 3, f"line {node.lineno}"


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{named(path)} {node.name}", node


def constructor(node: ast.ClassDef) -> tuple[int, int]:
    """How many parameters it has, and how many of them are callbacks: a clock is none."""
    made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    parameters = [part for one in made for part in (*one.args.posonlyargs, *one.args.args[1:], *one.args.kwonlyargs)]
    typed = [(part.arg, ast.unparse(part.annotation)) for part in parameters if part.annotation]
    return len(parameters), sum("Callable" in kind and name != "clock" for name, kind in typed)


def test_a_constructor_takes_few_things_and_fewer_callbacks():
    """A fourth callback is a missing event, a ninth parameter a missing part."""
    found = {name: constructor(node) for name, node in classes()}
    wide = {name: width for name, width in found.items() if width[0] > PARAMETERS or width[1] > CALLBACKS}
    assert wide.keys() == WIDE_CONSTRUCTORS.keys()
    for name, (parameters, callbacks) in wide.items():
        assert parameters <= WIDE_CONSTRUCTORS[name][0] and callbacks <= WIDE_CONSTRUCTORS[name][1], name


def test_a_class_does_few_things():
    wide = {name: len(methods) for name, node in classes() if len(methods := public(node)) > METHODS}
    assert wide.keys() == WIDE_CLASSES.keys()
    for name, count in wide.items():
        assert count <= WIDE_CLASSES[name], name


def public(node: ast.ClassDef) -> list[str]:
    names = [part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [name for name in names if not name.startswith("_")]


ASSEMBLY = ["serve/server/assembly.py", "serve/jobs/batches/build.py", "serve/loop/build.py"]


@pytest.mark.parametrize("name", ASSEMBLY)
def test_whoever_puts_parts_together_sets_no_attribute_of_one(name):
    """What a part works with comes through its constructor."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert isinstance(node.value, ast.Name) and node.value.id == "self", f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "serve/api/routes").glob("*.py")), ids=named)
def test_a_route_takes_the_parts_that_it_uses_and_not_the_server(path):
    assert "state.parts" not in path.read_text()
