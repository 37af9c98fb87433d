"""The two laws of docs/architecture.md: imports point down, and dictionary/ and models/ never import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tl_crosscoder

PACKAGE = Path(tl_crosscoder.__file__).parent
FLOORS = {
    "types": 0, "errors": 0, "widths": 0, "registry": 0, "files": 0, "lock": 0, "gates": 0, "ranks": 0, "data": 0,
    "dictionary": 1, "models": 1, "figures": 1,
    "training": 2, "analysis": 2, "interventions": 2,
    "studies": 3,
    "report": 4, "hub": 4,
    "diffing": 5, "demo": 5,
    "cli": 6, "__main__": 6,
}  # fmt: skip
LARGE = {
    "transformer_lens",
    "nnsight",
    "sae_lens",
    "peft",
    "transformers",
    "wandb",
    "matplotlib",
    "datasets",
}
HEAVY = LARGE | {"pandas"}
LAZY = LARGE | {"triton"}
#: What reads another library's classes on load, and is itself imported inside functions only.
APART = (
    "tl_crosscoder.hub.sae_lens.native",
    "tl_crosscoder.dictionary.triton_bag",
    "tl_crosscoder.training.triton_adam",
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(module: str) -> str:
    return module.split(".")[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement reads: of ``from a.b import c`` it is ``a.b.c`` where that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module or "" for name in names]
    return []


def imports_of(path: Path) -> set[str]:
    """Every import, inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name for node in ast.walk(tree) for name in imported(node)}


def imports_on_load(path: Path) -> set[str]:
    """The imports that run when the module is imported: not those inside functions or under ``TYPE_CHECKING``."""
    found, todo = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing_only:
            continue
        found |= set(imported(node))
        todo += ast.iter_child_nodes(node)
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("tl_crosscoder.")}


def modules_after(code: str) -> set[str]:
    """The top-level modules loaded in a fresh process that ran ``code``."""
    tell = "\nimport sys; print('loaded', *sorted({name.partition('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", code + tell]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_every_module_stands_on_a_floor():
    assert {room(name) for name in MODULES} <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path):
    here = room(module_name(path))
    up = {name for name in own(imports_of(path)) if FLOORS[room(name)] > FLOORS[here]}
    assert not up, f"{module_name(path)} imports a higher floor"


def test_dictionary_and_models_never_import_each_other():
    across = [
        (module_name(path), name)
        for path in FILES
        for name in own(imports_of(path))
        if {room(module_name(path)), room(name)} == {"dictionary", "models"}
    ]
    assert not across


def test_no_module_reaches_through_the_package_itself():
    """``from tl_crosscoder import train`` would hide which floor it reaches; the version is on none."""
    through = [
        (module_name(path), alias.name)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "tl_crosscoder"
        for alias in node.names
        if alias.name != "__version__" and f"tl_crosscoder.{alias.name}" not in MODULES
    ]
    assert not through


def test_imports_have_no_cycle():
    graph = {module_name(path): own(imports_of(path)) & MODULES - {module_name(path)} for path in FILES}
    while graph:
        leaves = {name for name, below in graph.items() if not below}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: below - leaves for name, below in graph.items() if name not in leaves}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path):
    """A subclass of another library's class needs that library on load: such modules are imported inside functions only."""
    if module_name(path).startswith(APART):
        return
    loaded = imports_on_load(path)
    assert not {name.partition(".")[0] for name in loaded} & LAZY
    assert not {name for name in loaded if name.startswith(APART)}


def test_data_modules_load_without_torch():
    code = "import tl_crosscoder.data.planted_tiny, tl_crosscoder.data.planted_smollm2, tl_crosscoder.data.smollm2_base"
    assert not modules_after(code) & (HEAVY | {"torch", "numpy"})


def test_importing_the_package_imports_no_heavy_library():
    assert not modules_after("import tl_crosscoder") & (HEAVY | {"torch", "numpy"})


def test_help_imports_no_torch():
    code = """
import sys
from tl_crosscoder.cli import main
sys.argv = ["tl-crosscoder", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert not modules_after(code) & (HEAVY | {"torch"})
