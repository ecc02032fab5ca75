"""Cuts passages into segments, and the base class of methods that encode segment by segment."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, check_counts, check_ratio, setting
from ..core.passage import CompressedPassage
from ..encoders.lora_twin import LoRATwin, Twin
from ..encoders.small_lm import ENCODER_FOLDER, SmallLMEncoder
from ..reader.reader import Reader
from ..reader.tokenization import PromptTokenizer
from .question import question_ids


@dataclass(kw_only=True)
class SegmentSettings:
    """Config mixin for methods that encode segment by segment."""

    retired_unhashed: ClassVar[Mapping[str, Any]] = {"nested": False, "coarsest": 32.0, "segment_overlap": 0}

    ratio: float | None = setting(4.0, "compression ratio if none is asked for")
    segment_tokens: int | None = setting(None, "longest segment; default: as long as its slots allow at the ratio")

    def check_segments(self) -> None:
        """Raises ``ValueError`` for invalid values."""
        check_counts(self, {"segment_tokens": 1}, optional=("segment_tokens",))
        if self.ratio is not None:
            check_ratio(self.ratio)


@dataclass
class Segment:
    """A piece of a passage that is encoded in one pass.

    Attributes:
        ids: token ids of the piece.
        slots: number of slots to make of it.
        front: token ids to read before it: BOS and the question, if any.
        passage: index of its passage in the batch; segments of a passage are neighbours, in order.
    """

    ids: list[int]
    slots: int
    front: list[int]
    passage: int = 0


class SegmentCompressor(SoftCompressor):
    """Base class of methods that encode a passage segment by segment.

    A method implements `encode_segments` and `most_slots`. This class tokenises, cuts passages into segments, puts BOS and the
    question before each, and joins the slots. A passage of L tokens becomes the fewest segments of at most
    ``most_slots * ratio`` tokens, equally long except for the last; a segment of S tokens gets ``ceil(S / ratio)`` slots, so
    that a short passage never grows.

    Attributes:
        batch_positions: positions per forward pass of the encoder (memory vs. speed; the result does not change).
    """

    def __init__(self, config: CompressorConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.batch_positions = 16384

    @abstractmethod
    def encode_segments(self, segments: list[Segment]) -> Sequence[Any]:
        """Computes the slots of each segment, differentiable.

        Args:
            segments: at least one segment.

        Returns:
            ``[slots, width]`` embeddings per segment, on the scale of the reader's embeddings; KV methods return `KVSlots`.
        """

    @property
    @abstractmethod
    def most_slots(self) -> int:
        """The most slots of one segment. Positions are reserved for them in every pass."""

    @property
    def source(self) -> Reader | SmallLMEncoder:
        """Tokenizer, embeddings and positions of the encoder; default: the reader's."""
        return self.base_reader

    @property
    def tokenizer(self) -> PromptTokenizer:
        """Tokenizer of passages and questions."""
        return self.source.prompts

    @property
    def opening(self) -> list[int]:
        """Token ids before every segment and question; default: BOS, if the tokenizer has one."""
        return list(self.tokenizer.bos_ids)

    @property
    def max_positions(self) -> int | None:
        """Positions that one pass can take; ``None``: no limit."""
        return self.source.max_positions

    def token_ids(self, passages: Passages) -> list[list[int]]:
        """Token ids of the passages as the encoder reads them, without special tokens."""
        if self.source is self.base_reader or not passages.texts:
            return passages.ids
        return self.tokenizer.encode_batch([(text, False) for text in passages.texts])

    # -- cutting ---------------------------------------------------------------------------------------------------

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int | None:
        """Tokens that fit one segment; ``None``: any number. Raises ``ValueError`` if there is no room for any."""
        slots, config = self.most_slots, self.config
        room = room_for_tokens(
            self.max_positions, self.base_reader.name, len(self.opening), question_tokens, memory_tokens=slots
        )
        full = None if ratio is None else math.floor(slots * ratio + 1e-6)
        return min((n for n in (room, full, getattr(config, "segment_tokens", None)) if n is not None), default=None)

    def slots_of(self, n_tokens: int, ratio: float | None) -> int:
        """Slots of a segment."""
        return slots_for(n_tokens, ratio or 1.0, self.most_slots)

    def cut(
        self, n_tokens: int, ratio: float | None, question_tokens: int, source_tokens: int
    ) -> list[tuple[int, int]]:
        """Cuts a passage: ``(tokens, slots)`` per segment.

        Args:
            n_tokens: length in the encoder's tokens.
            ratio: compression ratio; ``None``: as many slots as allowed.
            question_tokens: length of the question read before each segment.
            source_tokens: length in the reader's tokens, for encoders with their own tokenizer.
        """
        longest = self.longest_segment(ratio, question_tokens) or max(n_tokens, 1)
        return [(n, self.slots_of(n, ratio)) for n in equal_lengths(n_tokens, longest)]

    def segments(
        self, n_tokens: int, ratio: float | None = None, question_tokens: int = 0, source_tokens: int | None = None
    ) -> list[tuple[int, int]]:
        """`cut` with the config's ratio as default: ``(tokens, slots)`` per segment of a passage, in order."""
        source = n_tokens if source_tokens is None else source_tokens
        return self.cut(n_tokens, self.ratio_or_default(ratio), question_tokens, source) if n_tokens and source else []

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode_passages(self, passages: Passages, ratio: float | None) -> list[Any]:
        """Slots of each passage: those of its segments, joined."""
        questions = question_ids(self.config, self.tokenizer, passages.queries)
        sources = [len(ids) for ids in passages.ids]
        segments: list[Segment] = []
        for number, parts in enumerate(zip(self.token_ids(passages), questions, sources, strict=True)):
            segments += self.segments_of(*parts, ratio, number)
        made: list[list[Any]] = [[] for _ in sources]
        if segments:
            for segment, slots in zip(segments, self.encode_segments(segments), strict=True):
                made[segment.passage].append(slots)
        return [self.join(parts) for parts in made]

    def encode_ids(self, ids: Sequence[Sequence[int]], ratio: float | None = None) -> list[CompressedPassage]:
        """`encode` for passages given as the encoder's token ids, without special tokens."""
        passages = Passages([], [None] * len(ids), [list(passage) for passage in ids])
        made = self.encode_passages(passages, self.ratio_or_default(ratio))
        return self.package(made, [len(passage) for passage in ids], ratio)

    def segments_of(
        self, ids: list[int], question: list[int], source_tokens: int, ratio: float | None, number: int
    ) -> list[Segment]:
        """The segments of passage ``number``."""
        found: list[Segment] = []
        start = 0
        for length, slots in self.segments(len(ids), ratio, len(question), source_tokens):
            front = [*self.opening, *question]
            found.append(Segment(ids[start : start + length], slots, front, number))
            start += length
        return found

    def join(self, parts: Sequence[Any]) -> Any:
        """The slots of a passage from those of its segments; a passage without segments has none."""
        width, device = self.base_reader.width, self.base_reader.device
        return torch.cat(list(parts)) if parts else torch.zeros(0, width, device=device)

    # -- saving and loading ----------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Saves the compressor; config and tokenizer of a smaller LM go to the folder ``encoder``."""
        if isinstance(self.source, SmallLMEncoder):
            self.source.save_description(Path(folder) / ENCODER_FOLDER)
        super().save_pretrained(folder, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, reader: Reader, **kwargs: Any) -> Self:
        """Loads a folder written by `save_pretrained`."""
        described = Path(folder) / ENCODER_FOLDER
        if described.is_dir():
            kwargs.setdefault("encoder_model", SmallLMEncoder.from_description(described))
        return super().from_pretrained(folder, reader, **kwargs)


class SlotPerToken(SegmentCompressor):
    """Base class of methods that make slots of tokens' states, so that slots take no positions of the encoder."""

    config: Any

    @property
    def most_slots(self) -> int:
        """One for every token."""
        return self.config.segment_tokens

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int:
        """``segment_tokens``, or the encoder's positions."""
        limit, most = self.max_positions, self.config.segment_tokens
        return most if limit is None else max(min(most, limit - len(self.opening)), 1)


class OwnEncoder(SegmentCompressor):
    """Base class of methods whose encoder is the reader with LoRA, or a smaller LM (``config.encoder``)."""

    encoder: Twin

    def make_encoder(self, config: Any, given: SmallLMEncoder | None) -> Twin:
        """A `LoRATwin` of the reader, or the smaller LM: the given one, else the one that the config names."""
        reader = self.base_reader
        if config.encoder == "lora":
            return LoRATwin(reader.model, **config.lora)
        return (given or SmallLMEncoder.from_pretrained(config.encoder)).to(reader.device)

    @property
    def source(self) -> Reader | SmallLMEncoder:
        """The smaller LM, or the reader."""
        own = getattr(self, "encoder", None)  # not there yet while the base class is made
        return own if isinstance(own, SmallLMEncoder) else self.base_reader

    def cut(
        self, n_tokens: int, ratio: float | None, question_tokens: int, source_tokens: int
    ) -> list[tuple[int, int]]:
        """Even segments, with even shares of the passage's slots."""
        return shared_out(n_tokens, source_tokens, self.longest_segment(ratio) or n_tokens, ratio)

    def identity_parts(self) -> list[Any]:
        """The base reader, and the tokenizer of a smaller LM."""
        own = self.source is not self.base_reader
        return [self.base_reader.fingerprint, self.tokenizer.fingerprint_parts() if own else None]


def room_for_tokens(
    limit: int | None, name: str, opening: int, question_tokens: int, memory_tokens: int = 0
) -> int | None:
    """Positions left for a passage's tokens; ``None`` without a limit.

    Raises:
        ValueError: if there are none.
    """
    if limit is None or (room := limit - opening - question_tokens - memory_tokens) >= 1:
        return None if limit is None else room
    taken = [f"{memory_tokens} memory tokens"] * bool(memory_tokens)
    taken += [f"a question of {question_tokens} tokens"] * bool(question_tokens)
    advice = ["choose fewer memory tokens"] * bool(memory_tokens) + ["ask a shorter question"] * bool(question_tokens)
    raise ValueError(
        f"{' and '.join(taken) or 'Special tokens'} leave no room for a passage in the {limit} positions of {name!r}; "
        f"{' or '.join(advice) or 'use a reader with more positions'}."
    )


def equal_lengths(n_tokens: int, longest: int) -> list[int]:
    """Lengths of the fewest segments of at most ``longest`` tokens, all ``ceil(n_tokens / count)`` but a shorter last one."""
    if not n_tokens:
        return []
    count = -(-n_tokens // longest)
    length = -(-n_tokens // count)
    return [min(length, n_tokens - start) for start in range(0, n_tokens, length)]


def even_shares(total: int, count: int) -> list[int]:
    """``count`` integers that add up to ``total`` and differ by at most one."""
    ends = [i * total // count for i in range(count + 1)]
    return [b - a for a, b in zip(ends, ends[1:])]


def shared_out(n_tokens: int, source_tokens: int, longest: int, ratio: float | None) -> list[tuple[int, int]]:
    """``(tokens, slots)`` of even segments, with even shares of a passage's slots, for an encoder with its own tokenizer.

    Args:
        n_tokens: length in the encoder's tokens.
        source_tokens: length in the reader's tokens, from which the slots are counted.
        longest: the most tokens of a segment.
        ratio: compression ratio.
    """
    count = -(-n_tokens // longest)
    total = math.ceil(source_tokens / (ratio or 1.0) - 1e-6)
    total = max(min(total, n_tokens), min(count, source_tokens))
    return list(zip(even_shares(n_tokens, count), even_shares(total, count)))


def slots_for(n_tokens: int, ratio: float, most: int) -> int:
    """Slots of a segment: ``ceil(n_tokens / ratio)``, at least one and at most ``most``."""
    # The small term keeps 10 / 2.5 at 4 in spite of floating point.
    return min(max(math.ceil(n_tokens / ratio - 1e-6), 1), most)


def spread(n_tokens: int, slots: int) -> Tensor:
    """``[slots]``: the token in the middle of each slot's run."""
    return ((torch.arange(slots) + 0.5) * (n_tokens / slots)).long()


def slot_of_token(lengths: Sequence[int], slots: Sequence[int]) -> Tensor:
    """``[all tokens]``: index of each token's slot over all segments; each segment is cut into even runs, one per slot."""
    of, first = [torch.zeros(0, dtype=torch.long)], 0
    for length, n in zip(lengths, slots, strict=True):
        of.append(torch.arange(length) * n // length + first)
        first += n
    return torch.cat(of)


def window_lengths(n_tokens: int, ratio: float) -> list[int]:
    """Lengths of a passage's windows: borders at ``floor(k * ratio)``, the last window shorter."""
    if not n_tokens:
        return []
    count = max(math.ceil(n_tokens / ratio - 1e-6), 1)
    borders = [min(math.floor(k * ratio + 1e-6), n_tokens) for k in range(count)] + [n_tokens]
    return [b - a for a, b in zip(borders, borders[1:])]


def in_turn(segments: Sequence[Segment]) -> list[list[Segment]]:
    """All first segments of passages, then all second ones, and so on."""
    seen: Counter[int] = Counter()
    groups: list[list[Segment]] = []
    for segment in segments:
        if seen[segment.passage] == len(groups):
            groups.append([])
        groups[seen[segment.passage]].append(segment)
        seen[segment.passage] += 1
    return groups
