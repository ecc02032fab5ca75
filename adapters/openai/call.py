"""One call of a served reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...compressors import CompressedPassage
from ...compressors.reader.generation import cut_at_stop, held_back
from ...compressors.reader.plan import Prompt, PromptPlan
from .payload import Settings

Texts = Sequence[str]


@dataclass(frozen=True)
class Call:
    """A prompt with its options.

    ``texts`` are the original texts of the prompt's compressed passages, in order, if known.
    """

    prompt: Prompt
    chat: bool
    template: Mapping[str, Any]
    settings: Settings
    texts: Texts | None

    @property
    def passages(self) -> list[CompressedPassage]:
        """The prompt's passages of embeds or kv; none for a planned prompt."""
        return [passage for passage in _passages(self.prompt) if passage.interface != "text"]

    @property
    def has_slots(self) -> bool:
        """Whether the prompt has slots besides text."""
        return bool(self.passages) or (isinstance(self.prompt, PromptPlan) and bool(self.prompt.soft))

    def cut(self, text: str) -> str:
        """End an answer at the stop strings that the server was not given."""
        return cut_at_stop(text, self.settings.late_stop)[0]

    def cut_stream(self, pieces: Iterator[str]) -> Iterator[str]:
        """`cut` for a stream, which ends at such a string. Text that may begin one is held back."""
        stop, text, given = self.settings.late_stop, "", 0
        for piece in pieces:
            text, stopped = cut_at_stop(text + piece, stop)
            final = len(text) if stopped else len(text) - held_back(text, stop)
            yield text[given:final]
            given = max(given, final)
            if stopped:
                return
        yield text[given:]

    def as_text(self) -> Call:
        """Replace the compressed passages by their original texts.

        Raises:
            ValueError: if the numbers of texts and compressed passages differ.
        """
        left = [self.texts] if isinstance(self.texts, str) else list(self.texts or ())
        held = self.passages
        if len(left) != len(held):
            raise ValueError(
                f"texts must have one text per compressed passage: got {len(left)} for {len(held)} passages."
            )

        def swap(atom: Any) -> Any:
            if isinstance(atom, CompressedPassage) and atom.interface != "text":
                return left.pop(0)
            if isinstance(atom, dict):
                return {**atom, "content": swap(atom.get("content"))}
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
