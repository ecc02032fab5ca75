"""AutoCompressor checkpoints on Llama: the tuned model's usual keys and its summary embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ..core.config import check_choices, setting
from ..core.errors import CheckpointError
from ..core.passage import CompressedPassage
from ..reader.reader import Reader
from ..slots.segments import Segment
from ..soft.autocompressor import AutoCompressor, AutoCompressorConfig
from .layout import Source, load_model_state, peek_json
from .models import build_model, load_tokenizer, make_reader, model_config
from .published import PublishedCompressor, PublishedSettings

_SUMMARY = "embed_summary.weight"
_OWN_SETTINGS = ("summary_length", "accumulate_summary", "segment_gradient_checkpointing")


@dataclass
class PublishedAutoCompressorConfig(PublishedSettings, AutoCompressorConfig):
    """Settings of AutoCompressor as its authors' code runs it."""

    equal_segments: bool = setting(True, "false: every segment but the last is as long as allowed", kw_only=True)
    scale: Literal["matched", "none"] = setting("matched", "'none': raw summary vectors", kw_only=True)
    positions: Literal["count", "paper"] = setting(
        "count", "'paper' equals 'count' for rotary models, the only ones supported", kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"scale": ("matched", "none"), "positions": ("count", "paper")})


class PublishedAutoCompressor(PublishedCompressor, AutoCompressor):
    """AutoCompressor as its authors' code runs it."""

    config_class: ClassVar[type[AutoCompressorConfig]] = PublishedAutoCompressorConfig
    config: PublishedAutoCompressorConfig

    def __init__(self, config: PublishedAutoCompressorConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        if config.positions == "paper" and not hasattr(reader.model.get_decoder(), "rotary_emb"):
            raise ValueError(f"positions='paper' needs a rotary model, and {reader.name!r} is none; use 'count'.")
        if config.scale == "none":
            self.log_scale = None

    def cut(
        self, n_tokens: int, ratio: float | None, question_tokens: int, source_tokens: int
    ) -> list[tuple[int, int]]:
        """Cuts a passage, into full segments and a shorter last one without ``equal_segments``."""
        if self.config.equal_segments:
            return super().cut(n_tokens, ratio, question_tokens, source_tokens)
        longest = self.longest_segment(ratio) or n_tokens
        lengths = [min(longest, n_tokens - start) for start in range(0, n_tokens, longest)]
        return [(n, self.slots_of(n, ratio)) for n in lengths]

    def encode_lengths(
        self, ids: Sequence[int], lengths: Sequence[int], ratio: float | None = None
    ) -> CompressedPassage:
        """Compresses one passage, given as token ids, in segments of given lengths.

        Raises:
            ValueError: if the lengths do not add up to the passage, or exceed the reader's positions.
        """
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths) or sum(lengths) != len(ids):
            raise ValueError(
                f"lengths must be integers of at least 1 that add up to the passage's {len(ids)} tokens, got {list(lengths)}."
            )
        asked = self.ratio_or_default(ratio)
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        pairs = zip(ends, lengths)
        segments = [Segment(list(ids[e - n : e]), self.slots_of(n, asked), self.opening) for e, n in pairs]
        slots = self.join(self.encode_segments(segments) if segments else [])
        return self.package([slots], [len(ids)], ratio)[0]


def recognises(path: Path) -> bool:
    """Whether it has AutoCompressor's layout."""
    return "summary_length" in peek_json(path / "config.json")


def load(
    source: Source,
    *,
    segment_tokens: int = 2048,
    equal_segments: bool = False,
    accumulate_summary: bool | None = None,
) -> PublishedAutoCompressor:
    """Imports AutoCompressor; the checkpoint holds its reader. Its prompt: `nutgraf.compressors.importers.prompts.slots_first`.

    Args:
        source: a Hugging Face folder with ``embed_summary.weight`` among the weights.
        segment_tokens: longest segment; the authors' code leaves it to the caller and trained on up to 2,048.
        equal_segments: cut a passage into equally long segments; default: full segments and a shorter last one, as in the
            authors' code. (`PublishedAutoCompressor.encode_lengths` takes any lengths.)
        accumulate_summary: default: the config's.
    """
    path = source.path
    settings = source.config()
    keys = source.keys(load_model_state(path))
    length = settings.get("summary_length")
    summary = keys.take(_SUMMARY, (length, None))
    if settings.get("model_type") != "llama":
        raise CheckpointError(
            f"{path} is a {settings.get('model_type')!r} model; only AutoCompressors on Llama are supported. On OPT, summary "
            "vectors take the padding position, which a reader's prompt has no place for."
        )
    config = model_config(settings, path, drop=_OWN_SETTINGS)
    model = build_model(config, keys.take_all(r"(?=model\.|lm_head\.)"), path)
    keys.done()
    reader = make_reader(model, load_tokenizer(path, source), source)
    if summary.shape[1] != reader.width:
        raise CheckpointError(f"{path}: {_SUMMARY} is {tuple(summary.shape)}, wanted width {reader.width}.")
    kept = settings.get("accumulate_summary", True) if accumulate_summary is None else accumulate_summary
    settled = PublishedAutoCompressorConfig(
        fixed_slots=True,
        scale="none",
        positions="paper",
        bos=False,
        r=16,
        alpha=16.0,
        dropout=0.05,
        summary_length=len(summary),
        ratio=max(1.0, segment_tokens / len(summary)),
        segment_tokens=segment_tokens,
        equal_segments=equal_segments,
        as_prompt=True,
        accumulate_summary=bool(kept),
        tuning="none",
        adapt_reader=False,
        target_modules=None,
    )
    compressor = PublishedAutoCompressor(settled, reader)
    with torch.no_grad():
        compressor.summary.copy_(summary)
    return compressor
