"""xRAG as its authors' code reads and embeds: the chat prompts around the slots, the retriever's last hidden state."""

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

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(next(self.body.parameters()).device)

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return int(self.body.config.hidden_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 32, **_: Any) -> Tensor:
        """Vectors ``[texts, dim]``; the tokenizer's own special tokens are part of each text."""
        return self.read([self.tokenizer(text)["input_ids"] for text in texts], batch_size)

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]], batch_size: int = 32) -> Tensor:
        """`encode` for texts given as token ids, special tokens among them."""
        rows = []
        device = self.device
        for start in range(0, len(texts), batch_size):
            ids = texts[start : start + batch_size]
            longest = max(map(len, ids))
            padded = torch.zeros(len(ids), longest, dtype=torch.long)
            mask = torch.zeros(len(ids), longest, dtype=torch.long)
            for row, found in enumerate(ids):
                padded[row, : len(found)] = torch.tensor(list(found))
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
