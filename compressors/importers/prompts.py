"""Prompts of the authors' code, token for token, for imported compressors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from ..core.passage import CompressedPassage
from ..reader.reader import Reader
from ..reader.tokenization import TokenIds
from .icae import PublishedICAE

XRAG_TOKEN = "<xRAG>"
XRAG_TEMPLATE = (
    "[INST] Refer to the background document and answer the questions:\n\nBackground: {background}\n\n"
    "Question: {question} [/INST] The answer is:"
)
# Mistral's ids of "<s> [INST]" and "[/INST]", as ICAE's code has them.
OPEN = (1, 733, 16289, 28793)
CLOSE = (733, 28748, 16289, 28793)
PISCO_SYSTEM = (
    "You are a helpful assistant. Your task is to extract relevant information from provided documents "
    "and to answer to questions as briefly as possible."
)
PISCO_SEPARATOR = "<SEP>"
LCLM_MARKS = ("<|memory_start|>", "<|memory_end|>")


def xrag_prompt(
    reader: Reader, passages: Sequence[CompressedPassage], question: str, template: str = XRAG_TEMPLATE
) -> list[Any]:
    """xRAG's prompt, for `Reader`.

    If the tokenizer knows ``<xRAG>``, the text is tokenised as if that token stood in place of each slot.

    Args:
        reader: the compressor's reader.
        passages: the background.
        question: the question, with its question mark.
        template: text with ``{background}`` once and ``{question}`` after it.

    Raises:
        ValueError: if the question or template contains ``<xRAG>``, the template lacks a place, or a passage holds no
            embeddings.
    """
    if template.count("{background}") != 1 or "{question}" not in template.partition("{background}")[2]:
        raise ValueError(f"template must hold {{background}} once and {{question}} after it, got {template!r:.200}.")
    if other := [p.interface for p in passages if p.interface != "embeds"]:
        raise ValueError(f"xRAG's passages are 'embeds', got {other[0]!r}; compress with an xRAG compressor.")
    rows = [replace(p, embeds=row[None]) for p in passages for row in p.embeds]  # type: ignore[union-attr]
    head, tail = template.split("{background}")
    tail = tail.replace("{question}", question)
    if XRAG_TOKEN in head + tail:
        raise ValueError(
            f"Question and template must not hold {XRAG_TOKEN!r}, which marks the slots: {question!r:.200}"
        )
    gaps: list[Any] = [head, *[" "] * (len(rows) - 1), tail] if rows else [head + tail]
    if XRAG_TOKEN in reader.tokenizer.get_vocab():
        gaps = [TokenIds(tuple(ids)) for ids in reader.prompts.encode_between(gaps)]
        gaps[0] = TokenIds((*reader.bos_ids, *gaps[0].ids))
    return [atom for pair in zip(gaps, [*rows, ""]) for atom in pair]


def icae_prompt(
    compressor: PublishedICAE,
    passages: Sequence[CompressedPassage],
    task: str = "ft",
    question: str | Sequence[int] = "",
    *,
    version: int = 2,
    lm_token: bool = False,
    before: Sequence[int] = OPEN,
    after: Sequence[int] = CLOSE,
) -> list[Any]:
    """ICAE's prompt, for `Reader`.

    ===========  ==========================================================================
    task         prompt
    ===========  ==========================================================================
    ``"ae"``     ``[slots][AE]``; the target is the passage, including BOS, and EOS
    ``"lm"``     ``[slots]``, or with ``lm_token`` ``[slots][LM]``; the target is the continuation
    ``"ft"``     version 2: ``[before][slots][FT][question][after]``;
                 version 1: ``[slots][FT][question][FT]``
    ===========  ==========================================================================

    Args:
        compressor: an imported ICAE.
        passages: the passages.
        task: see above.
        question: the instruction or question (tokenised on its own, without special tokens), or its token ids.
        version: of the authors' code. Version 1 ends an answer at id 1: ``reader.generate(prompts, eos_token_id=[1])``.
        lm_token: as ``add_special_token_for_lm`` of the authors' code.
        before, after: ids around the instruction (version 2).

    Raises:
        ValueError: for another task or version, or a compressor without special tokens.
    """
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version!r}.")
    marker, bare = compressor.task_marker(task), TokenIds(())  # no BOS before the slots
    if task != "ft":
        return [bare, *passages, *([marker] if task == "ae" or lm_token else [])]
    spelled = compressor.reader.prompts.encode(question, opens=True) if isinstance(question, str) else question
    asked = TokenIds(tuple(spelled))
    if version == 1:
        return [bare, *passages, marker, asked, marker]
    return [TokenIds(tuple(before)), *passages, marker, asked, TokenIds(tuple(after))]


def pisco_prompt(
    reader: Reader,
    passages: Sequence[CompressedPassage],
    question: str,
    *,
    form: Literal["2025", "2026"] = "2026",
    system: str | None = PISCO_SYSTEM,
    **template: Any,
) -> list[Any]:
    """PISCO's and COCOM's prompt, for `Reader`. It applies the chat template itself: do not pass ``chat=True``.

    ==========  ==========================================================================================
    form        user message
    ==========  ==========================================================================================
    ``"2026"``  ``"\\n\\nBackground:Document 0:[slots]Document 1:[slots]...\\n Question: [question]"``
    ``"2025"``  ``"Background:\\n[slots]<SEP>[slots]<SEP>...\\n\\nQuestion:[question]"`` (PISCO v1 and COCOM)
    ==========  ==========================================================================================

    Args:
        reader: the compressor's reader.
        passages: the documents.
        question: the question.
        form: see above.
        system: the system message, or ``None``. If the template has no system role, it opens the user's message.
        template: options of the chat template (``enable_thinking`` is off by default).

    Raises:
        ValueError: for another form, or a tokenizer without chat template.
    """
    if form == "2026":
        content: list[Any] = ["\n\nBackground:"]
        for i, passage in enumerate(passages):
            content += [f"Document {i}:", passage]
        content.append(f"\n Question: {question}")
    elif form == "2025":
        separator = reader.tokenizer.get_vocab().get(PISCO_SEPARATOR)
        content = ["Background:\n"]
        for passage in passages:
            content += [passage] if separator is None else [passage, TokenIds((separator,))]
        content.append(f"\n\nQuestion:{question}")
    else:
        raise ValueError(f"form must be '2025' or '2026', got {form!r}.")
    options = {"enable_thinking": False, **template}
    try:
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [system]})
        atoms = reader.prompts.render_chat(messages, **options)
    except Exception as error:  # templates raise errors of their own
        if system is None or "role" not in str(error):
            raise
        atoms = reader.prompts.render_chat([{"role": "user", "content": [f"{system}\n", *content]}], **options)
    return [TokenIds(()), *atoms]  # the template writes BOS itself


def lclm_prompt(reader: Reader, passages: Sequence[CompressedPassage], question: str) -> list[Any]:
    """LCLM's prompt, for `Reader`: a user message of ``<|memory_start|>[slots]<|memory_end|>`` per passage and the question.

    It applies the chat template itself: do not pass ``chat=True``.

    Raises:
        ValueError: if the tokenizer has no chat template, or no such tokens.
    """
    names = reader.tokenizer.get_vocab()
    if missing := [mark for mark in LCLM_MARKS if mark not in names]:
        raise ValueError(
            f"The tokenizer of {reader.name!r} has no {missing[0]!r}; pass the reader of an imported LCLM."
        )
    start, end = (TokenIds((names[mark],)) for mark in LCLM_MARKS)
    content = [atom for passage in passages for atom in (start, passage, end)]
    return [TokenIds(()), *reader.prompts.render_chat([{"role": "user", "content": [*content, f" {question}"]}])]


def slots_first(
    reader: Reader, passages: Sequence[CompressedPassage], rest: str | Sequence[int], *, bos: bool = False
) -> list[Any]:
    """``[slots][BOS?][rest]``: AutoCompressor's prompt, with no BOS before the slots.

    Args:
        reader: the compressor's reader.
        passages: the passages.
        rest: text (tokenised on its own, without special tokens), or its ids.
        bos: put the tokenizer's BOS token between slots and text, even if it does not put it before texts itself.

    Raises:
        ValueError: if there is no BOS token.
    """
    ids = reader.prompts.encode(rest, opens=True) if isinstance(rest, str) else list(rest)
    start = reader.tokenizer.bos_token_id
    if bos and start is None:
        raise ValueError(
            f"The tokenizer of {reader.name!r} has no BOS token, which this prompt needs; set its bos_token."
        )
    return [TokenIds(()), *passages, TokenIds((*((start,) if bos else ()), *ids))]


def gist_source(instruction: str, *, stripped: bool = False) -> str:
    """The text that gist models compress for an instruction.

    Args:
        instruction: the instruction.
        stripped: without white space before ``<GIST>``, as the tokenizer of the released checkpoints read it.
    """
    return f"Instruction: {instruction}".rstrip() if stripped else f"Instruction: {instruction}\n"


def gist_prompt(
    passage: CompressedPassage, given: str = "", *, stripped: bool = False, reader: Reader | None = None
) -> list[Any]:
    """The prompt after a compressed `gist_source`: the input, if any, and the request for an output.

    Args:
        passage: the compressed `gist_source`.
        given: the input.
        stripped: as in `gist_source`; needs ``reader``, because the rest is then tokenised on its own.
        reader: the compressor's reader.

    Raises:
        ValueError: if ``stripped`` comes without a reader.
    """
    rest = f"\nInput: {given}\nOutput:" if given else "\nOutput:"
    if not stripped:
        return [TokenIds(()), passage, rest]
    if reader is None:
        raise ValueError("stripped=True tokenises the rest of the prompt on its own; pass reader=compressor.reader.")
    return slots_first(reader, [passage], rest.lstrip())


def fivehundred_prompt(reader: Reader, passage: CompressedPassage, question: str | None = None) -> list[Any]:
    """500xCompressor's prompt: ``Question: ... Answer: ``, or BOS alone to ask for the passage itself."""
    if question is None:
        return slots_first(reader, [passage], "", bos=True)
    return slots_first(reader, [passage], f"Question: {question} Answer: ")
