"""Training task of an inversion decoder: the reader, with LoRA, learns to write the passage that was compressed.

The decoder is GEIA's (arXiv 2305.03010) with the reader in place of GPT-2: it is conditioned on what is stored and trained by
teacher forcing. Slots, keys and values are read as the reader reads them; a retrieval vector goes through a linear map first.
`nutgraf audit` measures what the decoder reads. It trains on public text only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ...compressors import CompressedPassage, Compressor, Reader, ReaderMismatchError, load_compressor
from ...compressors.core.checkpoint import load_weights, read_config, write_checkpoint
from ...compressors.core.errors import CheckpointError
from ...compressors.core.hidden import hide
from ...compressors.encoders.embedder import Embedder, load_embedder
from ...compressors.encoders.lora_twin import LoRATwin
from ...compressors.encoders.tuned_reader import AdaptedReader
from ...compressors.objectives.language_modeling import TokenLoss
from ..data.records import Material, load_articles, load_records
from ..data.templates import autoencoding_prompt
from ..training.schema import Recipe, Stage, validate
from .items import CompressorItems

METHOD = "inversion"
Stolen = CompressedPassage | Tensor  # a stored passage, or its retrieval vectors ``[shards, width]``


class InversionSettings(BaseModel):
    """The `model` section of an inversion recipe: what is attacked, and the decoder.

    Attributes:
        compressor, ratio: a compressor (shipped, a folder, a hub id, or a method without training) and its ratio.
        embedder: instead, the embedder of retrieval vectors.
        slots: soft tokens that a retrieval vector is mapped to.
        r, alpha, target_modules: the decoder's LoRA.
    """

    model_config = ConfigDict(extra="forbid")

    compressor: str | None = None
    ratio: float | None = Field(default=None, ge=1)
    embedder: str | None = None
    slots: int = Field(default=8, gt=0)
    r: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0)
    target_modules: list[str] | None = None

    @model_validator(mode="after")
    def _one_victim(self) -> InversionSettings:
        if (self.compressor is None) == (self.embedder is None):
            raise ValueError("an inversion recipe attacks one of model.compressor and model.embedder; give one of them")
        return self


class InversionData(BaseModel):
    """The `data` section: what the decoder learns to write.

    Attributes:
        dir: folder of the data files.
        texts: text files as in a compressor recipe; passages are their paragraphs.
        questions: instead, question files; the decoder learns to write questions, as that of qsT5 (arXiv 2210.12084).
        documents: most documents, or questions, of a file.
        max_chars: of a passage.
    """

    model_config = ConfigDict(extra="forbid")

    dir: str | None = None
    texts: list[str] = Field(default_factory=list)
    questions: list[str] = Field(default_factory=list)
    documents: int | None = Field(default=None, gt=0)
    max_chars: int = Field(default=600, ge=80)

    @model_validator(mode="after")
    def _one_kind(self) -> InversionData:
        if bool(self.texts) == bool(self.questions):
            raise ValueError("an inversion recipe learns from one of data.texts and data.questions; give one of them")
        return self


class InversionDecoder(nn.Module):
    """The reader with LoRA, conditioned on what is stored. Its parameters are the LoRA and the map of vectors.

    Args:
        reader: the reader that the passages were compressed for.
        settings: see `InversionSettings`.
        width: of the retrieval vectors; None where compressed passages are read.
        victim: fingerprint of the compressor or embedder that is attacked.
    """

    def __init__(self, reader: Reader, settings: InversionSettings, width: int | None, victim: str) -> None:
        super().__init__()
        self.settings, self.width, self.victim = settings, width, victim
        lora: Any = {"r": settings.r, "alpha": settings.alpha, "target_modules": settings.target_modules}
        self.twin = LoRATwin(reader.model, **lora)
        hide(self, "reader", AdaptedReader(reader, self.twin))
        if width is not None:
            self.project = nn.Linear(width, settings.slots * reader.width)
            nn.init.normal_(self.project.weight, std=width**-0.5)
            nn.init.zeros_(self.project.bias)
            self.scale = reader.embedding_norm * reader.width**-0.5
            self.project.to(reader.device)

    reader: AdaptedReader

    def read(self, stolen: Sequence[Stolen]) -> list[CompressedPassage]:
        """The stored passages as the decoder reads them, differentiable in its parameters.

        Raises:
            ValueError: for a vector where passages are read, or of another width, and the other way round.
        """
        mark = self.reader.fingerprint
        out = []
        for one in stolen:
            if isinstance(one, CompressedPassage) == (self.width is not None):
                kind = "a compressed passage" if isinstance(one, CompressedPassage) else "a retrieval vector"
                raise ValueError(
                    f"This decoder reads {'vectors' if self.width else 'compressed passages'}, got {kind}."
                )
            if isinstance(one, CompressedPassage):
                out.append(replace(one, reader=mark))
                continue
            if one.dim() != 2 or one.shape[1] != self.width:
                raise ValueError(f"Retrieval vectors must be [shards, {self.width}], got {list(one.shape)}.")
            unit = nn.functional.normalize(one.to(self.project.weight), dim=-1)
            slots = self.project(unit).view(-1, self.reader.width) * (self.scale * cast(int, self.width) ** 0.5)
            out.append(CompressedPassage("embeds", len(slots), METHOD, mark, embeds=slots.to(self.reader.dtype)))
        return out

    def forward(
        self, stolen: Sequence[Stolen], targets: Sequence[Sequence[int]], num_items_in_batch: int | None = None
    ) -> dict[str, Any]:
        """Mean negative log-likelihood of the passages' tokens, given what is stored of them."""
        found = self.reader.target_hidden([autoencoding_prompt(one) for one in self.read(stolen)], targets)
        count = len(found.ids)
        total = TokenLoss(self.reader.head)(found.hidden, found.ids, num_items=1)
        return {"loss": total / (num_items_in_batch or count), "loss/nll": total.detach() / count, "tokens": count}

    accepts_loss_kwargs = True

    @torch.no_grad()
    def write(
        self, stolen: Sequence[Stolen], longest: Sequence[int], batch_size: int = 16, **sampling: Any
    ) -> list[str]:
        """The decoder's reconstructions, greedy unless `sampling` (options of `Reader.generate`) says otherwise.

        `longest`: most tokens of each.
        """
        training = self.training
        self.eval()
        try:
            out = [""] * len(stolen)
            full = [i for i, one in enumerate(stolen) if not isinstance(one, CompressedPassage) or one.slots]
            order = sorted(full, key=lambda i: longest[i])
            for start in range(0, len(order), batch_size):
                which = order[start : start + batch_size]
                prompts = [autoencoding_prompt(one) for one in self.read([stolen[i] for i in which])]
                told = self.reader.generate(prompts, max(longest[i] for i in which), **sampling)
                for i, text in zip(which, told):
                    out[i] = text.strip()
            return out
        finally:
            self.train(training)

    def state(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``."""
        about = {
            "method": METHOD,
            "reader": self.reader.base.fingerprint,
            "victim": self.victim,
            "width": self.width,
            "config": self.settings.model_dump(),
        }
        write_checkpoint(folder, about, self.state())

    @classmethod
    def from_pretrained(cls, folder: str | Path, reader: Reader) -> InversionDecoder:
        """Loads a folder written by `save_pretrained`.

        Raises:
            CheckpointError: if the folder holds no decoder, or its weights do not fit.
            ReaderMismatchError: if it was trained for another reader.
        """
        about = read_config(folder)
        if about["method"] != METHOD or "victim" not in about:
            raise CheckpointError(
                f"{folder} holds a compressor of the method {about['method']!r}, no inversion decoder."
            )
        if about["reader"] != reader.fingerprint:
            raise ReaderMismatchError(
                f"{folder} was trained for the reader {about['reader']}, but {reader.name!r} is {reader.fingerprint}; train "
                "the attacker again, or name its reader with --reader."
            )
        made = cls(reader, InversionSettings(**about["config"]), about["width"], about["victim"])
        load_weights(folder, dict(made.named_parameters()), "inversion decoder")
        return made.eval()


@dataclass(frozen=True)
class Passage:
    """A training item: a public passage or question."""

    text: str

    @property
    def size(self) -> int:
        """Characters; batches are sorted by it."""
        return len(self.text)


class InversionTask:
    """Task of a recipe of kind `inversion`, for `run_recipe`.

    Args:
        recipe: of kind `inversion`.
        reader: the reader; default: the recipe's own.
        victim: the compressor or embedder to attack; default: the one that the recipe names.

    Raises:
        ValueError: if the recipe's reader, data, or victim cannot be used.
    """

    def __init__(
        self, recipe: Recipe, reader: Reader | None = None, victim: Compressor | Embedder | None = None
    ) -> None:
        if recipe.kind != METHOD:
            raise ValueError(
                f"The recipe {recipe.name!r} trains a {recipe.kind}; one of kind 'inversion' is needed here."
            )
        self.recipe = recipe
        self.data = validate(InversionData, recipe.data, recipe.name, "data")
        settings = validate(InversionSettings, recipe.model or {}, recipe.name, "model")
        self.reader = reader or Reader.from_pretrained(str(recipe.reader))
        self.victim = victim or _load_victim(settings, self.reader)
        self.ratio = settings.ratio
        if isinstance(self.victim, Compressor) and (self.victim.interface == "text" or self.victim.query_aware):
            raise ValueError(
                f"{self.victim.config.method} makes text or needs a question; an inversion decoder attacks slots, keys and "
                "values that are stored without a question, and vectors."
            )
        torch.manual_seed(recipe.seed)
        width = self.victim.dim if isinstance(self.victim, Embedder) else None
        self.module = InversionDecoder(self.reader, settings, width, self.victim.fingerprint)
        self._material: Material | None = None

    @property
    def material(self) -> Material:
        """Public text, read at first use."""
        if self._material is None:
            articles = load_articles(self.data.texts, self.data.dir, self.data.documents)
            self._material = Material([], articles, self.data.max_chars)
        return self._material

    @cached_property
    def questions(self) -> list[str]:
        """Public questions, read at first use."""
        return [
            record.question
            for path in self.data.questions
            for record in islice(load_records([path], self.data.dir), self.data.documents)
        ]

    def steal(self, texts: Sequence[str]) -> list[Stolen]:
        """What is stored of texts."""
        if isinstance(self.victim, Embedder):
            return list(self.victim.embed_shards(texts, self.victim.max_tokens, [1] * len(texts)))
        with torch.no_grad():
            return list(self.victim.compress(list(texts), ratio=self.ratio))

    def dataset(self, stage: Stage) -> CompressorItems:
        """Passages of the public text, or questions."""

        def make(key: str) -> Any:
            draw = random.Random(key)
            return Passage(draw.choice(self.questions) if self.data.questions else self.material.paragraph(draw))

        return CompressorItems(make, self.recipe.seed, stage)

    def collator(self, stage: Stage) -> Callable[[list[Passage]], dict[str, Any]]:
        """Compresses the passages, and counts their tokens."""
        eos = [] if self.reader.eos_id is None else [self.reader.eos_id]

        def collate(items: list[Passage]) -> dict[str, Any]:
            texts = [item.text for item in items]
            targets = [[*ids, *eos] for ids in self.reader.tokenize_batch(texts)]
            return {"stolen": self.steal(texts), "targets": targets, "num_items": sum(map(len, targets))}

        return collate

    def begin_stage(self, stage: Stage) -> None:
        """Trains the parts in `trainable`: `all`, `twin` (the LoRA) or `project`."""
        wanted = [stage.trainable] if isinstance(stage.trainable, str) else stage.trainable
        parts = {name.split(".")[0] for name, _ in self.module.named_parameters()}
        if unknown := sorted(set(wanted) - {"all", *parts}):
            raise ValueError(
                f"Stage {stage.name!r}: nothing called {unknown[0]!r} to train; there are all, {', '.join(sorted(parts))}."
            )
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_("all" in wanted or name.split(".")[0] in wanted)

    def save(self, folder: Path) -> None:
        """Writes the decoder."""
        self.module.save_pretrained(folder)


def _load_victim(settings: InversionSettings, reader: Reader) -> Compressor | Embedder:
    if settings.embedder is not None:
        return load_embedder(settings.embedder)
    return load_compressor(str(settings.compressor), reader)
