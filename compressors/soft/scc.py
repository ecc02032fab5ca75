"""SCC: a wrapper that keeps names, numbers and dates as text, and compresses what lies between them with another method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Passages, SoftCompressor
from ..core.config import CompressorConfig, check_ratio, setting
from ..core.passage import Interface
from ..fidelity.questions import find_spans
from ..reader.reader import Reader
from ..registry import make_compressor, register_compressor
from ..slots.segments import slots_for

KEY_KINDS = ("number", "date", "name", "title")  # the first ones come first if not all fit
_STEP = 0.25  # ratios of gaps are multiples of it, so that passages are compressed in few batches


@dataclass
class SCCConfig(CompressorConfig):
    """Settings of selective compression."""

    method: ClassVar[str] = "scc"
    title: ClassVar[str] = "SCC"

    inner: str = setting("", "method that compresses what is not kept: any method to soft tokens")
    ratio: float = setting(4.0, "compression ratio if none is asked for; kept tokens count as slots")
    keep_share: float = setting(0.5, "largest share of the slots for tokens that are kept, from 0 to 1")
    inner_settings: Mapping[str, Any] = field(
        default_factory=dict, kw_only=True, metadata={"help": "settings of the inner method"}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.inner, str) or not self.inner or self.inner == self.method:
            raise ValueError(f"inner must be the name of another method to soft tokens, got {self.inner!r}.")
        check_ratio(self.ratio)
        if not 0 <= self.keep_share <= 1:
            raise ValueError(f"keep_share must lie in [0, 1], got {self.keep_share!r}.")
        if not isinstance(self.inner_settings, Mapping):
            raise ValueError(f"inner_settings must hold names and values, got {self.inner_settings!r}.")


@register_compressor
class SCCCompressor(SoftCompressor):
    """Concise and precise compression (SCC, arXiv 2407.02043) as a wrapper of any method to soft tokens.

    A passage is cut into key spans, which stay as they are (their own token embeddings), and the gaps between them, which the
    inner method compresses, each as a passage of its own. The compressed passage holds both in the original order.

    Key spans are numbers, dates, names and titles, found by rule (`find_spans`), each wording once. They are kept, numbers
    first, while they and a slot for each gap take at most ``keep_share`` of the slots. The gaps share the rest.

    Differences from the paper, whose code is not published: there the key blocks are tool and parameter names, a plain block
    gets a fixed number of slots, and the reader is trained too. Train this with the recipe of the inner method.

    Attributes:
        inner: the inner compressor; its parameters are this one's.

    Raises:
        ValueError: if the inner method does not give soft tokens.
    """

    config_class = SCCConfig
    interface: ClassVar[Interface] = "embeds"
    config: SCCConfig

    def __init__(self, config: SCCConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        inner = make_compressor(config.inner, reader, **config.inner_settings)
        if not isinstance(inner, SoftCompressor) or inner.interface != "embeds":
            raise ValueError(f"inner must be a method to soft tokens, but {config.inner} gives {inner.interface}.")
        self.inner = inner
        self.config = replace(config, inner_settings=inner.config.to_dict())  # with what it filled in
        self.query_aware = inner.query_aware
        if inner.reader is not reader:
            self.adapt_reader(inner.reader)

    def identity_parts(self) -> list[Any]:
        """The base reader, and what the inner method's slots depend on."""
        return [self.base_reader.fingerprint, self.inner.identity_parts()]

    def encoder_body(self) -> Any:
        return self.inner.encoder_body()

    def encode_passages(self, passages: Passages, ratio: float | None) -> Sequence[Tensor]:
        """Token embeddings of key spans and slots of the gaps, in order."""
        reader = self.base_reader
        offsets = [reader.tokenize_with_offsets(text)[1] for text in passages.texts]
        cuts = [self.cut(*read, ratio or self.config.ratio) for read in zip(passages.texts, offsets)]
        made: dict[tuple[int, int], Tensor] = {}
        for gap_ratio in sorted({gap for _, gap in cuts}):
            places = [(i, j) for i, (parts, gap) in enumerate(cuts) if gap == gap_ratio for j in range(len(parts))]
            places = [(i, j) for i, j in places if not cuts[i][0][j][2]]
            if places:
                spans = [(i, *cuts[i][0][j][:2]) for i, j in places]
                texts = [passages.texts[i][offsets[i][a][0] : offsets[i][b - 1][1]] for i, a, b in spans]
                ids, queries = [passages.ids[i][a:b] for i, a, b in spans], [passages.queries[i] for i, _, _ in spans]
                made |= dict(zip(places, self.inner.encode_passages(Passages(texts, queries, ids), gap_ratio)))
        out = []
        for i, (parts, _) in enumerate(cuts):
            rows = [torch.zeros(0, reader.width, device=reader.device)]
            for j, (start, end, kept) in enumerate(parts):
                tokens = torch.tensor(passages.ids[i][start:end], device=reader.device)
                rows.append(reader.embed(tokens).detach() if kept else made[i, j].to(reader.device))
            out.append(torch.cat(rows))
        return out

    def cut(
        self, text: str, offsets: Sequence[tuple[int, int]], ratio: float
    ) -> tuple[list[tuple[int, int, bool]], float]:
        """Parts of a passage as ``(first token, last token + 1, kept)``, in order, and the ratio of those not kept."""
        n, budget = len(offsets), slots_for(len(offsets), ratio, len(offsets))
        kept: list[tuple[int, int]] = []
        for start, end in self.key_spans(text, offsets):
            if sum(b - a for a, b in kept) + end - start + len(kept) + 2 <= self.config.keep_share * budget:
                kept.append((start, end))
        if not kept:
            return [(0, n, False)] * bool(n), ratio
        parts: list[tuple[int, int, bool]] = []
        at = 0
        for start, end in sorted(kept):
            start = max(start, at)
            parts += [(at, start, False)] * (start > at) + [(start, end, True)] * (end > start)
            at = max(at, end)
        parts += [(at, n, False)] * (n > at)
        gaps = [end - start for start, end, key in parts if not key]
        room = budget - (n - sum(gaps))
        for slots in range(room, 0, -1):  # a gap's slots are rounded up
            gap_ratio = max(math.ceil(sum(gaps) / slots / _STEP) * _STEP, 1.0)
            if sum(slots_for(gap, gap_ratio, gap) for gap in gaps) <= room:
                return parts, gap_ratio
        return parts, float(max(n, 1))

    @staticmethod
    def key_spans(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Tokens ``(first, last + 1)`` of the key spans, the most important first."""
        found, seen = [], set()
        for span in sorted(find_spans(text), key=lambda s: (*KEY_KINDS, s.kind).index(s.kind)):
            wording = text[span.start : span.end]
            if span.kind in KEY_KINDS and wording not in seen:
                seen.add(wording)
                tokens = [i for i, (a, b) in enumerate(offsets) if a < span.end and b > span.start]
                found += [(tokens[0], tokens[-1] + 1)] if tokens else []
        return found
