"""YAML for recipes: `1e-3` is a number, and a repeated key is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe YAML with JSON's floats (YAML 1.1 reads `1e-3` as text) and no repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                problem = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """Parses a YAML mapping; `where` names it in errors."""
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        held = type(raw).__name__
        raise ValueError(f"{where!r} must hold keys and values (name, kind, stages, ...); it holds one {held}.")
    return raw


def parse_value(text: str) -> Any:
    """Parses the value of a command-line override: `200`, `1e-3`, `true`, `[4, 8]`, `{ae: 0.5}`, or plain text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
