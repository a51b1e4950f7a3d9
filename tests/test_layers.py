"""The packages import downwards only, without cycles, and no file grows beyond a chapter."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "paligemma_jax"

# From top to bottom: a module may import from its own line and from lines below it.
LAYERS = (
    ("cli",),
    ("evaluation",),
    ("benchmark", "training"),
    ("data", "demo"),
    ("pipeline", "loading"),
    ("generation", "viz", "weights"),
    ("processing",),
    ("hub", "models"),
    ("config", "drawing", "errors", "filesystem"),
)
RANK = {name: -number for number, names in enumerate(LAYERS) for name in names}
LONGEST = 600


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, `paligemma_jax` left out."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path, known: set[str], *, at_import: bool = False) -> Iterator[str]:
    """Modules of the package that a module imports; `at_import`: not inside of functions."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= set(ast.walk(node))
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paligemma_jax"):
            base = (node.module or "").removeprefix("paligemma_jax").removeprefix(".")
            for name in (alias.name for alias in node.names):
                inner = f"{base}.{name}".removeprefix(".")
                yield inner if inner in known else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("paligemma_jax."):
                    yield alias.name.removeprefix("paligemma_jax.")


def test_every_package_has_its_layer():
    top = {name.partition(".")[0] for name in modules()} - {"", "__main__"}
    assert top == set(RANK)


def test_imports_point_down():
    known = modules()
    upward = [
        f"{name} -> {imported}"
        for name, path in known.items()
        if name and name != "__main__"
        for imported in imports(path, set(known))
        if imported and RANK[imported.partition(".")[0]] > RANK[name.partition(".")[0]]
    ]
    assert not upward


def test_there_is_no_import_cycle():
    known = modules()
    graph = {
        name: {i for i in imports(path, set(known), at_import=True) if i and i != name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        if name:
            visit(name, ())


@pytest.mark.parametrize("name", ["paligemma_jax", "tests", "configs", "checkpoints"])
def test_no_file_is_longer_than_a_chapter(name: str):
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in (ROOT / name).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > LONGEST
    }
    assert not long
