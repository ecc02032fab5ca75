"""HD-Gist: gist tokens after the paragraphs and the sentences of a passage, as many as it has; the best are kept."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..base import Passages
from ..core.batching import SoftSequence
from ..core.config import CompressorConfig, check_counts, setting
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin
from ..encoders.tuned_reader import AdaptedReader
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import random_token_rows
from ..slots.segments import Segment, SegmentSettings, slots_for
from ..slots.structure import Unit, find_units, keep_best
from .encode import KVSlots, drop_idle_lora, encode_kv
from .memory_slots import KVSegmentCompressor


@dataclass
class HDGistConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of HD-Gist."""

    method: ClassVar[str] = "hd-gist"
    title: ClassVar[str] = "HD-Gist"

    ratio: float | None = setting(4.0, "tokens per slot at least, if no ratio is asked for", kw_only=True)
    segment_tokens: int = setting(512, "longest segment", kw_only=True)
    query_aware: bool = setting(False, "keep the gists of what shares words with the question; false: of the longest")
    adapt_reader: bool = setting(True, "the tuned model also reads the slots (the paper); false: the plain reader does")

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1})
        self.check_segments()
        self.check_lora()


@dataclass
class Part(Segment):
    """A segment with its gists.

    Attributes:
        ends: ``[gists]`` number of tokens before each.
        levels: ``[gists]`` rows of the gist embeddings.
        kept: ``[slots]`` indices of the gists that are kept.
    """

    ends: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    levels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


@register_compressor
class HDGistCompressor(KVSegmentCompressor):
    """HD-Gist (Findings of EACL 2024) for passages of any kind.

    The tuned reader reads a passage with a gist token after each sentence and another one after each paragraph (line of text):
    ``[BOS][sentence][gist][sentence][gist][paragraph's gist]...``. The slots are its keys and values of every layer at the
    gists; so there are as many as the passage has parts. The ratio says how many at most: first those of paragraphs, then
    those of the sentences of the best paragraphs. The best ones share most words with the question (``query_aware``), or
    are the longest.

    Differences from the paper: there the parts are arguments of API documentation and their values, and a value's gist becomes
    visible while the model writes its argument. Here gists are chosen when the passage is compressed. LoRA instead of full
    tuning.

    Attributes:
        encoder: the reader's `LoRATwin`.
        gist: ``[2, width]`` embeddings of the gists of sentences and paragraphs.

    Raises:
        ValueError: if the reader's keys cannot move (GPT-2, OPT, ALiBi), or it has too few positions.
    """

    config_class = HDGistConfig
    config: HDGistConfig

    def __init__(self, config: HDGistConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = LoRATwin(reader.model, **config.lora)
        if config.adapt_reader:
            self.adapt_reader(AdaptedReader(reader, self.encoder))
        else:
            drop_idle_lora(self.encoder)
        self.gist = nn.Parameter(random_token_rows(reader, 2))

    @property
    def most_slots(self) -> int:
        """One for every token."""
        return self.config.segment_tokens

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int:
        """``segment_tokens``, or what fits the reader's positions with two gists for each token."""
        limit, most = self.max_positions, self.config.segment_tokens
        return most if limit is None else max(min(most, (limit - len(self.opening)) // 3), 1)

    def encode_segments(self, segments: list[Segment]) -> list[KVSlots]:
        """Keys and values at the gists that are kept."""
        read = [segment for segment in segments if isinstance(segment, Part)]
        found = encode_kv(self.encoder, [self.sequence(part) for part in read], budget=self.batch_positions)
        return [slots.chosen(part.kept) for slots, part in zip(found, read, strict=True)]

    def encode_passages(self, passages: Passages, ratio: float | None) -> list[KVSlots]:
        """The slots of each passage: those of its segments, joined."""
        texts = passages.texts or [self.base_reader.decode(ids) for ids in passages.ids]
        parts: list[Segment] = []
        for number, (text, ids, query) in enumerate(zip(texts, passages.ids, passages.queries)):
            units = find_units(text, first_characters(self.base_reader, text, len(ids)), self.longest_segment(ratio))
            keep_best(units, query if self.config.query_aware else None, slots_for(len(ids), ratio or 1.0, len(ids)))
            parts += self.parts(ids, units, number)
        made: list[list[KVSlots]] = [[] for _ in texts]
        for part, slots in zip(parts, self.encode_segments(parts) if parts else []):
            made[part.passage].append(slots)
        return [self.join(slots) for slots in made]

    def parts(self, ids: list[int], units: list[Unit], number: int) -> list[Part]:
        """Segments of passage ``number``, which end with a unit."""
        found, start, longest = list[Part](), 0, self.longest_segment(None)
        ends, first = [unit.end for unit in units], 0  # in order
        while start < len(ids):
            after = bisect_right(ends, start + longest)
            end, inside, first = ends[after - 1], units[first:after], after
            kept = torch.tensor([i for i, unit in enumerate(inside) if unit.kept], dtype=torch.long)
            about = torch.tensor([unit.end - start for unit in inside]), torch.tensor([u.level for u in inside])
            found.append(Part(ids[start:end], len(kept), self.opening, number, *about, kept))
            start = end
        return found

    def sequence(self, part: Part) -> SoftSequence:
        """``[BOS][sentence][gist]...`` of a segment."""
        first, length, gists = len(part.front), len(part.ids), len(part.ends)
        ids = torch.zeros(length + gists, dtype=torch.long)
        at = torch.arange(length)
        ids[at + torch.searchsorted(part.ends, at, right=True)] = torch.tensor(part.ids)
        where = (part.ends + torch.arange(gists) + first).tolist()
        return SoftSequence([*part.front, *ids.tolist()], where, self.gist[part.levels])


def first_characters(reader: Reader, text: str, tokens: int) -> list[int]:
    """First character of each of a passage's tokens; evenly spread if the text is not exactly theirs."""
    starts = [start for start, _ in reader.tokenize_with_offsets(text)[1]]
    return starts if len(starts) == tokens else [i * len(text) // tokens for i in range(tokens)]
