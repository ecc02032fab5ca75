"""Hash of the code that measured a row, so that rows of older code are recognised as stale."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ...compressors import Compressor
from ..rows import PACKAGE

# modules that every line of the quality suite runs, besides a compressor's own
ROOTS = ("benchmarks.quality.quality", "compressors.reader.reader", "recipes.data.templates")


def code_of(compressor: Compressor | None = None) -> str:
    """Hash of the code that measures a line of the quality suite, including its compressor's module.

    A compressor from outside this package counts by its name alone.
    """
    if compressor is None:
        return source_hash(ROOTS)
    package, _, name = type(compressor).__module__.partition(".")
    if package != __name__.partition(".")[0]:
        return f"{source_hash(ROOTS)} {package}.{name}"
    return source_hash((*ROOTS, name))


@cache
def source_hash(modules: Sequence[str], root: Path = PACKAGE) -> str:
    """Hash of modules of a package and of all that they import from it by relative imports.

    Only content counts: every top-level statement is hashed by itself, and the sorted hashes are hashed, so that a definition
    or a file may move. Imports, comments, docstrings, layout and `__init__` files do not count. Raises ValueError for a
    module that does not exist.
    """
    found: dict[Path, tuple[str, ...]] = {}
    todo = [root.joinpath(*name.split(".")).with_suffix(".py") for name in modules]
    if missing := [path for path in todo if not path.is_file()]:
        raise ValueError(f"There is no module {missing[0]}.")
    while todo:
        path = todo.pop()
        if path not in found:
            found[path], imported = _parsed(path)
            todo += imported
    statements = sorted({statement for statements in found.values() for statement in statements})
    return hashlib.sha256("\0".join(statements).encode()).hexdigest()[:10]


@cache
def _parsed(path: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """Hashes of a module's top-level statements, and the files that its relative imports name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: list[Path] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            imported += [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
    tree = _Plain().visit(tree)
    statements = tuple(hashlib.sha256(ast.dump(node).encode()).hexdigest() for node in tree.body)
    return statements, tuple(file for file in imported if file.is_file())


class _Plain(ast.NodeTransformer):
    """Drop imports and docstrings."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def generic_visit(self, node: ast.AST) -> ast.AST:
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return super().generic_visit(node)
