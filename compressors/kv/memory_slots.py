"""What the methods share whose slots are keys and values: settings, segments, and the way from texts to KV passages."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base import Query, SoftCompressor
from ..core.config import CompressorConfig, check_choices, check_counts, check_ratio
from ..core.passage import CompressedPassage, Interface, cut_nested
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import Twin
from ..reader.reader import Reader
from ..slots.nested import NestedSettings, NestedSlot, nest
from ..slots.question import QuerySettings, question_ids
from ..slots.segment_overlap import OverlapSettings, in_front, overlaps
from ..slots.segments import equal_lengths, memory_row, middles, slots_for, tokens_of_slots
from .encode import KVSlots, check_movable, encode_kv, kv_shapes


@dataclass
class KVSlotConfig(CompressorConfig, LoRASettings, NestedSettings, QuerySettings, OverlapSettings):
    """Settings that methods with keys and values as slots share."""

    most_field: ClassVar[str]  # the field that says how many slots a segment gets at most

    ratio: float | None = field(
        default=None,
        metadata={"help": "compression ratio where none is asked for; null: as many slots as there may be"},
    )
    fixed_slots: bool = field(
        default=False,
        metadata={"help": "every segment gets all its slots, as in the paper, even where that makes it longer"},
    )
    segment_tokens: int | None = field(
        default=None, metadata={"help": "longest segment; default: what the slots allow"}
    )
    positions: Literal["append", "spread"] = field(
        default="append",
        metadata={
            "help": "position ids of the slots: 'append' counts on after the segment (the paper), 'spread' puts each at the "
            "middle of the tokens that it stands for"
        },
    )
    residual: bool = field(
        default=False,
        metadata={
            "help": "add to every memory token's embedding the pooled embeddings of the tokens that it stands for, so that "
            "training begins with slots that can be read; not in the papers"
        },
    )
    bos: bool = field(
        default=True, metadata={"help": "put the tokenizer's BOS, if it has one, in front of every segment"}
    )
    as_prompt: bool = field(
        default=False,
        metadata={
            "help": "tokenise a passage as the start of a prompt, where SentencePiece tokenizers put a space in front, as in "
            "the authors' code; default: as it stands inside a prompt"
        },
    )

    @property
    def most_slots(self) -> int:
        """Slots that a segment gets at most."""
        return getattr(self, self.most_field)

    def __post_init__(self) -> None:
        check_counts(self, {self.most_field: 1, "segment_tokens": 1}, optional=("segment_tokens",))
        if self.ratio is not None:
            check_ratio(self.ratio)
        check_choices(self, {"positions": ("append", "spread")})
        self.check_lora()
        self.check_nested()
        self.check_query()
        self.check_overlap()


class KVSlotCompressor(SoftCompressor):
    """What the methods share whose slots are a tuned reader's keys and values at memory tokens.

    Each segment of a passage is read on its own as ``[BOS][segment][memory tokens]``; the slots of all segments follow one
    another. A subclass makes its ``encoder`` (a twin of the reader) and says what its memory tokens are. With
    ``query_aware=True`` a segment is read behind its question, with ``segment_overlap`` behind so many of the tokens in front
    of it; with ``nested=True`` the slots are made once, at the config's ratio, and any higher ratio is a part of them
    (`nutgraf.compressors.slots.nested`).

    Attributes:
        batch_positions: positions that one forward pass of the encoder may take (memory against speed; changes no result).
        slot_shapes: ``(kv_heads, width of a key, width of a value)`` of every layer.

    Raises:
        ValueError: if the reader's keys cannot move (GPT-2, OPT, ALiBi), or it has too few positions for the slots.
    """

    interface: ClassVar[Interface] = "kv"
    config: KVSlotConfig
    encoder: Twin

    def __init__(self, config: KVSlotConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        check_movable(reader)
        self.batch_positions = 16384
        self.slot_shapes = kv_shapes(reader)
        self._longest_segment(config.ratio, overlap=config.segment_overlap)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one slot's keys and values in the reader's dtype; its position takes 8 more."""
        return self.base_reader.dtype.itemsize * sum(heads * (k + v) for heads, k, v in self.slot_shapes)

    def identity_parts(self) -> list[Any]:
        """The slots depend on the base weights too."""
        return [self.base_reader.fingerprint]

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Raises ``ValueError``: what is wanted here is the cache, which checkpointing drops."""
        raise ValueError(
            f"{type(self).__name__} keeps keys and values, which transformers drops while it checkpoints gradients; set "
            "gradient_checkpointing: false, and lower batch_size or batch_positions to save memory."
        )

    @abstractmethod
    def memory_rows(self) -> Tensor:
        """``[most slots, width]`` embeddings of the memory tokens, differentiable."""

    def declared_positions(self, computed: Tensor) -> Tensor:
        """The positions that a passage says its keys were computed at, from which the reader moves them."""
        return computed

    def memory_inputs(
        self,
        pieces: Sequence[Sequence[int]],
        slots: Sequence[int],
        nests: Sequence[list[NestedSlot] | None] | None = None,
    ) -> Tensor:
        """``[all slots, width]``: what is put in for the memory tokens of segments, differentiable.

        Args:
            pieces: token ids of each segment, BOS left out.
            slots: slots of each segment.
            nests: the windows of each segment's slots, where they are nested.
        """
        rows = self.memory_rows()
        which = [k for n, nested in zip(slots, nests or [None] * len(slots)) for k in memory_row(n, nested)]
        found = rows[torch.tensor(which, dtype=torch.long)]
        return found + self._pooled(pieces, slots, nests).to(found.device) if self.config.residual else found

    def _pooled(
        self,
        pieces: Sequence[Sequence[int]],
        slots: Sequence[int],
        nests: Sequence[list[NestedSlot] | None] | None,
    ) -> Tensor:
        """``[all slots, width]`` float32: each slot's own run of token embeddings, summed over sqrt(its length)."""
        embed = self.encoder.lm.get_input_embeddings()
        which, where = tokens_of_slots([len(piece) for piece in pieces], slots, nests)
        where = where.to(embed.weight.device)
        ids = torch.tensor([i for piece in pieces for i in piece], dtype=torch.long)[which]
        tokens = embed(ids.to(where.device)).float()
        total = tokens.new_zeros(sum(slots), tokens.shape[1]).index_add(0, where, tokens)
        return total / torch.bincount(where, minlength=sum(slots)).clamp(min=1).sqrt()[:, None]

    # -- segments --------------------------------------------------------------------------------------------------

    def _longest_segment(self, ratio: float | None, question_tokens: int = 0, overlap: int = 0) -> int | None:
        config, reader = self.config, self.base_reader
        limits = [reader.max_positions, reader.kv_placement.max_length]
        room = min((n for n in limits if n is not None), default=None)
        if room is not None:
            room -= config.most_slots + (len(reader.bos_ids) if config.bos else 0) + question_tokens + overlap
            if room < 1:
                words, advice = in_front(question_tokens, overlap)
                raise ValueError(
                    f"{' and '.join([f'{config.most_slots} slots', *words])} leave no room for a passage in the positions of "
                    f"{reader.name!r}; {' or '.join([f'choose a smaller {config.most_field}', *advice])}."
                )
        asked = None if ratio is None else math.floor(config.most_slots * ratio + 1e-6)
        return min((n for n in (room, asked, config.segment_tokens) if n is not None), default=None)

    def segments(self, n_tokens: int, ratio: float | None = None, question_tokens: int = 0) -> list[tuple[int, int]]:
        """How a passage is cut: ``(tokens, slots)`` of each segment, in order. Segments are equally long, but for the last.

        Nested slots are always made at the config's ratio.
        """
        if not n_tokens:
            return []
        ratio = self.config.ratio if ratio is None or self.config.nested else float(ratio)
        longest = self._longest_segment(ratio, question_tokens) or n_tokens
        if n_tokens > longest:
            longest = self._longest_segment(ratio, question_tokens, self.config.segment_overlap) or longest
        lengths = equal_lengths(n_tokens, longest)
        most = self.config.most_slots
        if self.config.fixed_slots:
            return [(n, most) for n in lengths]
        return [(n, slots_for(n, ratio or 1.0, most)) for n in lengths]

    def _memory_positions(self, start: int, tokens: int, slots: int, nested: list[NestedSlot] | None) -> Tensor:
        if self.config.positions == "append":
            return torch.arange(start + tokens, start + tokens + slots)
        return start + middles(tokens, slots, nested)

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """Compresses passages, differentiably in what is tuned and in the memory embeddings.

        Args:
            texts: the passages.
            query: what is asked of each passage (``query_aware=True``; without a question a passage is read alone);
                otherwise ignored: the slots serve all questions.
            ratio: any real number of at least 1; ``None``: the config's. Nested slots: not below the config's.
            vectors: ignored.
        """
        texts, prompts = self._check_texts(texts), self.base_reader.prompts
        questions = question_ids(self.config, prompts, self._check_query(query, len(texts)))
        return self.encode_ids(prompts.encode_batch([(t, self.config.as_prompt) for t in texts]), ratio, questions)

    def padded(self, piece: list[int]) -> list[int]:
        """A segment's ids as they are read; a method may pad them."""
        return piece

    def encode_ids(
        self,
        ids: Sequence[Sequence[int]],
        ratio: float | None = None,
        questions: Sequence[Sequence[int]] | None = None,
    ) -> list[CompressedPassage]:
        """`encode` for passages given as token ids, BOS not among them, each with the ids that are read in front of it."""
        bos = list(self.base_reader.bos_ids) if self.config.bos else []
        fronts = questions or [()] * len(ids)
        pieces: list[list[int]] = []
        heads: list[list[int]] = []
        nests: list[list[NestedSlot] | None] = []
        cuts = [
            self.segments(len(passage), ratio, len(question)) for passage, question in zip(ids, fronts, strict=True)
        ]
        for passage, question, cut in zip(ids, fronts, cuts):
            ends = accumulate(n for n, _ in cut)
            pieces += [self.padded(list(passage[end - n : end])) for (n, _), end in zip(cut, ends)]
            again = overlaps(passage, [n for n, _ in cut], self.config.segment_overlap)
            heads += [[*bos, *question, *lead] for lead in again]
            nests += [nest(*part) for part in self.config.nest_of(cut) or ()] or [None] * len(cut)
        slots = [n for cut in cuts for _, n in cut]
        parts = list(zip(heads, pieces, slots, nests))
        found = iter(
            encode_kv(
                self.encoder,
                [head + piece for head, piece, _, _ in parts],
                slots,
                self.memory_inputs(pieces, slots, nests),
                [self._memory_positions(len(head), len(piece), n, nested) for head, piece, n, nested in parts],
                budget=self.batch_positions,
            )
        )
        origin = self.origin
        reader = self.reader.fingerprint
        asked = self.config.ratio if ratio is None else float(ratio)
        info = {"method": self.config.method, "ratio_asked": asked, **self.base_reader.identity_card.runs_as}
        out = []
        for passage, cut in zip(ids, cuts):
            keys, values, positions = self._joined([next(found) for _ in cut])
            whole = CompressedPassage(
                "kv",
                len(passage),
                origin,
                reader,
                keys=keys,
                values=values,
                positions=self.declared_positions(positions),
                info=dict(info),
            )
            out.append(cut_nested(whole, self.config, cut, ratio))
        return out

    def _joined(self, parts: Sequence[KVSlots]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """The slots of a passage's segments, one after another, in the reader's dtype."""
        dtype, device = self.base_reader.dtype, self.base_reader.device
        if not parts:
            keys = tuple(torch.zeros(heads, 0, k, dtype=dtype, device=device) for heads, k, _ in self.slot_shapes)
            values = tuple(torch.zeros(heads, 0, v, dtype=dtype, device=device) for heads, _, v in self.slot_shapes)
            return keys, values, torch.zeros(0, dtype=torch.long)
        layers = range(len(self.slot_shapes))
        keys = tuple(torch.cat([part.keys[i] for part in parts], dim=1).to(dtype) for i in layers)
        values = tuple(torch.cat([part.values[i] for part in parts], dim=1).to(dtype) for i in layers)
        return keys, values, torch.cat([part.positions for part in parts])
