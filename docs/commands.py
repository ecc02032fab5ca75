"""The command line as data and as Markdown, from the commands' own help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import click
import typer


def walk(command: Any = None, path: str = "nutgraf") -> Iterator[tuple[str, Any]]:
    """Every command with its path, groups included, as in ``("nutgraf bench quality", command)``."""
    if command is None:
        from nutgraf.cli import app

        command = typer.main.get_command(app)
    command = forwarded(command)
    yield path, command
    for name, nested in getattr(command, "commands", {}).items():
        yield from walk(nested, f"{path} {name}")


def forwarded(command: Any) -> Any:
    """The command behind one that only passes its arguments on (its module is imported then)."""
    if not command.context_settings.get("ignore_unknown_options"):
        return command
    caught: list[typer.Typer] = []
    with mock.patch.object(typer.Typer, "__call__", lambda self, **_: caught.append(self)):
        command.invoke(command.make_context(command.name, []))
    found = typer.main.get_command(caught[0])
    found.help = command.help or found.help
    return found


def markdown() -> str:
    """A section per command: help, usage, options."""
    return "\n".join(section(path, command) for path, command in walk() if path != "nutgraf")


def section(path: str, command: Any) -> str:
    """One command."""
    lines = [f"{'#' * (path.count(' ') + 1)} {path}", "", cell((command.help or "").split("\n\n")[0]), ""]
    if hasattr(command, "commands"):
        return "\n".join(lines)
    arguments = [usage(p) for p in command.params if isinstance(p, click.Argument) or p.param_type_name == "argument"]
    lines += ["```text", " ".join([path, *arguments, "[OPTIONS]"]), "```", ""]
    shown = [p for p in command.params if p.name != "help" and not p.name.endswith("_completion")]
    if shown:
        lines += ["| option | default | meaning |", "|---|---|---|"]
        lines += [f"| {flags(p)} | {default(p)} | {cell(getattr(p, 'help', '') or '')} |" for p in shown]
    return "\n".join([*lines, ""])


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def usage(argument: Any) -> str:
    """An argument in a usage line."""
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def flags(parameter: Any) -> str:
    """The names of an option or argument."""
    names = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(f"`{name if name.startswith('-') else name.upper()}`" for name in names)


def default(parameter: Any) -> str:
    """An option's default, if it has one to show."""
    if parameter.required:
        return "required"
    value = parameter.default
    hidden = callable(value) or type(value).__name__ == "Sentinel" or value in (None, (), [], "", False)
    return "" if hidden else f"`{value}`"
