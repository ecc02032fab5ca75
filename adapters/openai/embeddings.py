"""A reader's tokenizer and token embeddings, for clients of a serving engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from ...compressors import CompressedPassage, Reader, ReaderMismatchError
from ...compressors.reader.plan import Layout, Prompt, PromptPlan, plan_prompts
from ...compressors.reader.tokenization import PromptTokenizer

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class EmbeddingTable:
    """Turns prompts into the embeddings that a serving engine takes.

    ``embedding`` is the reader's module, whose output has the scale of ``inputs_embeds``. Passages for another reader than
    ``fingerprint`` are refused.
    """

    def __init__(
        self,
        tokenizer: Any,
        embedding: nn.Module,
        fingerprint: str,
        *,
        name: str = "the reader",
        max_positions: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prompts = PromptTokenizer(tokenizer)
        self.embedding: Any = embedding
        self.fingerprint = fingerprint
        self.name = name
        self.max_positions = max_positions

    @classmethod
    def of(cls, reader: Reader) -> EmbeddingTable:
        """Make the table of a local reader without copying weights."""
        return cls(
            reader.tokenizer,
            reader.model.get_input_embeddings(),
            reader.fingerprint,
            name=reader.name,
            max_positions=reader.max_positions,
        )

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, *, fingerprint: str, tokenizer: Any = None) -> EmbeddingTable:
        """Read only the tokenizer and the embedding weights of a safetensors checkpoint.

        Args:
            checkpoint: a local folder or a hub id; only the file with the embeddings is downloaded.
            fingerprint: the reader's fingerprint, which depends on all weights: ``reader.fingerprint`` where passages are
                compressed, or the ``reader`` of a passage made for this checkpoint.
            tokenizer: default: the checkpoint's own.

        Raises:
            ValueError: if there are no safetensors files, or no embedding weights of the right shape in them.
        """
        name = str(checkpoint)
        config = AutoConfig.from_pretrained(name)
        with init_empty_weights(include_buffers=False):  # a scale is a buffer in some models
            model: Any = AutoModelForCausalLM.from_config(config)
        embedding = model.get_input_embeddings()
        key = next(key for key, p in model.named_parameters() if p is embedding.weight)
        weight = _read_weight(name, key, tuple(embedding.weight.shape))
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(
            AutoTokenizer.from_pretrained(name) if tokenizer is None else tokenizer,
            embedding,
            fingerprint,
            name=Path(name).name,
            max_positions=positions,
        )

    @property
    def width(self) -> int:
        """Width of a slot."""
        return self.embedding.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings."""
        return self.embedding.weight.dtype

    def plan(self, prompts: Sequence[Prompt], *, chat: bool = False, **template: Any) -> list[PromptPlan]:
        """Lay prompts out as `Reader.plan` does.

        Raises:
            ReaderMismatchError: for a passage made for another reader.
            ValueError: for an empty prompt, or a passage that cannot be sent as embeddings: keys and values, slots without
                positions, slots of the wrong width.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, got one string; write [prompt].")
        batch = []
        for prompt in prompts:
            atoms: list[Any] = [prompt] if isinstance(prompt, str | CompressedPassage) else list(prompt)
            if chat:
                messages = atoms if atoms and isinstance(atoms[0], dict) else [{"role": "user", "content": atoms}]
                atoms = self.prompts.render_chat(messages, **template)
            for atom in atoms:
                if isinstance(atom, CompressedPassage):
                    self.check(atom)
            batch.append(atoms)
        plans = plan_prompts(batch, self.prompts, [not chat] * len(batch))
        for i, plan in enumerate(plans):
            if not len(plan):
                raise ValueError(f"Prompt {i} is empty; a reader needs at least one token to read.")
        return plans

    def check(self, passage: CompressedPassage) -> None:
        """Raise ``ValueError`` if a serving engine with this reader cannot read a passage."""
        if passage.interface == "text":
            return
        if passage.reader != self.fingerprint:
            raise ReaderMismatchError(
                f"This compressed passage was made for the reader {passage.reader}, but the server's reader {self.name!r} "
                f"is {self.fingerprint}; compress the passage again with a compressor for this reader."
            )
        if passage.interface == "kv":
            raise ValueError(
                "A passage compressed to keys and values cannot be sent to a serving engine, which takes text and prompt "
                "embeddings; use a compressor to embeds or to text, or read it with a local Reader."
            )
        if passage.embeds is not None and passage.embeds.shape[1] != self.width:
            raise ValueError(f"Slots must be {self.width} wide for this reader, got {passage.embeds.shape[1]}.")
        passage.check()

    @torch.no_grad()
    def embed(self, plan: PromptPlan) -> Tensor:
        """Return ``[positions, width]``: the prompt's token embeddings and the passages' slots."""
        layout = Layout.of([plan], self.embedding.weight.device, self.dtype)
        return layout.splice(self.embedding)[0]


def _read_weight(checkpoint: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """Read one tensor of a checkpoint, with or without the model's prefix in its name."""
    index = cached_file(checkpoint, _INDEX, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        found = _match(key, files)
        path = None if found is None else cached_file(checkpoint, files[found])
    else:
        path = cached_file(checkpoint, _SINGLE, _raise_exceptions_for_missing_entries=False)
        if path is None:
            raise ValueError(f"{checkpoint} holds no safetensors file; save the model with save_pretrained first.")
        with safe_open(path, "pt") as file:
            found = _match(key, file.keys())
    if path is None or found is None:
        raise ValueError(f"{checkpoint} holds no embedding weights {key!r}; make an EmbeddingTable.of(reader) instead.")
    with safe_open(path, "pt") as file:
        weight = file.get_tensor(found)
    if tuple(weight.shape) != shape:
        raise ValueError(f"The embedding weights of {checkpoint} are {tuple(weight.shape)}, its config says {shape}.")
    return weight


def _match(key: str, names: Any) -> str | None:
    names = list(names)
    if key in names:
        return key
    same = [name for name in names if key.endswith("." + name) or name.endswith("." + key)]
    return same[0] if len(same) == 1 else None
