"""Griffe extension: docstrings with Sphinx's mathematics and literal blocks become Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension
from latex2mathml.converter import convert


class Markdown(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called for every object that griffe loads."""
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """``.. math::`` blocks and ``:math:`...` `` as MathML; ``Example::`` as ``Example:``."""
    text = re.sub(
        r"^\.\. math:: *\n?((?:.+\n?)(?:[ ]{2,}.+\n?)*)",
        lambda m: f'<div class="math">{mathml(m[1], "block")}</div>\n',
        text,
        flags=re.M,
    )
    text = re.sub(r":math:`(.+?)`", lambda m: f"<span>{mathml(m[1], 'inline')}</span>", text, flags=re.S)
    return re.sub(r"(?<=\S)::$", ":", text, flags=re.M)


def mathml(latex: str, display: str) -> str:
    """One equation on one line."""
    return convert(" ".join(latex.split()), display=display).replace("\n", "")
