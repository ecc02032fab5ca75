"""ICAE as its authors' code reads: the prompts of versions 1 and 2 around the slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .icae import ICAECompressor
from .passage import CompressedPassage
from .tokenization import TokenIds

# Mistral's ids of "<s> [INST]" and "[/INST]", which the authors' code writes out.
OPEN = (1, 733, 16289, 28793)
CLOSE = (733, 28748, 16289, 28793)


def icae_prompt(
    compressor: ICAECompressor,
    passages: Sequence[CompressedPassage],
    task: str = "ft",
    question: str | Sequence[int] = "",
    *,
    version: int = 2,
    lm_token: bool = False,
    before: Sequence[int] = OPEN,
    after: Sequence[int] = CLOSE,
) -> list[Any]:
    """The prompt of the authors' code, as `Reader` takes it.

    ===========  ==========================================================================
    task         prompt
    ===========  ==========================================================================
    ``"ae"``     ``[slots][AE]``; the target is the passage, BOS included, and EOS
    ``"lm"``     ``[slots]``, or with ``lm_token`` ``[slots][LM]``; the target is the continuation
    ``"ft"``     version 2: ``[before][slots][FT][question][after]``;
                 version 1: ``[slots][FT][question][FT]``
    ===========  ==========================================================================

    Args:
        compressor: an ICAE with special tokens.
        passages: the passages, whose slots follow one another.
        question: the instruction or question, or its token ids; text is tokenised on its own, without special tokens.
        version: of the authors' code. (Version 1 ends an answer at id 1, which is BOS, or any id from 32000 on; version 2 at
            EOS. For version 1: ``reader.generate(prompts, eos_token_id=[1])``.)
        lm_token: as ``add_special_token_for_lm`` of the authors' code.
        before, after: ids around the instruction (version 2).

    Raises:
        ValueError: for another task or version, or a compressor without special tokens.
    """
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version!r}.")
    marker = compressor.task_marker(task)
    if marker is None:
        raise ValueError("This ICAE has no [AE], [LM] and [FT] embeddings; set special_tokens=True.")
    bare = TokenIds(())  # no BOS in front of the slots
    if task == "ae":
        return [bare, *passages, marker]
    if task == "lm":
        return [bare, *passages, marker] if lm_token else [bare, *passages]
    spelled = compressor.reader.prompts.encode(question, opens=True) if isinstance(question, str) else question
    asked = TokenIds(tuple(spelled))
    if version == 1:
        return [bare, *passages, marker, asked, marker]
    return [TokenIds(tuple(before)), *passages, marker, asked, TokenIds(tuple(after))]
