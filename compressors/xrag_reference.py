"""xRAG as its authors' code reads and embeds: the chat prompt around the slots, the retriever's last hidden state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

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


class LastTokenModel(nn.Module):
    """A transformer as an embedder: its last hidden state, after the final norm, at each text's last token.

    It offers what `Embedder` asks of a sentence-transformers model, and neither normalises nor adds a prompt.
    """

    def __init__(self, body: Any, tokenizer: Any) -> None:
        super().__init__()
        self.body = body
        self.tokenizer = tokenizer
        self.max_seq_length = getattr(body.config, "max_position_embeddings", None) or tokenizer.model_max_length

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self.body])

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return int(self.body.config.hidden_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 32, **_: Any) -> Tensor:
        """Vectors ``[texts, dim]``; the tokenizer's own special tokens are part of each text."""
        rows = []
        device = next(self.body.parameters()).device
        for start in range(0, len(texts), batch_size):
            ids = [self.tokenizer(text)["input_ids"] for text in texts[start : start + batch_size]]
            longest = max(map(len, ids))
            padded = torch.zeros(len(ids), longest, dtype=torch.long)
            mask = torch.zeros(len(ids), longest, dtype=torch.long)
            for row, found in enumerate(ids):
                padded[row, : len(found)] = torch.tensor(found)
                mask[row, : len(found)] = 1
            hidden = self.body(input_ids=padded.to(device), attention_mask=mask.to(device)).last_hidden_state
            rows.append(hidden[torch.arange(len(ids)), mask.sum(-1) - 1])
        return torch.cat(rows)


def load_last_token_embedder(name: Any, device: Any = None) -> Embedder:
    """The embedder of xRAG's code: the last hidden state, after the final norm, at the last token; not normalised.

    Args:
        name: a Hugging Face model's id or folder.
        device: where it runs; default: the CPU.

    Raises:
        ValueError: if nothing of that name can be loaded.
    """
    if isinstance(name, Embedder):
        return name
    try:
        body = AutoModel.from_pretrained(str(name), dtype="auto").to(device or "cpu")
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The embedder {name!r} cannot be loaded: {error}. Give a Hugging Face id or folder."
        ) from error
    return Embedder(LastTokenModel(body, tokenizer), str(name))  # type: ignore[arg-type]
