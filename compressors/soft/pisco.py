"""PISCO: a LoRA-tuned reader, or a small model of its own, compresses; a LoRA-tuned reader reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..base import Query, SoftCompressor
from ..core.batching import SoftSequence, soft_batches
from ..core.config import CompressorConfig, check_choices, check_counts, check_ratio
from ..core.passage import CompressedPassage, Interface
from ..encoders.lora import LoRASettings, lora_rank
from ..encoders.lora_twin import LoRATwin, Twin
from ..encoders.small_lm import BodyEncoder
from ..encoders.tuned_reader import AdaptedReader
from ..reader.reader import Reader
from ..reader.tokenization import PromptTokenizer
from ..registry import register_compressor
from ..slots.pisco_plan import PISCOPlan
from ..slots.question import QuerySettings, question_ids
from ..slots.segment_overlap import OverlapSettings, overlaps

ENCODER_FOLDER = "encoder"
_PROBE_TOKENS = 32  # length of the random text on which the output scale is matched


@dataclass
class PISCOConfig(CompressorConfig, LoRASettings, QuerySettings, OverlapSettings):
    """Settings of PISCO. The imported checkpoints' forms are ``slots="plus-one"`` (2026) and ``"fixed"`` (2025, COCOM)."""

    method: ClassVar[str] = "pisco"

    ratio: float = field(default=16.0, metadata={"help": "compression ratio where none is asked for"})
    segment_tokens: int = field(
        default=128, metadata={"help": "longest piece, in encoder tokens, that is read at once"}
    )
    slots: Literal["proportional", "plus-one", "fixed"] = field(
        default="proportional",
        metadata={
            "help": "'proportional': ceil(L / ratio) a passage, equally long segments; 'plus-one': segments of segment_tokens "
            "(BOS counted), the last one shorter, floor(S / ratio) + 1 each; 'fixed': segment_tokens / ratio a segment"
        },
    )
    memory_tokens: int = field(
        default=1,
        metadata={"help": "different <MEM> embeddings; 1: the same one in every place; else the most a segment gets"},
    )
    encoder: str = field(
        default="lora", metadata={"help": "'lora': the reader plus LoRA; else the id or folder of a smaller causal LM"}
    )
    connector: Literal["none", "mlp"] | None = field(
        default=None,
        metadata={"help": "'mlp': Linear-ReLU-Linear; default: 'mlp' for an encoder of its own, else 'none'"},
    )
    connector_width: int = field(default=4096, metadata={"help": "width between the connector's two layers"})
    scale: Literal["matched", "none"] = field(
        default="matched", metadata={"help": "'matched': a learned factor that starts at the reader's embedding norm"}
    )
    decoder: Literal["lora", "none"] = field(
        default="lora", metadata={"help": "'lora': the reader that reads is tuned too; 'none': it is taken as it is"}
    )
    r: int = lora_rank(16, ", of encoder and decoder")
    prefix: tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "ids in front of each segment; default: what the encoder's tokenizer puts there"},
    )
    suffix: tuple[int, ...] = field(default=(), metadata={"help": "ids between each segment and its <MEM> tokens"})
    as_prompt: bool = field(
        default=False, metadata={"help": "tokenise a passage as the start of a prompt, as the authors' code does"}
    )

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1, "memory_tokens": 1, "connector_width": 1})
        check_ratio(self.ratio)
        choices = {"slots": ("proportional", "plus-one", "fixed"), "connector": (None, "none", "mlp")}
        check_choices(self, {**choices, "scale": ("matched", "none"), "decoder": ("lora", "none")})
        self.check_lora()
        self.check_query()
        self.check_overlap()
        if self.query_aware and self.slots == "plus-one":
            raise ValueError(
                "slots='plus-one' is the authors' code, which reads no question; choose 'proportional' slots."
            )
        if not isinstance(self.encoder, str) or not self.encoder:
            raise ValueError(f"encoder must be 'lora' or the name of a causal LM, got {self.encoder!r}.")
        if self.slots == "fixed" and self.segment_tokens < self.ratio:
            raise ValueError(f"{self.segment_tokens} tokens a segment give no slot at ratio {self.ratio:g}.")
        for name in ("prefix", "suffix"):
            if getattr(self, name) is not None:
                setattr(self, name, tuple(getattr(self, name)))


@register_compressor
class PISCOCompressor(SoftCompressor):
    """PISCO (arXiv 2501.16075) and its forerunner COCOM (arXiv 2407.09252).

    A segment of a passage is read by the encoder as ``[BOS][segment][<MEM> ...]``; the last hidden states (after the final
    norm) at the <MEM> tokens, through the connector if there is one, are its slots. The encoder is the reader with LoRA of
    its own, or a smaller causal LM that is trained whole. The reader that reads is tuned by LoRA too, so use
    ``compressor.reader``, not the reader given.

    Training is by sequence-level distillation: a teacher answers from the full text, and the loss is language modelling on
    its answers. With the ordinary trainer that is the objective ``lm`` alone on records whose answers the teacher wrote
    (``base_reader.generate`` over the passages as text); there is no KL and no pretraining in PISCO v1, and pretraining by
    ``ae`` and ``lm`` (continuation) in COCOM and in the version of 2026.

    Beyond the papers: slots are proportional to the passage (``ceil(L / ratio)`` of them, shared among equally long
    segments), so that a passage never grows and nothing of a long one is cut, and they start on the scale of the reader's
    embeddings. ``slots="plus-one"`` and ``"fixed"`` are what the authors' code does, in which a short passage may grow. With
    ``query_aware=True`` the encoder reads the question in front of each segment, behind the prefix (as OSCAR does, arXiv
    2504.07109), and with ``segment_overlap`` so many of the tokens that stand in front of it.

    Args:
        config: the settings.
        reader: the reader as it is before tuning.
        encoder_model: a `BodyEncoder` in place of loading ``config.encoder``.

    Attributes:
        encoder: a `LoRATwin` of the reader, or a `BodyEncoder`.
        plan: how passages are cut.
        memory: ``[memory_tokens, encoder width]`` embeddings of the <MEM> tokens.
        connector: ``[n, encoder width] -> [n, width]``, or ``None``.
        decoder: the `LoRATwin` that ``reader`` reads with (``decoder="lora"`` only).
        batch_positions: positions that one forward pass of the encoder may take (memory against speed; changes no result).

    Raises:
        ValueError: if the widths of encoder and reader differ and there is no connector, or positions are too few.
    """

    config_class = PISCOConfig
    interface: ClassVar[Interface] = "embeds"
    config: PISCOConfig

    def __init__(self, config: PISCOConfig, reader: Reader, *, encoder_model: BodyEncoder | None = None) -> None:
        super().__init__(config, reader)
        self.batch_positions = 16384
        self.encoder: Twin
        if config.encoder == "lora":
            self.encoder = LoRATwin(reader.model, **config.lora)
        else:
            self.encoder = (encoder_model or BodyEncoder.from_pretrained(config.encoder)).to(reader.device)
        limit = self._own.max_positions if self._own else reader.max_positions
        self.plan = PISCOPlan(config, limit, len(self.prefix) + len(config.suffix))
        self.plan.longest(overlap=config.segment_overlap)
        width = self._embed(torch.zeros(1, dtype=torch.long)).shape[-1]
        with torch.no_grad():
            rows = self._embed(torch.randperm(self._vocabulary)[: config.memory_tokens]).float()
            rows = rows[torch.arange(config.memory_tokens) % len(rows)]
        self.memory = nn.Parameter(rows.clone())
        kind = config.connector or ("none" if config.encoder == "lora" else "mlp")
        self.connector: nn.Sequential | None = None
        if kind == "mlp":
            self.connector = nn.Sequential(
                nn.Linear(width, config.connector_width), nn.ReLU(), nn.Linear(config.connector_width, reader.width)
            ).to(reader.device)
        self.log_scale: nn.Parameter | None = None
        if config.scale == "matched":
            n = min(_PROBE_TOKENS, self.plan.longest())
            ids = torch.randint(self._vocabulary, (n,), generator=torch.Generator().manual_seed(0)).tolist()
            with torch.no_grad():
                found = self._project(torch.cat(self._forward([ids], [1])))
            factor = reader.embedding_norm / max(float(found.float().norm(dim=-1).mean()), 1e-6)
            self.log_scale = nn.Parameter(torch.tensor(math.log(factor), device=reader.device))
        else:
            self._project(torch.cat(self._forward([[0]], [1])))  # refuses widths that do not fit
        self.decoder: Twin | None = None
        if config.decoder == "lora":
            self.decoder = LoRATwin(reader.model, **config.lora)
            self.adapt_reader(AdaptedReader(reader, self.decoder))

    @property
    def _own(self) -> BodyEncoder | None:
        """The encoder, where it is a model of its own."""
        return self.encoder if isinstance(self.encoder, BodyEncoder) else None

    @property
    def tokenizer(self) -> PromptTokenizer:
        """What segments are tokenised with."""
        return self._own.prompts if self._own else self.base_reader.prompts

    @property
    def prefix(self) -> list[int]:
        """Ids in front of each segment."""
        return list(self.tokenizer.bos_ids if self.config.prefix is None else self.config.prefix)

    @property
    def _vocabulary(self) -> int:
        return self._own.vocabulary if self._own else self.base_reader.vocab_size

    def _embed(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.base_reader.device)
        return self._own.embed(ids) if self._own else self.base_reader.embed(ids)

    def identity_parts(self) -> list[Any]:
        """The slots depend on the base weights, or on the encoder's tokenizer, too."""
        own = self._own.prompts.fingerprint_parts() if self._own else None
        return [self.base_reader.fingerprint, own]

    # -- segments --------------------------------------------------------------------------------------------------

    def segments(
        self, n_tokens: int, ratio: float | None = None, source_tokens: int | None = None, question_tokens: int = 0
    ) -> list[tuple[int, int]]:
        """How a passage is cut: ``(encoder tokens, slots)`` of each segment, in order.

        Args:
            n_tokens: its length in the encoder's tokens (``slots="plus-one"``: with its prefix).
            ratio: ``None``: the config's.
            source_tokens: its length in the reader's tokens, which the number of slots goes by; default: ``n_tokens``.
            question_tokens: encoder tokens of the question in front of each segment.
        """
        ratio = self.config.ratio if ratio is None else float(ratio)
        return self.plan.cut(n_tokens, ratio, n_tokens if source_tokens is None else source_tokens, question_tokens)

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """Compresses passages, differentiably in all that trains.

        Args:
            texts: the passages.
            query: what is asked of each passage (``query_aware=True``; without a question a passage is read alone);
                otherwise ignored: the slots serve all questions.
            ratio: any real number of at least 1; ``None``: the config's. ``slots="fixed"`` knows its own alone.
            vectors: ignored.
        """
        texts = self._check_texts(texts)
        sources = [len(ids) for ids in self.reader.tokenize_batch(texts)]
        asked = question_ids(self.config, self.tokenizer, self._check_query(query, len(texts)))
        ids = self.tokenizer.encode_batch([(t, self.config.as_prompt) for t in texts])
        return self.encode_ids(ids, ratio, sources, asked)

    def encode_ids(
        self,
        ids: Sequence[Sequence[int]],
        ratio: float | None = None,
        source_tokens: Sequence[int] | None = None,
        questions: Sequence[Sequence[int]] | None = None,
    ) -> list[CompressedPassage]:
        """`encode` for passages given as the encoder's token ids, `prefix` and suffix not among them.

        ``questions`` are the ids that are read between the prefix and each segment.
        """
        sources = [len(tokens) for tokens in ids] if source_tokens is None else source_tokens
        prefix, suffix = self.prefix, list(self.config.suffix)
        whole = self.config.slots == "plus-one"  # prefix and suffix are the passage's own, and are cut with it
        pieces: list[list[int]] = []
        slots: list[int] = []
        owned: list[int] = []
        for tokens, source, question in zip(ids, sources, questions or [()] * len(ids)):
            passage = [*prefix, *tokens, *suffix] if whole and len(tokens) else list(tokens)
            # The authors' code counts the tokens that its encoder reads, which may be one more or fewer.
            counted = len(passage) if self.config.as_prompt else source
            cut = self.segments(len(passage), ratio, counted, len(question))
            ends = accumulate(length for length, _ in cut)
            parts = [passage[end - length : end] for (length, _), end in zip(cut, ends)]
            leads = overlaps(passage, [length for length, _ in cut], self.config.segment_overlap)
            for lead, part in zip(leads, parts):
                pieces.append([*lead, *part] if whole else [*prefix, *question, *lead, *part, *suffix])
            slots += [n for _, n in cut]
            owned.append(sum(n for _, n in cut))
        reader = self.reader
        found = torch.cat(self._forward(pieces, slots)) if pieces else self.memory.new_zeros(0, self.memory.shape[1])
        rows = self._project(found).to(reader.device, reader.dtype).split(owned) if len(ids) else ()
        origin = self.origin
        info = {"method": "pisco", "ratio_asked": float(ratio or self.config.ratio), **reader.identity_card.runs_as}
        return [
            CompressedPassage("embeds", n, origin, reader.fingerprint, embeds=e, info=dict(info))
            for n, e in zip(sources, rows)
        ]

    def _forward(self, pieces: Sequence[list[int]], slots: Sequence[int]) -> list[Tensor]:
        """For each segment's ids, special ones included, the hidden states ``[slots, encoder width]`` at its <MEM> tokens."""
        which = [k % self.config.memory_tokens for n in slots for k in range(n)]
        rows = self.memory[torch.tensor(which, dtype=torch.long)].split(list(slots))
        sequences = [SoftSequence.with_memory(piece, memory) for piece, memory in zip(pieces, rows)]
        out: dict[int, Tensor] = {}
        for batch in soft_batches(sequences, self._embed, self.base_reader.device, budget=self.batch_positions):
            hidden = self.encoder(batch.embeds, batch.mask, batch.positions)
            out.update((i, states[len(states) - slots[i] :]) for i, states in batch.unpadded(hidden))
        return [out[i] for i in range(len(pieces))]

    def _project(self, hidden: Tensor) -> Tensor:
        if self.connector is not None:
            weight: Any = self.connector[0].weight
            hidden = self.connector(hidden.to(weight.device, weight.dtype))
        if hidden.shape[-1] != self.base_reader.width:
            raise ValueError(
                f"The encoder's hidden states are {hidden.shape[-1]} wide and {self.base_reader.name!r} takes embeddings "
                f"of {self.base_reader.width}; set connector to 'mlp'."
            )
        if self.log_scale is not None:
            hidden = hidden.to(self.log_scale.device, self.log_scale.dtype) * self.log_scale.exp()
        return hidden

    # -- saving and loading ----------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """As every compressor; an encoder of its own also leaves its config and tokenizer in ``encoder``."""
        if self._own is not None:
            self._own.save_description(Path(folder) / ENCODER_FOLDER)
        super().save_pretrained(folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, reader: Reader, **kwargs: Any) -> PISCOCompressor:
        """As every compressor."""
        described = Path(folder) / ENCODER_FOLDER
        if described.is_dir():
            kwargs.setdefault("encoder_model", BodyEncoder.from_description(described))
        return super().from_pretrained(folder, reader, **kwargs)
