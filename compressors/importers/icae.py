"""ICAE checkpoints: version 2 (LoRA and memory embeddings) and version 1 (base weights too)."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.config import check_counts, setting
from ..core.errors import CheckpointError
from ..core.passage import CompressedPassage
from ..reader.reader import Reader
from ..slots.memory_tokens import random_token_rows
from ..slots.segments import Segment
from ..soft.icae import ICAECompressor, ICAEConfig
from .layout import Source, holds_key, load_tensors, need, single_file
from .models import body_prefix, build_model, fill_lora, lora_shape, make_reader, take_lora
from .published import PublishedCompressor, PublishedSettings

TASKS = ("ae", "lm", "ft")
_ROOT = r"icae\.(?:base_model\.model\.)?"
_MEMORY = "memory_token_embed.weight"


@dataclass
class PublishedICAEConfig(PublishedSettings, ICAEConfig):
    """Settings of ICAE as its authors' code runs it."""

    special_tokens: bool = setting(False, "learned [AE], [LM] and [FT] embeddings", kw_only=True)
    bos_once: bool = setting(False, "BOS is the passage's first token, and is counted and cut with it", kw_only=True)
    truncate: int | None = setting(
        None, "read one segment of at most this many tokens and drop the rest with a warning (version 1)", kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, {"truncate": 1}, optional=("truncate",))
        if self.query_aware:
            raise ValueError("The released ICAE reads no question; set query_aware to false.")


class PublishedICAE(PublishedCompressor, ICAECompressor):
    """ICAE as its authors' code runs it.

    Attributes:
        special: ``[3, width]`` embeddings of [AE], [LM] and [FT] (``special_tokens=True`` only).
    """

    config_class: ClassVar[type[ICAEConfig]] = PublishedICAEConfig
    config: PublishedICAEConfig

    def __init__(self, config: PublishedICAEConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.special = nn.Parameter(random_token_rows(reader, len(TASKS))) if config.special_tokens else None

    @property
    def opening(self) -> list[int]:
        """BOS, unless it is part of the passage."""
        return [] if self.config.bos_once else super().opening

    def cut(
        self, n_tokens: int, ratio: float | None, question_tokens: int, source_tokens: int
    ) -> list[tuple[int, int]]:
        """One segment with ``truncate``."""
        if self.config.truncate is not None:
            return [(min(n_tokens, self.config.truncate), self.config.mem_size)]
        return super().cut(n_tokens, ratio, question_tokens, source_tokens)

    def segments_of(
        self, ids: list[int], question: list[int], source_tokens: int, ratio: float | None, number: int
    ) -> list[Segment]:
        """Segments of the passage with its own BOS."""
        if self.config.bos_once and self.config.bos and ids:
            ids = [*self.base_reader.bos_ids, *ids]
        most = self.config.truncate
        if most is not None and len(ids) > most:
            warnings.warn(
                f"A passage of {len(ids)} tokens was cut to its first {most}, as ICAE v1 does (truncate={most}); split longer "
                "passages, or import it with a larger max_tokens.",
                stacklevel=2,
            )
        return super().segments_of(ids, question, source_tokens, ratio, number)

    def task_marker(self, task: str) -> CompressedPassage:
        """The one-slot passage that tells the reader its task.

        Args:
            task: ``"ae"`` (repeat the passage), ``"lm"`` (continue it) or ``"ft"`` (follow the instruction after it).

        Raises:
            ValueError: for another task, or without ``special_tokens``.
        """
        if task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, got {task!r}.")
        if self.special is None:
            raise ValueError("This ICAE has no [AE], [LM] and [FT] embeddings.")
        row = TASKS.index(task)
        embeds = self.special[row : row + 1].to(self.reader.dtype)
        return CompressedPassage("embeds", 0, self.origin, self.reader.fingerprint, embeds=embeds, info={"task": task})


def recognises(path: Path) -> bool:
    """Whether it has ICAE's layout."""
    return holds_key(path, _MEMORY)


def load(
    source: Source,
    *,
    mean_compression_rate: float | None = None,
    version: int | None = None,
    lora_alpha: float = 32.0,
    max_tokens: int | None = None,
    bos: bool = True,
) -> PublishedICAE:
    """Imports ICAE. Its prompts: `nutgraf.compressors.importers.prompts.icae_prompt`.

    Args:
        source: a file, or a folder with one file, of ``icae.*`` and ``memory_token_embed.weight``; it needs the reader (the
            base model), whose weights a version 1 checkpoint may replace.
        mean_compression_rate: source tokens per slot; with ``mem_size`` it limits a segment. Version 2 needs it.
        version: 1 or 2; default: 1 if there are base weights in version 1's form, without a second copy of the model
            (``decoder.*``) and without ``base_layer`` in their names; else 2.
        lora_alpha: the authors' code always has 32.
        max_tokens: version 1 reads at most this many tokens of a passage, including BOS; default: 512.
        bos: passages start with BOS, as in pretraining and inference (the authors' instruction tuning leaves it out).
    """
    path = source.path
    base_reader = source.need_reader("holds an ICAE without its reader")
    keys = source.keys(load_tensors(single_file(path)))
    prefix = body_prefix(base_reader.model)
    memory = keys.take(_MEMORY, (None, base_reader.width))
    lora = take_lora(keys, _ROOT + re.escape(prefix))
    rank, targets = lora_shape(lora, path)
    two_models = any(name.startswith("decoder.") for name in keys)
    held = keys.take_all(_ROOT)
    if version is None:
        version = 1 if held and not two_models and not any(".base_layer." in name for name in held) else 2
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version!r}.")
    keys.ignore(r"^decoder\.", "the second frozen copy of the base model")
    keys.done()
    base = {name.replace(".base_layer.", "."): t for name, t in held.items()}
    mem_size = len(memory) - len(TASKS)
    if mem_size < 1:
        raise CheckpointError(f"{path}: {_MEMORY} has {len(memory)} rows, wanted memory tokens and {len(TASKS)} more.")
    if version == 2:
        what = "how many source tokens a slot stands for (4 in the released ones)"
        need(mean_compression_rate, "mean_compression_rate", what, path)
    if version == 2:  # its decoder has no rows for [PAD], memory and task tokens
        base = {name: _own_rows(name, t, mem_size, base_reader, path) for name, t in base.items()}
    reader = _reader(source, base, base_reader) if base else base_reader
    config = PublishedICAEConfig(
        fixed_slots=True,
        projector="none",
        positions="append",
        residual=False,
        special_tokens=True,
        mem_size=mem_size,
        ratio=float(mean_compression_rate or 4.0),
        r=rank,
        alpha=float(lora_alpha),
        target_modules=tuple(targets),
        bos=bos,
        bos_once=True,
        as_prompt=True,
        truncate=(max_tokens or 512) if version == 1 else None,
    )
    compressor = PublishedICAE(config, reader)
    fill_lora(compressor.encoder, lora, path)
    with torch.no_grad():
        compressor.memory.copy_(memory[:mem_size])
        compressor.special.copy_(memory[mem_size:])  # type: ignore[union-attr]
    return compressor


def _own_rows(name: str, tensor: Tensor, mem_size: int, given: Reader, path: Path) -> Tensor:
    """A weight of version 2, without the rows after the base model's vocabulary, which are never trained or read."""
    if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return tensor
    rows, added = given.model.get_input_embeddings().weight.shape[0], 1 + mem_size + len(TASKS)
    if len(tensor) not in (rows, rows + added):
        raise CheckpointError(
            f"{path}: {name} has {len(tensor)} rows, wanted {rows} as the reader {given.name!r} has, or {added} more."
        )
    return tensor[:rows]


def _reader(source: Source, base: dict[str, Tensor], given: Reader) -> Reader:
    """The reader of the checkpoint's base weights, or the given one if these were zeroed for the release."""
    matrices = [t for t in base.values() if t.dim() > 1]
    if matrices and not any(bool(t.any()) for t in matrices):
        source.ignored |= dict.fromkeys(base, "base weights that were zeroed for the release")
        return given
    table = next((t for n, t in base.items() if n.endswith("embed_tokens.weight")), None)
    config = copy.deepcopy(given.model.config)
    if table is not None:
        config.get_text_config().vocab_size = len(table)
    own = {name: t for name, t in given.model.state_dict().items() if torch.is_tensor(t)}
    same = base.keys() <= own.keys() and all(
        own[n].shape == t.shape and torch.equal(own[n].cpu(), t.to(own[n].dtype)) for n, t in base.items()
    )
    if same and own.keys() == base.keys():
        source.ignored |= dict.fromkeys(base, "base weights that the reader holds already")
        return given
    return make_reader(build_model(config, base, source.path), given.tokenizer, source)
