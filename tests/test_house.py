"""The house: layers without circles, modules and functions that are read in a sitting, packages that hold no code."""

import ast
from pathlib import Path

import pytest

import uadtool

PACKAGE = Path(uadtool.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and those for type checkers count."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("uadtool", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    imports["uadtool"] = set()  # its lazy API; every module takes the version from there
    while free := {module for module, needed in imports.items() if not needed & imports.keys()}:
        imports = {module: needed for module, needed in imports.items() if module not in free}
    assert sorted(imports) == []


def test_the_top_of_the_package_is_seen_at_a_glance():
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(folders) <= 10
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    assert all((folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_read_in_a_sitting(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, node.name
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert [type(node) for node in tree.body] == [ast.Expr], "a docstring only"
