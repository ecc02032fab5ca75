"""Imports run one way, imports for types included. The tables below are the rules; the tests apply them to every module."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from nutgraf.compressors import COMPRESSORS

ROOT = Path(__file__).parents[1]

# Inside compressors/: a part imports itself and the parts in the rows above it.
LAYERS = [
    ["core"],
    ["reader"],
    ["base"],
    ["encoders", "registry", "fidelity"],
    ["slots"],
    ["objectives"],
    ["soft", "kv", "text"],
    ["importers"],
    ["loading"],
    ["__init__"],
]
# Between the top-level folders: what each may import besides itself. Absent folders (cli.py) may import everything.
MAY_IMPORT = {
    "console": {"compressors"},
    "compressors": set(),
    "recipes": {"compressors", "console"},
    "adapters": {"compressors", "console"},
    "benchmarks": {"compressors", "console", "recipes", "adapters"},
    "__init__": {"compressors"},
    "examples": {"__init__", "compressors", "adapters"},
}
# Adapters of different frameworks, and the package each wraps.
FRAMEWORKS = {"llama_index": "llama_index", "langchain": "langchain_core", "haystack": "haystack"}
# Text methods may extend one another: LongLLMLingua is LLMLingua with a question.
FAMILIES = {"text"}


def modules() -> list[str]:
    """Dotted names below the package, `__init__` files by their own name."""
    folders = ("adapters", "benchmarks", "compressors", "recipes", "examples")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)


def exists(name: str) -> str | None:
    """The module that `name` refers to: a file, or a package's `__init__`."""
    path = ROOT.joinpath(*name.split(".")) if name else ROOT
    if name and path.with_suffix(".py").is_file():
        return name
    return f"{name}.__init__".lstrip(".") if (path / "__init__.py").is_file() else None


@cache
def imports(module: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The package's modules and the other top-level packages that a module imports, anywhere in its code."""
    own: set[str] = set()
    foreign: set[str] = set()
    for node in ast.walk(ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name, inside = node.module or "", node.level > 0
            if name.partition(".")[0] == "nutgraf":
                name, inside = name.partition(".")[2], True
            elif inside:
                name = ".".join([*module.split(".")[: -node.level], *filter(None, [name])])
            if not inside:
                foreign.add(name.partition(".")[0])
                continue
            for alias in node.names:
                target = exists(f"{name}.{alias.name}".lstrip(".")) or exists(name)
                assert target, f"{module} imports {name}.{alias.name}, which does not exist"
                own.add(target)
    return tuple(sorted(own - {module})), tuple(sorted(foreign - {""}))


def pairs(folder: str = "") -> Iterator[tuple[str, str]]:
    """Every (importer, imported) pair of modules, the importer below `folder`."""
    for module in modules():
        if module.startswith(folder):
            yield from ((module, target) for target in imports(module)[0])


def part(module: str, level: int) -> str:
    return module.split(".")[level]


def check(found: list[tuple[str, str]]) -> None:
    wrong = [f"{module} imports {target}" for module, target in found]
    assert not wrong, "\n" + "\n".join(wrong)


def test_compressors_import_downwards_only() -> None:
    floor = {name: level for level, names in enumerate(LAYERS) for name in names}
    wrong = []
    for module, target in pairs("compressors."):
        if part(target, 0) == "compressors":
            here, there = part(module, 1), part(target, 1)
            if here != there and floor[there] >= floor[here]:
                wrong.append((module, target))
    check(wrong)


def test_top_level_folders_import_what_they_may() -> None:
    wrong = []
    for module, target in pairs():
        here, there = part(module, 0), part(target, 0)
        if there == "cli" or (here in MAY_IMPORT and here != there and there not in MAY_IMPORT[here]):
            wrong.append((module, target))
    check(wrong)


def is_method(module: str) -> bool:
    tree = ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    decorators = [d for node in tree.body if isinstance(node, ast.ClassDef) for d in node.decorator_list]
    return any(isinstance(d, ast.Name) and d.id == "register_compressor" for d in decorators)


def test_a_method_imports_no_other_method() -> None:
    found = {module for module in modules() if module.split(".")[:1] == ["compressors"] and is_method(module)}
    methods = {module for module in found if part(module, 1) in {"soft", "kv", "text"}}
    assert len(methods) > 10
    check(
        [
            (module, target)
            for module, target in pairs("compressors.")
            if module in methods
            and target in methods
            and not (part(module, 1) == part(target, 1) and part(target, 1) in FAMILIES)
        ]
    )


def test_adapters_of_frameworks_do_not_import_each_other() -> None:
    wrong = []
    for module in modules():
        if part(module, 0) != "adapters" or module == "adapters.__init__":
            continue
        here = part(module, 1)
        others = {name: package for name, package in FRAMEWORKS.items() if name != here}
        own, foreign = imports(module)
        if here in FRAMEWORKS or here == "store":
            wrong += [(module, t) for t in own if t.startswith("adapters.") and part(t, 1) in others]
            wrong += [(module, package) for package in foreign if package in others.values()]
    check(wrong)


def test_suites_do_not_import_commands() -> None:
    found = pairs("benchmarks.")
    check([(m, t) for m, t in found if t.startswith("benchmarks.cli") and not m.startswith("benchmarks.cli")])


def test_no_circles() -> None:
    """Depth-first search; a module that is still open when it is met again closes a circle."""
    state: dict[str, int] = {}
    circles: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in imports(module)[0]:
            if state.get(target) == 1:
                circles.append(" -> ".join([*path[path.index(target) :], target]))
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    for module in modules():
        if module not in state:
            visit(module, [module])
    assert not circles, "\n" + "\n".join(circles)


@pytest.mark.slow
def test_training_and_measuring_need_no_framework() -> None:
    names = [f"nutgraf.{name.removesuffix('.__init__')}" for name in modules() if name.startswith("recipes.")]
    names += ["nutgraf.benchmarks.cli.app", "nutgraf.benchmarks.gpu_training"]
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"assert not set(sys.modules) & set({list(FRAMEWORKS.values())!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_are_short() -> None:
    """One method, one short file, few settings of its own beside the shared groups."""
    own = []
    for cls in COMPRESSORS.values():
        path = Path(sys.modules[cls.__module__].__file__ or "")
        if not path.is_relative_to(ROOT / "compressors"):
            continue  # a test's own method
        lines, most = len(path.read_text().splitlines()), 200 if path.parent.name == "text" else 150
        assert lines <= most, f"{path.name} has {lines} lines; a method has at most {most}."
        groups = [base for base in cls.config_class.__mro__[1:] if not vars(base).get("method")]
        shared = {f for base in groups for f in getattr(base, "__dataclass_fields__", ())}
        own.append(len(set(cls.config_class.__dataclass_fields__) - shared))
        assert own[-1] <= 8, f"{cls.__name__} has {own[-1]} settings of its own; at most 8."
    assert statistics.median(own) <= 6
    assert len(list((ROOT / "compressors").glob("[!_]*"))) <= 16
