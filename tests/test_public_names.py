"""The public surface: ``__init__.pyi``, ``__all__`` and the README speak of the same names."""

import ast
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tl_crosscoder

ROOT = Path(tl_crosscoder.__file__).parent
README = ROOT.parent / "README.md"


def stub() -> list[tuple[str, str]]:
    """(module, name) of every import in the stub, in the order they stand there."""
    tree = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [(node.module or "", alias.asname or alias.name) for node in imports for alias in node.names]


def snippets() -> list[ast.Module]:
    """The Python blocks of the README, parsed."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [ast.parse(block) for block in blocks]


def names_used(tree: ast.Module) -> set[str]:
    """The attributes of tl_crosscoder that a snippet uses, by whatever name it imports the package."""
    aliases, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name for alias in node.names if alias.name == "tl_crosscoder"}
        if isinstance(node, ast.ImportFrom) and node.module == "tl_crosscoder":
            used |= {alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            used.add(node.attr)
    return used


def test_the_stub_is_sorted_by_module_and_names_nothing_twice():
    modules, names = zip(*stub(), strict=True)
    assert list(modules) == sorted(modules)
    assert len(names) == len(set(names))


def test_all_is_exactly_the_stub():
    assert sorted(tl_crosscoder.__all__) == sorted(name for _, name in stub())
    assert set(tl_crosscoder.__all__) <= set(dir(tl_crosscoder))


def test_every_public_name_resolves():
    for name in tl_crosscoder.__all__:
        assert getattr(tl_crosscoder, name) is not None, name


def test_every_public_class_and_function_has_a_docstring_of_its_own():
    bare = []
    for name in tl_crosscoder.__all__:
        value = getattr(tl_crosscoder, name)
        doc = (
            (value.__doc__ or "").strip()
            if inspect.isclass(value) or inspect.isroutine(value)
            else "a constant"
        )
        if not doc or doc.startswith(f"{name}("):  # a dataclass without one gets its signature
            bare.append(name)
    assert not bare


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert not hasattr(tl_crosscoder, "no_such_name")


def test_every_name_in_the_readme_exists():
    assert snippets()
    missing = {name for tree in snippets() for name in names_used(tree) if not hasattr(tl_crosscoder, name)}
    assert not missing


@pytest.mark.skipif(find_spec("nnsight") is None, reason="needs nnsight")
def test_nnsight_takes_no_public_name_away():
    """nnsight gives every object, and so every module, methods of its own."""
    code = """
import nnsight, tl_crosscoder as tlc
for name in tlc.__all__:
    home = getattr(getattr(tlc, name), "__module__", "tl_crosscoder")
    assert home.startswith("tl_crosscoder"), (name, home)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
