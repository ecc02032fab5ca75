"""Which code measured a row: a hash of the modules that decide what comes out, so that stale rows are known."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..compressors import Compressor
from .rows import PACKAGE

# What every line of the quality suite runs; a compressor's own module comes on top.
ROOTS = ("benchmarks.quality", "compressors.reader", "recipes.templates")


def code_of(compressor: Compressor | None = None) -> str:
    """Hash of the code that measures a line of the quality suite, with a compressor if it has one.

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

    Comments, docstrings and layout do not count, nor do packages' `__init__` files, which only gather names.

    Args:
        modules: dotted names below the package.
        root: the package's folder.

    Raises ValueError for a module that is not there.
    """
    found: dict[Path, str] = {}
    todo = [root.joinpath(*name.split(".")).with_suffix(".py") for name in modules]
    if missing := [path for path in todo if not path.is_file()]:
        raise ValueError(f"There is no module {missing[0]}.")
    while todo:
        path = todo.pop()
        if path not in found:
            found[path], imported = _parsed(path)
            todo += imported
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(f"{path.relative_to(root)}\0{found[path]}\0".encode())
    return digest.hexdigest()[:10]


@cache
def _parsed(path: Path) -> tuple[str, tuple[Path, ...]]:
    """What a module says, and the files that its relative imports name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: list[Path] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            imported += [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
    return ast.dump(tree), tuple(file for file in imported if file.is_file())
