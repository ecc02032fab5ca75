"""Gist tokens, AutoCompressor and 500xCompressor as their authors' code reads: slots first, then the rest of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .tokenization import TokenIds

if TYPE_CHECKING:
    from .passage import CompressedPassage
    from .reader import Reader


def slots_first(
    reader: Reader, passages: Sequence[CompressedPassage], rest: str | Sequence[int], *, bos: bool = False
) -> list[Any]:
    """``[slots][BOS?][rest]``: the slots at the very front, with no BOS before them.

    Args:
        rest: text that is tokenised on its own, without special tokens, or its ids.
        bos: put BOS between slots and text.
    """
    ids = reader.prompts.encode(rest, opens=True) if isinstance(rest, str) else list(rest)
    return [TokenIds(()), *passages, TokenIds((*(reader.bos_ids if bos else ()), *ids))]


def gist_source(instruction: str) -> str:
    """What gist models compress: the instruction as it stands in front of the gist tokens."""
    return f"Instruction: {instruction}\n"


def gist_prompt(passage: CompressedPassage, given: str = "") -> list[Any]:
    """What follows the gist tokens of a `gist_source`: the input, if there is one, and the call for an output."""
    return [TokenIds(()), passage, f"\nInput: {given}\nOutput:" if given else "\nOutput:"]


def fivehundred_prompt(reader: Reader, passage: CompressedPassage, question: str | None = None) -> list[Any]:
    """500xCompressor: BOS alone asks for the passage again; a question is asked as ``Question: ... Answer: ``."""
    if question is None:
        return slots_first(reader, [passage], "", bos=True)
    return slots_first(reader, [passage], f"Question: {question} Answer: ")
