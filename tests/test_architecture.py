"""The house keeps its shape. Who may import whom is import-linter's (`make lint`, contracts in pyproject.toml)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
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
WIDE_CONSTRUCTORS: dict[str, tuple[int, int]] = {}
WIDE_CLASSES: dict[str, int] = {
    "serve/adapters/registry/registry.py Registry": 29,
    "serve/adapters/registry/snapshot.py SnapshotReader": 22,
    "serve/client/adapter_client.py AdapterClient": 39,
    "serve/drift/monitor.py DriftMonitor": 22,
    "serve/drift/signal.py Signal": 27,
    "serve/engine/backend.py Backend": 31,
    "serve/engine/supervisor.py Supervisor": 30,
    "serve/vllm_backend/backend.py VLLMBackend": 31,
}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGES, ids=named)
def test_a_package_says_what_lives_there_and_what_may_not(path):
    said = ast.get_docstring(parsed(path)) or ""
    top = path.parent.parent == ROOT
    assert said if top else len([line for line in said.splitlines() if line]) >= 2


def test_the_top_of_serve_is_read_at_a_glance():
    entries = [path for path in (ROOT / "serve").iterdir() if path.name not in ("__pycache__", "__init__.py")]
    assert len(entries) <= 25, sorted(path.name for path in entries)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_nothing_is_called_after_nothing(path):
    assert not {"utils", "util", "common", "misc", "helpers"} & set(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_and_its_functions_stay_short(path):
    """Ruff has no such rules. A function that must be longer says why in a comment `# long:` on its first line."""
    source = path.read_text()
    lines = source.splitlines()
    assert len(lines) <= MODULE_LINES, f"{len(lines)} lines; does it still hold one thing?"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "# long:" not in lines[node.lineno - 1]:
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} has over {FUNCTION_LINES} lines"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_line_assigns_one_thing_or_a_pair(path):
    """Three values in a line save lines, and cost whoever looks for a name."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Tuple):
            if not isinstance(node.value, ast.Tuple):
                continue
            assert len(node.value.elts) < 3, f"line {node.lineno}"


@cache
def classes() -> list[tuple[str, ast.ClassDef]]:
    nodes = [(path, node) for path in MODULES for node in ast.walk(parsed(path))]
    return [(f"{named(path)} {node.name}", node) for path, node in nodes if isinstance(node, ast.ClassDef)]


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


# What exists to change objects of vLLM.
CHANGES_VLLM = ("serve/vllm_backend/", "serve/cpu_kernels/")
# Attributes of objects that are not ours.
OTHERS = {
    "serve/adapters/file_thread.py": {"_USED.cpu"},  # threading.local
    "serve/adapters/registry/database.py": {"connection.isolation_level"},  # sqlite3
    "serve/adapters/sources/mlflow_download.py": {"sys.stdout"},
    "serve/models/gguf/tokenizer.py": {"made.post_processor"},  # tokenizers
    "serve/names.py": {
        f"_beginning.max{kind}" for kind in ("level", "list", "dict", "string", "long", "other")
    },  # reprlib
    "serve/rollout/webhook.py": {"connection.sock"},  # http.client
    "serve/server/connection.py": {"self.cycle.transport"},  # uvicorn
    "serve/server/launch.py": {"record.msg", "record.args", "record.exc_info"},  # logging
    "serve/server/logs.py": {"logger.handlers", "logger.propagate"},
    "serve/server/preloaded.py": {"os.environ"},
    "serve/server/ray_router.py": {"pending_request.routing_context.should_backoff"},  # Ray
    "serve/server/temporary_folder.py": {"tempfile.tempdir"},  # Python's, which a variable gives it
    "serve/telemetry/tracing/tracing_sdk.py": {"module.encode_spans"},  # OpenTelemetry
}


PARTS = [path for path in MODULES if named(path).startswith("serve/") and not named(path).startswith(CHANGES_VLLM)]


@pytest.mark.parametrize("path", PARTS, ids=named)
def test_what_a_part_works_with_is_set_by_its_constructor_or_itself(path):
    """An attribute of another object is set by the function that made it or by the module of its class, and that of a
    record, whose class says its fields, by the modules beside that one too."""
    tree = parsed(path)
    friends = OTHERS.get(named(path), set())
    own = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in attributes(node)}
    own |= {name for beside in path.parent.glob("*.py") for name in record_fields(beside)}
    for line, owner, name in stores(tree, frozenset()):
        assert name in own or owner.endswith(".state") or f"{owner}.{name}" in friends, f"line {line}: {owner}.{name}"


def stores(node: ast.AST, created: frozenset[str]) -> Iterator[tuple[int, str, str]]:
    """Line, object and name of attributes that are set, but for those of `self` and of what its function created."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        created |= {name for part in ast.walk(node) for name in creations(part)}
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        owner = ast.unparse(node.value)
        if owner not in {"self", "cls", *created}:
            yield node.lineno, owner, node.attr
    for child in ast.iter_child_nodes(node):
        yield from stores(child, created)


def creations(node: ast.AST) -> Iterator[str]:
    """The name that this binds to a new object."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
        return
    called = ast.unparse(node.value.func).split(".")
    if called[-1][:1].isupper() or called[0] == "cls" or called[-1] == "copy":
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def attributes(node: ast.ClassDef) -> Iterator[str]:
    """What its body declares, and what its constructor sets."""
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id
        if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "__slots__":
            yield from ast.literal_eval(part.value)
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            stored = [each for each in ast.walk(part) if isinstance(each, ast.Attribute)]
            yield from (each.attr for each in stored if isinstance(each.ctx, ast.Store))


@cache
def record_fields(path: Path) -> frozenset[str]:
    """Of dataclasses that are not frozen, and of msgspec structs."""
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]
    return frozenset(name for node in nodes if is_record(node) for name in attributes(node))


def is_record(node: ast.ClassDef) -> bool:
    decorators = [ast.unparse(each) for each in node.decorator_list]
    dataclass = any(each.startswith("dataclass") and "frozen=True" not in each for each in decorators)
    return dataclass or any(ast.unparse(base).endswith("Struct") for base in node.bases)


@pytest.mark.parametrize("path", sorted((ROOT / "serve/api/routes").glob("*.py")), ids=named)
def test_a_route_takes_the_parts_that_it_uses_and_not_the_server(path):
    assert "state.parts" not in path.read_text()


def test_the_servers_of_tests_are_made_in_one_place():
    """With uvicorn's own keep-alive, which is httpx's to the second, one request of thousands met a closing end."""
    makers = {named(path) for path in (ROOT / "tests").rglob("*.py") if "uvicorn." + "Config(" in path.read_text()}
    assert makers == {"tests/support/listening.py"}
