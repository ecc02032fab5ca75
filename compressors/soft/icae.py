"""ICAE: the reader plus LoRA reads the passage and some memory tokens; what it makes of those is the compressed passage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base import Query, SoftCompressor
from ..core.batching import SoftSequence, soft_batches
from ..core.passage import CompressedPassage, Interface, cut_nested
from ..encoders.lora import tuned_reader
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.nested import NestedSlot, nest
from ..slots.pooling import GatedPool
from ..slots.question import question_ids
from ..slots.segment_overlap import in_front, overlaps
from ..slots.segments import equal_lengths, memory_row, middles, slots_for
from .icae_config import ICAEConfig as ICAEConfig

TASKS = ("ae", "lm", "ft")
_RESIDUAL_START = 0.1  # share of the encoder's part at the start, beside the pooled embeddings
_PROBE_TOKENS = 32  # length of the random text on which the output scale is matched


@register_compressor
class ICAECompressor(SoftCompressor):
    """In-context autoencoder (ICAE, arXiv 2307.06945).

    A passage of L tokens is cut into ``n = ceil(L / (mem_size * ratio))`` segments of ``ceil(L / n)`` tokens, the last one
    shorter. Each is read on its own by the reader plus LoRA as ``[BOS][segment][memory tokens]``; the last hidden states
    (after the final norm) at the memory tokens are its slots, and the slots of all segments follow one another. The plain
    reader, without LoRA, reads them.

    Beyond the paper: a segment of S tokens gets ``ceil(S / ratio)`` slots, the first of the memory tokens, so that a short
    passage never grows and one checkpoint serves every ratio (train it on random ratios); the slots start on the scale of
    the reader's embeddings; memory tokens start as embeddings of random tokens; and their position ids are spread over the
    segment, so that a memory token attends to what it stands for from nearby (arXiv 2409.14364), which rotary attention
    learns much sooner than a distance that differs from slot to slot; and (``residual``) every slot starts as
    the pooled embeddings of its tokens under a gate that learns which of them matter (`GatedPool`), so that training begins
    with slots that can be read and the encoder learns what to add. ``fixed_slots=True`` is the paper's
    behaviour, in which every segment gets ``mem_size`` slots and a passage of 20 tokens may become 128.

    With ``nested=True`` the slots are made once, at the config's ratio, over windows of several widths (see
    `nutgraf.compressors.slots.nested`, which says why); any higher ratio is a part of them, here as in a store
    (`CompressedPassage.first`). With ``query_aware=True`` every segment is read behind the question, and with
    ``segment_overlap`` behind so many of the tokens in front of it.

    Args:
        config: the settings.
        reader: the reader; encoder and decoder share its parameters.

    Attributes:
        encoder: the reader's `LoRATwin`.
        memory: ``[mem_size, width]`` memory embeddings.
        reader_twin: the `LoRATwin` that ``reader`` reads with (``tune_reader=True`` only); the paper's reader is frozen.
        special: ``[3, width]`` embeddings of [AE], [LM] and [FT] (``special_tokens=True`` only).
        batch_positions: positions that one forward pass of the encoder may take (memory against speed; changes no result).

    Raises:
        ValueError: if the reader cannot take its own hidden states as embeddings, or has too few positions.
    """

    config_class = ICAEConfig
    interface: ClassVar[Interface] = "embeds"
    config: ICAEConfig

    def __init__(self, config: ICAEConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.batch_positions = 16384
        self._longest_segment(config.ratio, overlap=config.segment_overlap)
        self.encoder = LoRATwin(reader.model, **config.lora)
        rows = torch.randperm(reader.vocab_size)[: config.mem_size + len(TASKS)]
        rows = rows[torch.arange(config.mem_size + len(TASKS)) % len(rows)].to(reader.device)
        with torch.no_grad():
            start = reader.embed(rows).float()
        start = start * (reader.embedding_norm / start.norm(dim=-1, keepdim=True).clamp(min=1e-6))
        self.memory = nn.Parameter(start[: config.mem_size].clone())
        self.special = nn.Parameter(start[config.mem_size :].clone()) if config.special_tokens else None
        self.pool = GatedPool(reader) if config.residual else None
        factor = self._matching_factor() * (_RESIDUAL_START if config.residual else 1.0)
        self.log_scale = self.linear = None
        if config.projector == "scale":
            self.log_scale = nn.Parameter(torch.tensor(math.log(factor), device=reader.device))
        if config.projector == "linear":
            self.linear = nn.Linear(reader.width, reader.width, device=reader.device)
            nn.init.zeros_(self.linear.bias)
            with torch.no_grad():
                self.linear.weight.copy_(factor * torch.eye(reader.width))
        self.reader_twin = tuned_reader(self)

    def identity_parts(self) -> list[Any]:
        """The slots depend on the base weights too."""
        return [self.base_reader.fingerprint]

    @torch.no_grad()
    def _matching_factor(self) -> float:
        """What brings hidden states at the memory tokens to the mean norm of the reader's embeddings."""
        n = min(_PROBE_TOKENS, self._longest_segment(self.config.ratio))
        ids = torch.randint(self.reader.vocab_size, (n,), generator=torch.Generator().manual_seed(0))
        hidden = self._forward([ids.tolist()], [self.config.mem_size])[0]
        return self.reader.embedding_norm / max(float(hidden.float().norm(dim=-1).mean()), 1e-6)

    # -- segments --------------------------------------------------------------------------------------------------

    def _longest_segment(self, ratio: float, question_tokens: int = 0, overlap: int = 0) -> int:
        config, reader = self.config, self.reader
        longest = math.floor(config.mem_size * ratio + 1e-6)
        if config.segment_tokens is not None:
            longest = min(longest, config.segment_tokens)
        if reader.max_positions is not None:
            front = len(reader.bos_ids) + question_tokens + overlap
            longest = min(longest, reader.max_positions - config.mem_size - front)
        if longest < 1:
            words, advice = in_front(question_tokens, overlap)
            raise ValueError(
                f"{' and '.join([f'{config.mem_size} memory tokens', *words])} leave no room for a passage in the "
                f"{reader.max_positions} positions of {reader.name!r}; "
                f"{' or '.join(['choose a smaller mem_size', *advice])}."
            )
        return longest

    def segments(self, n_tokens: int, ratio: float | None = None, question_tokens: int = 0) -> list[tuple[int, int]]:
        """How a passage is cut: ``(tokens, slots)`` of each segment, in order; nested slots always at the config's ratio."""
        ratio = self.config.ratio if ratio is None or self.config.nested else float(ratio)
        if n_tokens and self.config.truncate is not None:
            return [(min(n_tokens, self.config.truncate), self.config.mem_size)]
        most = self.config.mem_size
        longest = self._longest_segment(ratio, question_tokens)
        if n_tokens > longest:
            longest = self._longest_segment(ratio, question_tokens, self.config.segment_overlap)
        lengths = equal_lengths(n_tokens, longest)
        return [(n, most if self.config.fixed_slots else slots_for(n, ratio, most)) for n in lengths]

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str],
        query: Query = None,
        ratio: float | None = None,
        vectors: Sequence[Any] | None = None,
    ) -> list[CompressedPassage]:
        """Compresses passages, differentiably in the LoRA matrices, the memory embeddings and the projector.

        Args:
            texts: the passages.
            query: what is asked of each passage (``query_aware=True``; without a question a passage is read alone);
                otherwise ignored: the slots serve all questions.
            ratio: any real number of at least 1; ``None``: the config's. Nested slots: not below the config's.
            vectors: ignored.
        """
        texts, prompts = self._check_texts(texts), self.reader.prompts
        questions = question_ids(self.config, prompts, self._check_query(query, len(texts)))
        return self.encode_ids(prompts.encode_batch([(t, self.config.as_prompt) for t in texts]), ratio, questions)

    def encode_ids(
        self,
        ids: Sequence[Sequence[int]],
        ratio: float | None = None,
        questions: Sequence[Sequence[int]] | None = None,
    ) -> list[CompressedPassage]:
        """`encode` for passages given as token ids, BOS not among them, each with the ids that are read in front of it."""
        pieces: list[list[int]] = []
        slots: list[int] = []
        heads: list[Sequence[int]] = []
        nests: list[list[NestedSlot] | None] = []
        cuts: list[list[tuple[int, int]]] = []
        bos = self.reader.bos_ids if self.config.bos and self.config.bos_once else []
        for tokens, question in zip(ids, questions or [()] * len(ids), strict=True):
            passage = [*bos, *tokens] if len(tokens) else []
            cut = self.segments(len(passage), ratio, len(question))
            if (read := sum(length for length, _ in cut)) < len(passage):
                warnings.warn(
                    f"A passage of {len(passage)} tokens was cut to its first {read}, as ICAE v1 does (truncate="
                    f"{self.config.truncate}); split longer passages, or set truncate to None.",
                    stacklevel=2,
                )
            ends = accumulate(length for length, _ in cut)
            pieces += [passage[end - length : end] for (length, _), end in zip(cut, ends)]
            slots += [n for _, n in cut]
            lengths = [length for length, _ in cut]
            heads += [[*question, *again] for again in overlaps(passage, lengths, self.config.segment_overlap)]
            nests += [nest(*part) for part in self.config.nest_of(cut) or ()] or [None] * len(cut)
            cuts.append(cut)
        found = (
            torch.cat(self._forward(pieces, slots, heads, nests))
            if pieces
            else self.memory.new_zeros(0, self.reader.width)
        )
        found = self._project(found)
        if self.pool is not None and pieces:
            found = found + self.pool(pieces, slots, nests).to(found.device)
        owned = [sum(n for _, n in cut) for cut in cuts]
        rows = found.to(self.reader.device, self.reader.dtype).split(owned) if ids else ()
        origin = self.origin
        info = {"method": "icae", "ratio_asked": float(ratio or self.config.ratio), **self.reader.identity_card.runs_as}
        out = [
            CompressedPassage("embeds", len(p), origin, self.reader.fingerprint, embeds=e, info=dict(info))
            for p, e in zip(ids, rows)
        ]
        return [cut_nested(p, self.config, cut, ratio) for p, cut in zip(out, cuts)]

    def task_marker(self, task: str) -> CompressedPassage | None:
        """The one-slot passage that tells the reader its task, or ``None`` without ``special_tokens``.

        Args:
            task: ``"ae"`` (repeat the passage), ``"lm"`` (continue it) or ``"ft"`` (follow the instruction after it).
        """
        if task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, got {task!r}.")
        if self.special is None:
            return None
        row = TASKS.index(task)
        embeds = self.special[row : row + 1].to(self.reader.dtype)
        return CompressedPassage("embeds", 0, self.origin, self.reader.fingerprint, embeds=embeds, info={"task": task})

    def _forward(
        self,
        pieces: Sequence[list[int]],
        slots: Sequence[int],
        heads: Sequence[Sequence[int]] | None = None,
        nests: Sequence[list[NestedSlot] | None] | None = None,
    ) -> list[Tensor]:
        """For each segment's ids the hidden states ``[slots, width]`` at its memory tokens, in batches of like length."""
        reader, nests = self.reader, nests or [None] * len(pieces)
        bos = list(reader.bos_ids) if self.config.bos and not self.config.bos_once else []
        which = [k for n, nested in zip(slots, nests) for k in memory_row(n, nested)]
        rows = self.memory[torch.tensor(which, dtype=torch.long)].split(list(slots))
        sequences = []
        for piece, n, head, nested, memory in zip(pieces, slots, heads or [()] * len(pieces), nests, rows):
            first = [*bos, *head]
            positions = len(first) + middles(len(piece), n, nested) if self.config.positions == "spread" else None
            sequences.append(SoftSequence.with_memory(first + piece, memory, positions))
        out: dict[int, Tensor] = {}
        for batch in soft_batches(sequences, reader.embed, reader.device, budget=self.batch_positions):
            hidden = self.encoder(batch.embeds, batch.mask, batch.positions)
            if hidden.shape[-1] != reader.width:
                raise ValueError(
                    f"{reader.name!r} has hidden states of width {hidden.shape[-1]} and embeddings of width {reader.width}; "
                    "ICAE needs both alike."
                )
            out.update((i, states[len(states) - slots[i] :]) for i, states in batch.unpadded(hidden))
        return [out[i] for i in range(len(pieces))]

    def _project(self, hidden: Tensor) -> Tensor:
        if self.linear is not None:
            return self.linear(hidden.to(self.linear.weight.device, self.linear.weight.dtype))
        if self.log_scale is not None:
            return hidden.to(self.log_scale.device, self.log_scale.dtype) * self.log_scale.exp()
        return hidden
