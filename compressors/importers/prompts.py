"""xRAG as its authors' code reads and embeds: the chat prompts around the slots, the retriever's last hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..core.passage import CompressedPassage
from ..encoders.embedder import Embedder
from ..reader.tokenization import TokenIds
from .icae import PublishedICAE
from .last_token import LastTokenModel

if TYPE_CHECKING:
    from ..reader.reader import Reader

TOKEN = "<xRAG>"
TEMPLATE = (
    "[INST] Refer to the background document and answer the questions:\n\nBackground: {background}\n\n"
    "Question: {question} [/INST] The answer is:"
)
CLAIM_TEMPLATE = (
    '[INST] Refer to the background document and verify the following claims with "True" or "False":\n\n'
    "Background: {background}\n\nClaim: {question} [/INST] The answer is:"
)
INSTRUCTION_TEMPLATE = "[INST] Refer to the background document: {background}\n\n{question} [/INST]"
SHORTEST_SHARD = 20  # a last shard of no more tokens is dropped by the authors' code


def xrag_prompt(
    reader: Reader, passages: Sequence[CompressedPassage], question: str, template: str = TEMPLATE
) -> list[Any]:
    """The prompt that released xRAG models are asked with, as `Reader` takes it.

    The text is tokenised as one, with ``<xRAG>`` in each slot's place, where the tokenizer knows that token; on another
    reader the pieces around the slots are tokenised apart.

    Args:
        passages: the background; its slots follow one another, a space between them.
        question: the question, its question mark included (the authors' evaluation puts one behind every question of its
            data, which have none); a claim for `CLAIM_TEMPLATE`; a stripped instruction for `INSTRUCTION_TEMPLATE`.
        template: text with one ``{background}`` and, behind it, ``{question}``: `TEMPLATE` and `CLAIM_TEMPLATE` are those of
            the authors' evaluation, `INSTRUCTION_TEMPLATE` that of their instruction tuning, which no space separates from
            the answer.

    Raises:
        ValueError: if the question or the template forges a slot's place, the template lacks a place, or a passage holds no
            embeddings.
    """
    if template.count("{background}") != 1 or "{question}" not in template.partition("{background}")[2]:
        raise ValueError(
            f"template must hold {{background}} once and {{question}} behind it, got {template!r:.200}; see TEMPLATE."
        )
    if other := [p.interface for p in passages if p.interface != "embeds"]:
        raise ValueError(f"xRAG's passages are 'embeds', got {other[0]!r}; compress with an xRAG compressor.")
    rows = [replace(p, embeds=row[None]) for p in passages for row in p.embeds]  # type: ignore[union-attr]
    head, tail = template.split("{background}")
    tail = tail.replace("{question}", question)
    marker = reader.tokenizer.get_vocab().get(TOKEN)
    if marker is None:
        prompt: list[Any] = [head]
        for i, row in enumerate(rows):
            prompt += [" ", row] if i else [row]
        return [*prompt, tail]
    ids = reader.prompts.encode(head + " ".join([TOKEN] * len(rows)) + tail, opens=True)
    if ids.count(marker) != len(rows):
        raise ValueError(f"The question must not hold {TOKEN!r}, which marks the passages' places: {question!r:.200}")
    prompt, start = [], 0
    ids = [*reader.bos_ids, *ids]
    for row in rows:
        at = ids.index(marker, start)
        prompt += [TokenIds(tuple(ids[start:at])), row]
        start = at + 1
    return [*prompt, TokenIds(tuple(ids[start:]))]


def reference_vectors(
    embedder: Embedder, text: str, *, shards: bool = False, max_tokens: int = 180, total_tokens: int = 1024
) -> Tensor:
    """The vectors that the authors' code makes of a passage, for ``compress([text], vectors=[...])``.

    Their evaluation reads the first ``max_tokens`` of a passage, special tokens counted, and drops the rest. Their
    instruction tuning (``shards``) cuts the first ``total_tokens`` into shards of ``max_tokens``, drops a last one of up to 20,
    and reads the text of each as the evaluation reads a passage, so that a full shard loses as many tokens as there are
    special ones. `XRAGCompressor` itself drops nothing.

    Args:
        embedder: a `load_last_token_embedder`, as ``compressor.embedder`` of an imported xRAG is.
        text: the passage.

    Returns:
        ``[vectors, dim]`` float32 on the CPU: one, or one a shard.

    Raises:
        ValueError: if the embedder is another one, the passage has no token, or ``max_tokens`` leaves no room for any.
    """
    model: Any = embedder.model
    if not isinstance(model, LastTokenModel):
        raise ValueError(f"The embedder {embedder.name!r} is no last-token embedder; take load_last_token_embedder's.")
    if min(max_tokens, total_tokens) < 1:
        raise ValueError(f"max_tokens and total_tokens must be at least 1, got {max_tokens} and {total_tokens}.")
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("A passage without any token has no vector; leave it out.")
    pieces = [text]
    if shards:
        ids = ids[:total_tokens]
        parts = [ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens)]
        if len(parts) > 1 and len(parts[-1]) <= SHORTEST_SHARD:
            parts.pop()
        pieces = [model.tokenizer.decode(part) for part in parts]
    return model.read([_cut(model.tokenizer, piece, max_tokens) for piece in pieces]).to("cpu", torch.float32).clone()


def _cut(tokenizer: Any, text: str, most: int) -> list[int]:
    """Ids with special tokens, at most so many: tokens are dropped from the text's end."""
    bare, full = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    room = most - (len(full) - len(bare))
    if room < 1:
        raise ValueError(f"max_tokens={most} leaves no room beside {len(full) - len(bare)} special tokens.")
    first = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return [*full[:first], *bare[:room], *full[first + len(bare) :]]


# Mistral's ids of "<s> [INST]" and "[/INST]", which the authors' code writes out.
OPEN = (1, 733, 16289, 28793)
CLOSE = (733, 28748, 16289, 28793)


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
        compressor: an imported ICAE.
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


if TYPE_CHECKING:
    from ..core.passage import CompressedPassage
    from ..reader.reader import Reader

SYSTEM = (
    "You are a helpful assistant. Your task is to extract relevant information from provided documents "
    "and to answer to questions as briefly as possible."
)
SEPARATOR = "<SEP>"


def pisco_prompt(
    reader: Reader,
    passages: Sequence[CompressedPassage],
    question: str,
    *,
    form: Literal["2025", "2026"] = "2026",
    system: str | None = SYSTEM,
    **template: Any,
) -> list[Any]:
    """The prompt of the authors' code, as `Reader` takes it (no ``chat=True``: the chat template is applied here).

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
        form: of the authors' code.
        system: the system message, or ``None``; a template that knows none gets it in front of the user's message.
        template: options of the chat template (``enable_thinking`` is off unless given).

    Raises:
        ValueError: for another form, or a tokenizer without chat template.
    """
    content: list[Any]
    if form == "2026":
        content = ["\n\nBackground:"]
        for i, passage in enumerate(passages):
            content += [f"Document {i}:", passage]
        content.append(f"\n Question: {question}")
    elif form == "2025":
        separator = reader.tokenizer.get_vocab().get(SEPARATOR)
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
    return [TokenIds(()), *atoms]  # the template writes BOS itself, where there is one


if TYPE_CHECKING:
    from ..core.passage import CompressedPassage
    from ..reader.reader import Reader


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
