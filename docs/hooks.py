"""mkdocs hooks: render equations as MathML and fill generated tables, so that pages never go stale.

Markers in a page:

- ``<!-- settings: METHOD -->``: the settings of a method, from its config dataclass.
- ``<!-- methods -->``: the table of all methods, from the front matter of their pages.
- ``<!-- shared settings -->``: the groups of settings that several methods share.
- ``<!-- results: LINE, LINE -->``: recovered share on the pretrained reader, from benchmarks/results.
- ``<!-- commands -->``: the help of every command.
- ``<!-- include: FILE -->``: a Markdown file of the repository's root, its links to docs/ made relative.

Equations are fenced blocks of ``math`` and inline ``$`...`$``, as on GitHub.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import commands  # noqa: E402

POOLED = [ROOT / "benchmarks" / "results" / f"{name}_pooled.jsonl" for name in ("smollm2", "text_methods")]


def on_startup(**_: Any) -> None:
    """Make the repository importable as `nutgraf`, for this process and for mkdocstrings, which drops missing paths early.

    The folder holds links to the package's own files only: mkdocstrings searches it whole, and a link to the root would lead
    it into virtual environments.
    """
    package = ROOT / "build" / "docs" / "nutgraf"
    package.mkdir(parents=True, exist_ok=True)
    folders = [ROOT / name for name in ("adapters", "benchmarks", "compressors", "recipes")]
    for path in [*folders, *ROOT.glob("*.py")]:
        if not (link := package / path.name).is_symlink():
            link.symlink_to(f"../../../{path.name}")
    sys.path.insert(0, str(package.parent))


def on_config(config: Any) -> Any:
    """List the pages of methods in the menu."""
    methods = next(entry for entry in config.nav if "Methods" in entry)
    methods["Methods"] = ["methods/index.md", *(f"methods/{name}" for name, _ in method_pages())]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace markers, each on a line of its own, and equations. Wide tables of results get the whole page."""
    if page.file.src_uri.startswith("results/"):
        page.meta["hide"] = ["toc"]
    fill = {
        "include": lambda name: (ROOT / name).read_text().replace("](docs/", "]("),
        "settings": settings_table,
        "methods": methods_table,
        "shared settings": shared_tables,
        "results": lambda names: results_table(names.split(", ")),
        "commands": commands.markdown,
    }
    for kind, function in fill.items():
        markdown = re.sub(
            rf"^<!-- {kind}(?:: (.+?))? -->$",
            lambda m, function=function: function(m[1]) if m[1] else function(),
            markdown,
            flags=re.M,
        )
    return equations(markdown)


def equations(markdown: str) -> str:
    """Equations as MathML, which browsers render without scripts."""
    markdown = re.sub(
        r"```math\n(.*?)```", lambda m: f'<div class="math">{mathml(m[1], "block")}</div>', markdown, flags=re.S
    )
    return re.sub(r"\$`(.+?)`\$", lambda m: f"<span>{mathml(m[1], 'inline')}</span>", markdown)


def mathml(latex: str, display: str) -> str:
    """One equation on one line."""
    return convert(" ".join(latex.split()), display=display).replace("\n", "")


def method_pages() -> list[tuple[str, dict[str, str]]]:
    """File name and front matter of every method's page, by interface and name."""
    found = []
    for path in (ROOT / "docs" / "methods").glob("*.md"):
        if path.name != "index.md":
            found.append((path.name, yaml.safe_load(path.read_text().split("---\n")[1])))
    return sorted(found, key=lambda page: (page[1]["interface"], page[1]["method"].lower()))


def methods_table() -> str:
    """All methods, one row each."""
    lines = [
        "| method | interface | needs training | question-aware | tunes the reader | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, about in method_pages():
        source = re.sub(r"\d{4}\.\d{5}", r"[\g<0>](https://arxiv.org/abs/\g<0>)", about["source"])
        facts = [about[key] for key in ("training", "question", "tunes_reader")]
        lines.append(f"| [{about['method']}]({name}) | `{about['interface']}` | {' | '.join(facts)} | {source} |")
    return "\n".join(lines) + "\n"


def config_class(method: str) -> Any:
    """The config dataclass of a method."""
    from nutgraf.compressors.registry import compressor_class

    return compressor_class(method).config_class


def groups(cls: Any) -> list[Any]:
    """The shared groups of settings that a config has: its bases that are dataclasses of no method of their own."""
    from nutgraf.compressors.core.config import CompressorConfig

    bases = [base for base in cls.__mro__[1:] if "__dataclass_fields__" in vars(base)]
    return [base for base in bases if base is not CompressorConfig and not hasattr(base, "method") and declared(base)]


def declared(group: Any) -> list[Any]:
    """The settings that a group declares itself."""
    return [f for f in fields(group) if f.name in vars(group).get("__annotations__", {})]


def settings_table(method: str) -> str:
    """A method's own settings, and links to the shared groups."""
    cls = config_class(method)
    shared = groups(cls)
    names = {name for group in shared for name in group.__dataclass_fields__}
    own = [f for f in fields(cls) if f.name not in names and f.name != "published"]
    links = ", ".join(f"[{group_title(group)}](index.md#{anchor(group)})" for group in shared)
    table = rows_of(own) if own else "No settings of its own.\n"
    if options := getattr(cls, "options_class", None):
        table += f"\nOptions of `mode: published` alone:\n\n{rows_of(fields(options))}"
    changed = [f for f in fields(cls) if f.name in names and default(f) != default(inherited(shared, f.name))]
    if changed:
        links += "; " + ", ".join(f"`{f.name}` is {default(f)} here" for f in changed)
    return table + (f"\nShared settings: {links}.\n" if links else "")


def inherited(shared: list[Any], name: str) -> Any:
    """A setting as its group declares it."""
    return next(group.__dataclass_fields__[name] for group in shared if name in group.__dataclass_fields__)


def shared_tables() -> str:
    """Every group of shared settings under a heading of its own."""
    from nutgraf.compressors.registry import COMPRESSORS

    found: dict[str, Any] = {}
    for cls in COMPRESSORS.values():
        found |= {group.__name__: group for group in groups(cls.config_class)}
    return "\n".join(
        f"### {group_title(group)} {{#{anchor(group)}}}\n\n{rows_of(declared(group))}" for group in found.values()
    )


def group_title(group: Any) -> str:
    """ "QuerySettings" -> "Query"; the class name says what the group is for."""
    name = group.__name__.removesuffix("Settings").removesuffix("Config")
    return re.sub(r"(?<=[A-Za-z])(?=[A-Z][a-z])", " ", name)


def anchor(group: Any) -> str:
    """The heading's id."""
    return group_title(group).lower().replace(" ", "-") + "-settings"


def default(field: Any) -> str:
    """A setting's default as a reader would type it in YAML."""
    value = field.default
    if value is MISSING:
        value = field.default_factory() if field.default_factory is not MISSING else "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and not value.strip():
        return f'"{value}"'
    return str(list(value) if isinstance(value, tuple) else value)


def rows_of(settings: Any) -> str:
    """A table of settings."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(line for field in settings for line in rows(field))]) + "\n"


def rows(field: Any, path: str = "") -> list[str]:
    """The row of a setting, or those of the settings inside it."""
    nested = field.default_factory() if field.default_factory is not MISSING else None
    if is_dataclass(nested):
        return [row for inner in fields(nested) for row in rows(inner, f"{path}{field.name}.")]
    return [f"| `{path}{field.name}` | `{default(field)}` | {commands.cell(field.metadata.get('help', ''))} |"]


def results_table(names: list[str]) -> str:
    """Recovered share and speed of some lines by compression ratio, from the first file of pooled rows that has all of them."""
    files = [[json.loads(line) for line in path.read_text().splitlines()] for path in POOLED]
    rows = next((rows for rows in files if set(names) <= {row["method"] for row in rows}), None)
    if rows is None:
        raise ValueError(f"None of {', '.join(path.name for path in POOLED)} has rows of all of {', '.join(names)}.")
    found = [
        row for name in names for row in sorted((r for r in rows if r["method"] == name), key=lambda r: r["ratio"])
    ]
    timed = any("ttft_speedup" in row for row in found)
    lines = [
        "| | ratio | recovered share of full text's F1 |" + " time to first token |" * timed,
        "|---|---|---|" + "---|" * timed,
    ]
    for row in found:
        share, low, high = (f"{round(100 * row[key])}" for key in ("recovered_share", "ci_low", "ci_high"))
        speed = f" {row['ttft_speedup']:.2f}x as fast as full text |" if "ttft_speedup" in row else " |" * timed
        lines.append(f"| `{row['method']}` | {row['ratio']:.3g}x | {share} % ({low} to {high}) |{speed}")
    from nutgraf.benchmarks.names import dataset_title

    sets = " and ".join(map(dataset_title, rows[0]["datasets"]))
    return "\n".join([*lines, "", f"{rows[0]['n']} questions on {sets}, one passage each, pretrained reader."]) + "\n"
