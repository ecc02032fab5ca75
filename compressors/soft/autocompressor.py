"""AutoCompressor: a passage is read segment by segment, the summary vectors of the segments so far in front of the next."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base import Query, SoftCompressor
from ..core.batching import SoftSequence, soft_batches
from ..core.passage import CompressedPassage, Interface
from ..encoders.lora_twin import Twin, tune
from ..encoders.tuned_reader import AdaptedReader
from ..reader.kv import position_arguments
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.segment_plan import SegmentPlan
from .autocompressor_config import AutoCompressorConfig
from .segment_training import segment_losses

_PROBE_TOKENS = 32  # length of the random text on which the output scale is matched


@register_compressor
class AutoCompressor(SoftCompressor):
    """AutoCompressor (Chevalier et al., arXiv 2305.14788).

    A passage of L tokens is cut into ``n = ceil(L / (summary_length * ratio))`` segments of ``ceil(L / n)`` tokens, the last
    one shorter (``equal_segments=False``: the others as long as may be). The tuned model reads one after the other as
    ``[BOS][soft prompt][segment][summary tokens]``; its last hidden states (after the final norm) at the summary tokens are
    the segment's summary vectors. The soft prompt of a segment is all summary vectors so far (``accumulate_summary``), or
    those of the segment before it, and what is left after the last segment are the slots. The same tuned model reads them:
    use ``compressor.reader``.

    Beyond the paper: a segment of S tokens gets ``ceil(S / ratio)`` summary vectors, the first of the summary tokens, so that
    a short passage never grows and one checkpoint serves every ratio (train it on random ratios); summary vectors are
    brought to the scale of the reader's embeddings; BOS stands in front of every pass, as it does where the reader reads the
    slots; and the reader may stay as it is (``adapt_reader=False``). ``fixed_slots=True`` is the paper's behaviour, in which
    a passage of 20 tokens may become 50 slots.

    With ``positions="paper"`` slots and summary tokens take row 1 of OPT's position table (its padding row, position id
    -1) and the tokens of each segment rows 2, 3, ..., and so they do where a `Reader` reads them.

    Training: the objective ``segments`` (`segment_losses`), beside those that read the slots.

    Args:
        config: the settings.
        reader: the reader that the model is tuned from. With ``tuning="none"`` only the summary tokens (and the scale)
            train, and the reader is not adapted.

    Attributes:
        encoder: the reader's `LoRATwin` or `FullTwin`, or ``None`` (``tuning="none"``).
        plan: how passages are cut.
        summary: ``[summary_length, width]`` summary embeddings; they start as the embedding of the end-of-sequence token.
        log_scale: logarithm of the output factor (``scale="matched"`` only).
        batch_positions: positions that one forward pass may take (memory against speed; changes no result).

    Raises:
        ValueError: if the reader cannot take its own hidden states as embeddings, has too few positions, or has positions
            that ``positions="paper"`` has no rule for.
    """

    config_class = AutoCompressorConfig
    interface: ClassVar[Interface] = "embeds"
    config: AutoCompressorConfig

    def __init__(self, config: AutoCompressorConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.batch_positions = 16384
        self.bos: list[int] = list(reader.bos_ids) if config.bos else []
        kind = reader.model.config.get_text_config().model_type
        self._skips = config.positions == "paper" and kind == "opt"
        self.plan = SegmentPlan(config, reader, len(self.bos), counts_slots=not self._skips)
        if config.positions == "paper" and not self._skips and not hasattr(reader.model.get_decoder(), "rotary_emb"):
            raise ValueError(
                f"positions='paper' knows rotary models and OPT, and {reader.name!r} is a {kind}; use positions='count'."
            )
        self.encoder: Twin | None = None
        if config.tuning != "none":
            self.encoder = tune(reader.model, config.tuning, **config.lora)
            if config.adapt_reader:
                self.adapt_reader(AdaptedReader(reader, self.encoder))
        with torch.no_grad():
            rows = range(reader.vocab_size) if reader.eos_id is None else [reader.eos_id]
            start = reader.embed(torch.tensor(list(rows), device=reader.device)).float().mean(dim=0)
        self.summary = nn.Parameter(start.repeat(config.summary_length, 1))
        self.log_scale = None
        if config.scale == "matched":
            self.log_scale = nn.Parameter(torch.tensor(math.log(self._matching_factor()), device=reader.device))

    @property
    def lm(self) -> Any:
        """The causal LM that makes the summaries: the tuned one, or the reader's own."""
        return self.base_reader.model if self.encoder is None else self.encoder.lm

    @property
    def reads_itself(self) -> bool:
        """Whether the model that makes the summaries is also the one that reads them."""
        return self.reader.model is self.lm

    def identity_parts(self) -> list[Any]:
        """The slots depend on the base weights too."""
        return [self.base_reader.fingerprint]

    @classmethod
    def own_objectives(cls) -> dict[str, Callable[..., tuple[Tensor, int]]]:
        """``segments``: language modelling over the segments of documents."""
        return {"segments": cls.segment_losses}

    def segment_losses(
        self, texts: Sequence[str], rng: random.Random, ratio: float | None = None
    ) -> tuple[Tensor, int]:
        """The sum of the token losses over all segments of documents, and their number; see `segment_losses`."""
        return segment_losses(self, self._check_texts(texts), rng, ratio)

    @torch.no_grad()
    def _matching_factor(self) -> float:
        """What brings hidden states at the summary tokens to the mean norm of the reader's embeddings."""
        n = min(_PROBE_TOKENS, self.plan.longest(self.config.ratio))
        ids = torch.randint(self.base_reader.vocab_size, (n,), generator=torch.Generator().manual_seed(0)).tolist()
        slots = self.config.summary_length
        (row,) = self.read(self.lm, [self.no_slots()], [ids], [slots])
        norm = float(row[-slots:].float().norm(dim=-1).mean())
        return self.base_reader.embedding_norm / max(norm, 1e-6)

    def segments(self, n_tokens: int, ratio: float | None = None) -> list[tuple[int, int]]:
        """How a passage is cut: ``(tokens, summary vectors)`` of each segment, in order.

        Raises:
            ValueError: if the summaries so far and a segment do not fit the reader's positions.
        """
        return self.plan.cut(n_tokens, self.config.ratio if ratio is None else float(ratio))

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """Compresses passages, differentiably in the tuned weights and the summary embeddings, through all segments.

        All first segments are read in one pass, then all second ones, and so on.

        Args:
            texts: the passages.
            query: ignored: the slots serve all questions.
            ratio: any real number of at least 1; ``None``: the config's. With ``fixed_slots`` it sets the segments' length.
            vectors: ignored.

        Raises:
            ValueError: if a passage's summaries and a segment do not fit the reader's positions.
        """
        return self.encode_ids(self.tokenize(self._check_texts(texts)), ratio)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of passages, without special tokens."""
        return self.base_reader.prompts.encode_batch([(text, self.config.as_prompt) for text in texts]) if texts else []

    def encode_ids(
        self,
        ids: Sequence[Sequence[int]],
        ratio: float | None = None,
        segment_lengths: Sequence[Sequence[int] | None] | None = None,
    ) -> list[CompressedPassage]:
        """`encode` for passages given as token ids.

        Args:
            ids: token ids, without special tokens unless they are meant to be read.
            ratio: as in `encode`.
            segment_lengths: for each passage the lengths of its segments, or ``None`` to cut it as `segments` does.

        Raises:
            ValueError: as `encode`; or if lengths do not add up to their passage.
        """
        if segment_lengths is not None and len(segment_lengths) != len(ids):
            raise ValueError(
                f"segment_lengths must hold one entry a passage: got {len(segment_lengths)} for {len(ids)}."
            )
        passages = [list(passage) for passage in ids]
        asked = self.config.ratio if ratio is None else float(ratio)
        cuts = [
            self.plan.cut(len(passage), asked) if lengths is None else self.plan.given(lengths, len(passage), asked)
            for passage, lengths in zip(passages, segment_lengths or [None] * len(passages))
        ]
        soft = [self.no_slots() for _ in passages]
        starts = [0] * len(passages)
        for step in range(max(map(len, cuts), default=0)):
            who = [i for i, cut in enumerate(cuts) if step < len(cut)]
            pieces = [passages[i][starts[i] : starts[i] + cuts[i][step][0]] for i in who]
            slots = [cuts[i][step][1] for i in who]
            rows = self.read(self.lm, [soft[i] for i in who], pieces, slots)
            for i, row, piece, n in zip(who, rows, pieces, slots):
                soft[i] = self.extend(soft[i], row[-n:])
                starts[i] += len(piece)
        origin = self.origin
        card = self.base_reader.identity_card.runs_as
        info = {"method": "autocompressor", "ratio_asked": asked, **card}
        if self._skips:
            info["takes_positions"] = False
        return [
            CompressedPassage("embeds", len(p), origin, self.reader.fingerprint, embeds=e, info=dict(info))
            for p, e in zip(passages, soft)
        ]

    def no_slots(self) -> Tensor:
        """The soft prompt before the first segment, ``[0, width]``."""
        reader = self.base_reader
        return torch.zeros(0, reader.width, device=reader.device, dtype=reader.dtype)

    def extend(self, soft: Tensor, states: Tensor) -> Tensor:
        """The soft prompt after a segment.

        Args:
            soft: ``[slots, width]``, the one before it.
            states: ``[n, width]`` hidden states at its summary tokens.
        """
        if self.log_scale is not None:
            states = states.to(self.log_scale.device, self.log_scale.dtype) * self.log_scale.exp()
        states = states.to(soft.device, soft.dtype)
        return torch.cat([soft, states]) if self.config.accumulate_summary else states

    def read(self, lm: Any, soft: Sequence[Tensor], pieces: Sequence[list[int]], slots: Sequence[int]) -> list[Tensor]:
        """Last hidden states ``[BOS + soft prompt + piece + slots, hidden]`` of each pass, in batches of like length.

        Args:
            lm: the causal LM that reads.
            soft: ``[n, width]`` soft prompts.
            pieces: token ids of the segments.
            slots: how many summary tokens follow each.
        """
        embed, decoder, device = lm.get_input_embeddings(), lm.get_decoder(), self.base_reader.device
        sequences = [self._sequence(s, piece, n) for s, piece, n in zip(soft, pieces, slots)]
        out: dict[int, Tensor] = {}
        for batch in soft_batches(sequences, embed, device, budget=self.batch_positions):
            hidden = decoder(
                inputs_embeds=batch.embeds,
                attention_mask=batch.mask,
                use_cache=False,
                **position_arguments(decoder, batch.positions),
            ).last_hidden_state
            if hidden.shape[-1] != batch.embeds.shape[-1]:
                raise ValueError(
                    f"{self.base_reader.name!r} has hidden states of width {hidden.shape[-1]} and embeddings of width "
                    f"{batch.embeds.shape[-1]}; AutoCompressor needs both alike."
                )
            out.update(batch.unpadded(hidden))
        return [out[i] for i in range(len(pieces))]

    def _sequence(self, soft: Tensor, piece: list[int], slots: int) -> SoftSequence:
        """``[BOS][soft prompt][segment][summary tokens]``."""
        head = len(self.bos)
        first, last = head + len(soft), head + len(soft) + len(piece)
        ids = [*self.bos, *[0] * len(soft), *piece, *[0] * slots]
        places = [*range(head, first), *range(last, len(ids))]
        positions = None
        if self._skips:
            positions = torch.arange(len(ids))
            positions[first:last] = torch.arange(head, head + len(piece))
            positions[places] = -1
        return SoftSequence(ids, places, torch.cat([soft, self.summary[:slots].to(soft.device)]), positions)
