"""The architecture, read from the imports: layers, cycles, sizes, and what security forbids."""

import ast
import pathlib

import pytest

# A unit imports only from rows below it; units of one row never import each other.
ROWS = (
    ("__init__", "main"),
    ("api",),
    ("convert",),
    ("evaluate",),
    ("train", "serve"),
    ("tasks", "compress", "interop"),
    ("data", "models"),
    ("compute",),
    ("config", "types", "errors"),
)
RANK = {unit: len(ROWS) - number for number, row in enumerate(ROWS) for unit in row}
# Errors are the ground that settings stand on, too.
ALLOWED = {("config", "errors"), ("__init__", "config")}
FORBIDDEN_MODULES = {"pickle", "joblib", "torch", "dill", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile_command", "__import__"}
FILES = sorted(pathlib.Path("llmos_jax").rglob("*.py"))


def module_name(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit_of(module):
    parts = module.split(".")
    return "__init__" if parts == ["llmos_jax", "__init__"] else parts[1]


def violations(name, source, modules):
    """Returns what is wrong with one module's source, as sentences."""
    tree, found = ast.parse(source), []
    unit = unit_of(name)
    for target in imports(tree):
        root = target.split(".")[0]
        if root in FORBIDDEN_MODULES:
            found.append(f"{name} imports {root}")
        if root == "importlib" and unit != "config":
            found.append(f"{name} imports importlib")
        if target in modules and root == "llmos_jax" and target != "llmos_jax":
            other = unit_of(target)
            is_below = RANK[other] < RANK[unit] or (unit, other) in ALLOWED
            if other != unit and not is_below:
                found.append(f"{name} imports {target}, which is not below it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"{name}:{node.lineno} uses global")
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", None)
            if called in FORBIDDEN_CALLS:
                found.append(f"{name}:{node.lineno} calls {called}")
            if any(word.arg == "allow_pickle" for word in node.keywords):
                found.append(f"{name}:{node.lineno} allows pickles")
        if isinstance(node, ast.FunctionDef):
            limit = 200 if name == "llmos_jax.train.loop" else 80
            if node.end_lineno - node.lineno > limit:
                found.append(f"{name}:{node.lineno} {node.name} has more than {limit} lines")
    if source.count("\n") > 500:
        found.append(f"{name} has more than 500 lines")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_module(path):
    modules = {module_name(file) for file in FILES}
    assert not violations(module_name(path), path.read_text(), modules)


def test_every_public_name_has_a_docstring():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_no_import_cycles():
    modules = {module_name(path): path for path in FILES}
    graph = {
        name: {m for m in imports(ast.parse(path.read_text())) if m in modules and m != name} for name, path in modules.items()
    }
    done, active = set(), []

    def visit(name):
        assert name not in active, " -> ".join([*active[active.index(name) :], name])
        if name in done:
            return
        active.append(name)
        for other in sorted(graph[name]):
            visit(other)
        active.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize(
    ("name", "source", "word"),
    [
        ("llmos_jax.compute.x", "from llmos_jax.train import loop", "not below"),
        ("llmos_jax.data.x", "from llmos_jax.models import gpt", "not below"),
        ("llmos_jax.serve.x", "import pickle", "pickle"),
        ("llmos_jax.serve.x", "import importlib", "importlib"),
        ("llmos_jax.serve.x", "def f(s):\n    return eval(s)", "eval"),
        ("llmos_jax.serve.x", "import numpy\nnumpy.load('x', allow_pickle=True)", "pickles"),
        ("llmos_jax.serve.x", "def f():\n    global g\n    g = 1", "global"),
        ("llmos_jax.serve.x", "def f():\n" + "    x = 1\n" * 100, "80 lines"),
    ],
)
def test_the_reader_catches_what_it_forbids(name, source, word):
    modules = {module_name(file) for file in FILES}
    assert any(word in line for line in violations(name, source, modules))
