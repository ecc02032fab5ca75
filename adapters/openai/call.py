"""One call of a served reader: a prompt, how it is answered, and the texts that may stand in for its passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...compressors import CompressedPassage
from ...compressors.reader.plan import Prompt, PromptPlan
from .payload import Settings

Texts = Sequence[str]


@dataclass(frozen=True)
class Call:
    """What is asked of a server.

    Attributes:
        prompt: a string, a list of strings and compressed passages, a list of messages, or a planned prompt.
        chat: whether the chat template is applied.
        template: options of the chat template.
        settings: length and sampling of the answer.
        texts: the original texts of the prompt's compressed passages, in order, where they are known.
    """

    prompt: Prompt
    chat: bool
    template: Mapping[str, Any]
    settings: Settings
    texts: Texts | None

    @property
    def passages(self) -> list[CompressedPassage]:
        """The compressed passages of the prompt that are not text themselves; a plan no longer tells them apart."""
        return [passage for passage in _passages(self.prompt) if passage.interface != "text"]

    @property
    def has_slots(self) -> bool:
        """Whether there is more to send than text."""
        return bool(self.passages) or (isinstance(self.prompt, PromptPlan) and bool(self.prompt.soft))

    def as_text(self) -> Call:
        """The call with its compressed passages replaced by their original texts.

        Raises:
            ValueError: if there are not as many texts as compressed passages.
        """
        left = list(self.texts or ())
        held = self.passages
        if len(left) != len(held):
            raise ValueError(
                f"texts must hold one text a compressed passage: got {len(left)} for {len(held)} passages."
            )

        def swap(atom: Any) -> Any:
            if isinstance(atom, CompressedPassage) and atom.interface != "text":
                return left.pop(0)
            if isinstance(atom, dict):
                return {**atom, "content": swap(atom["content"])}
            return [swap(item) for item in atom] if isinstance(atom, list | tuple) else atom

        return replace(self, prompt=swap(self.prompt))


def _passages(prompt: Prompt) -> list[CompressedPassage]:
    if isinstance(prompt, CompressedPassage):
        return [prompt]
    if isinstance(prompt, str | PromptPlan):
        return []
    found = []
    for atom in prompt:
        inner = atom.get("content") if isinstance(atom, dict) else atom
        for item in inner if isinstance(inner, list | tuple) else [inner]:
            if isinstance(item, CompressedPassage):
                found.append(item)
    return found
