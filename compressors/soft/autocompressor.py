"""AutoCompressor: reads a passage segment by segment, each after the summary vectors of the segments before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.batching import SoftSequence, run_sequences
from ..core.config import CompressorConfig, check_choices, check_counts, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings, lora_alpha, lora_rank
from ..encoders.lora_twin import Twin, tune
from ..encoders.tuned_reader import AdaptedReader
from ..objectives.document_segments import document_segment_losses
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import probe
from ..slots.projector import check_width, learned_scale, matching_factor, scaled
from ..slots.segments import Segment, SegmentCompressor, SegmentSettings, in_turn


@dataclass
class AutoCompressorConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of AutoCompressor."""

    method: ClassVar[str] = "autocompressor"
    title: ClassVar[str] = "AutoCompressor"
    retired: ClassVar[Mapping[str, Any]] = dict(
        fixed_slots=False, equal_segments=True, scale="matched", positions="count", bos=True, as_prompt=False
    )

    summary_length: int = setting(64, "summary tokens: the most slots of a segment")
    accumulate_summary: bool = setting(True, "keep the summaries of all segments so far; false: of the last one only")
    tuning: Literal["lora", "full", "none"] = setting("lora", "what of the model to train, beside the summary tokens")
    adapt_reader: bool = setting(True, "the tuned model also reads the slots (the paper); false: the plain reader does")
    r: int = lora_rank(16)
    alpha: float = lora_alpha(16.0)
    train_segments: int = setting(4, "segments per document in training")
    segments_per_substep: int = setting(2, "segments in a row between which gradients flow through the soft prompt")

    def __post_init__(self) -> None:
        check_counts(self, {"summary_length": 1, "train_segments": 2, "segments_per_substep": 2})
        check_choices(self, {"tuning": ("lora", "full", "none")})
        self.check_segments()
        self.check_lora()


@register_compressor
class AutoCompressor(SegmentCompressor):
    """AutoCompressor (Chevalier et al., arXiv 2305.14788).

    The tuned model reads the segments of a passage in turn as ``[BOS][soft prompt][segment][summary tokens]``. Its last hidden
    states (after the final norm) at the summary tokens are the segment's summary vectors. The soft prompt is all summary
    vectors so far (``accumulate_summary``), or those of the last segment. What is left after the last segment are the slots.
    The same tuned model reads them: use ``compressor.reader``.

    Beyond the paper: the number of summary vectors is proportional to the segment, so that a short passage never grows and one
    checkpoint serves every ratio (train it on random ratios). Summary vectors are scaled to the reader's embeddings. BOS opens
    every pass, as in the reader. The reader may stay untuned (``adapt_reader=False``).

    Training: the objective ``segments`` (`document_segment_losses`), beside those on the slots. With ``tuning="none"`` only the
    summary tokens and the scale train.

    Attributes:
        encoder: the reader's `LoRATwin`, `FullTwin` or `Untuned`.
        summary: ``[summary_length, width]`` summary embeddings; they start as the end-of-sequence embedding.
        log_scale: logarithm of the output factor.

    Raises:
        ValueError: if the reader's hidden states and embeddings differ in width, or it has too few positions.
    """

    config_class: ClassVar[type[AutoCompressorConfig]] = AutoCompressorConfig
    interface: ClassVar[Interface] = "embeds"
    config: AutoCompressorConfig

    def __init__(self, config: AutoCompressorConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        longest = self.longest_segment(config.ratio)
        self.encoder = tune(reader.model, config.tuning, **config.lora)
        if config.adapt_reader and config.tuning != "none":
            self.adapt_reader(AdaptedReader(reader, self.encoder))
        with torch.no_grad():
            rows = range(reader.vocab_size) if reader.eos_id is None else [reader.eos_id]
            start = reader.embed(torch.tensor(list(rows), device=reader.device)).float().mean(dim=0)
            self.summary = nn.Parameter(start.repeat(config.summary_length, 1))
            sample = probe(reader.vocab_size, longest, config.summary_length, self.opening)
            (row,) = self.read(self.encoder, [self.no_slots()], [sample])
        self.log_scale: nn.Parameter | None = learned_scale(matching_factor(row[-sample.slots :], reader), reader)

    @property
    def most_slots(self) -> int:
        """Summary tokens."""
        return self.config.summary_length

    @classmethod
    def own_objectives(cls) -> dict[str, Callable[..., tuple[Tensor, int]]]:
        """``segments``: language modelling over the segments of documents."""
        return {"segments": document_segment_losses}

    def encode_segments(self, segments: list[Segment]) -> list[Tensor]:
        """Summary vectors: all first segments are read in one pass, then all second ones, and so on."""
        soft: dict[int, Tensor] = {}
        for group in in_turn(segments):
            prompts = [soft.get(segment.passage, self.no_slots()) for segment in group]
            for segment, prompt, row in zip(group, prompts, self.read(self.encoder, prompts, group)):
                soft[segment.passage] = self.extend(prompt, row, segment.slots)
        # What is left after a passage's last segment stands for the whole passage.
        last = {segment.passage: i for i, segment in enumerate(segments)}
        return [soft[s.passage] if last[s.passage] == i else self.no_slots() for i, s in enumerate(segments)]

    def no_slots(self) -> Tensor:
        """The soft prompt of the first segment, ``[0, width]``."""
        reader = self.base_reader
        return torch.zeros(0, reader.width, device=reader.device, dtype=reader.dtype)

    def extend(self, soft: Tensor, states: Tensor, slots: int) -> Tensor:
        """The soft prompt ``[slots, width]`` after a segment, from the hidden states of its pass."""
        vectors = scaled(states[len(states) - slots :], self.log_scale).to(soft.device, soft.dtype)
        return torch.cat([soft, vectors]) if self.config.accumulate_summary else vectors

    def read(self, model: Twin, soft: Sequence[Tensor], segments: Sequence[Segment]) -> list[Tensor]:
        """Last hidden states of ``[front][soft prompt][segment][summary tokens]`` per segment, in batches of similar length.

        Raises:
            ValueError: if a segment does not fit the reader's positions after its soft prompt.
        """
        reader, sequences = self.base_reader, []
        for prompt, segment in zip(soft, segments):
            first = len(segment.front) + len(prompt)
            last = first + len(segment.ids)
            ids = [*segment.front, *[0] * len(prompt), *segment.ids, *[0] * segment.slots]
            if self.max_positions is not None and len(ids) > self.max_positions:
                raise ValueError(
                    f"A segment of {len(segment.ids)} tokens with {len(prompt)} summary vectors before it needs {len(ids)} "
                    f"positions, but {reader.name!r} has {self.max_positions}; ask for a higher ratio, compress the passage "
                    "in parts, or use accumulate_summary=False."
                )
            places = [*range(len(segment.front), first), *range(last, len(ids))]
            rows = torch.cat([prompt, self.summary[: segment.slots].to(prompt.device)])
            sequences.append(SoftSequence(ids, places, rows))
        states = run_sequences(model, sequences, model.lm.get_input_embeddings(), reader.device, self.batch_positions)
        check_width(states[0], reader, "AutoCompressor needs both alike")
        return states
