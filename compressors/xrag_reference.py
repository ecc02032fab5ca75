"""xRAG as its authors' code reads and embeds: the chat prompt around the slots, the retriever's last hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .embedders import Embedder
from .passage import CompressedPassage
from .tokenization import TokenIds

if TYPE_CHECKING:
    from .reader import Reader

TOKEN = "<xRAG>"
TEMPLATE = (
    "[INST] Refer to the background document and answer the questions:\n\nBackground: {background}\n\n"
    "Question: {question} [/INST] The answer is:"
)


def xrag_prompt(
    reader: Reader, passages: Sequence[CompressedPassage], question: str, template: str = TEMPLATE
) -> list[Any]:
    """The prompt that released xRAG models are asked with, as `Reader` takes it.

    The text is tokenised as one, with ``<xRAG>`` in each slot's place, where the tokenizer knows that token; on another
    reader the pieces around the slots are tokenised apart.

    Args:
        passages: the background; its slots follow one another, a space between them.
        question: the question.
        template: text with ``{background}`` and ``{question}``.

    Raises:
        ValueError: if the question or the template forges a slot's place.
    """
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


def load_last_token_embedder(name: Any, device: Any = None) -> Embedder:
    """The embedder of xRAG's code: the last hidden state, after the final norm, at the last token; not normalised.

    Args:
        name: a Hugging Face model's id or folder.
        device: where it runs; ``None`` leaves it to sentence-transformers.

    Raises:
        ImportError: if sentence-transformers is not installed.
        ValueError: if nothing of that name can be loaded.
    """
    if isinstance(name, Embedder):
        return name
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer
    except ImportError as error:
        raise ImportError(
            "xRAG embeds passages with sentence-transformers, which is not installed; run `pip install nutgraf[embedders]`."
        ) from error
    try:
        body = Transformer(str(name))
        body.tokenizer.padding_side = "right"
        pooling = Pooling(body.get_embedding_dimension(), pooling_mode="lasttoken")
        model = SentenceTransformer(modules=[body, pooling], device=None if device is None else str(device))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The embedder {name!r} cannot be loaded: {error}. Give a Hugging Face id or folder."
        ) from error
    return Embedder(model, str(name))
