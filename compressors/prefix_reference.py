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


def gist_source(instruction: str, *, stripped: bool = False) -> str:
    """What gist models compress: the instruction as it stands in front of the gist tokens.

    Args:
        stripped: as the tokenizer of the released checkpoints read it, which dropped all white space around ``<GIST>``
            (the slow ``LlamaTokenizer`` of early 2023); default: with the line break, as later tokenizers read it.
    """
    text = f"Instruction: {instruction}"
    return text.rstrip() if stripped else f"{text}\n"


def gist_prompt(
    passage: CompressedPassage, given: str = "", *, stripped: bool = False, reader: Reader | None = None
) -> list[Any]:
    """What follows the gist tokens of a `gist_source`: the input, if there is one, and the call for an output.

    Args:
        passage: the compressed `gist_source`.
        given: the input.
        stripped: as in `gist_source`; what follows is then spelled as the start of a text. It needs the ``reader``.

    Raises:
        ValueError: if ``stripped`` comes without a reader.
    """
    rest = f"\nInput: {given}\nOutput:" if given else "\nOutput:"
    if not stripped:
        return [TokenIds(()), passage, rest]
    if reader is None:
        raise ValueError("stripped=True spells what follows the gist tokens on its own; give reader=compressor.reader.")
    return slots_first(reader, [passage], rest.lstrip())


def fivehundred_prompt(reader: Reader, passage: CompressedPassage, question: str | None = None) -> list[Any]:
    """500xCompressor: BOS alone asks for the passage again; a question is asked as ``Question: ... Answer: ``."""
    if question is None:
        return slots_first(reader, [passage], "", bos=True)
    return slots_first(reader, [passage], f"Question: {question} Answer: ")
