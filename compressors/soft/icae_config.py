"""Settings of ICAE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..core.config import CompressorConfig, check_choices, check_counts, check_ratio
from ..encoders.lora import LoRASettings, ReaderTuningSettings
from ..slots.nested import NestedSettings
from ..slots.question import QuerySettings
from ..slots.segment_overlap import OverlapSettings


@dataclass
class ICAEConfig(CompressorConfig, LoRASettings, NestedSettings, QuerySettings, ReaderTuningSettings, OverlapSettings):
    """Settings of ICAE. ``ICAEConfig.faithful()`` gives the paper's form."""

    method: ClassVar[str] = "icae"

    mem_size: int = field(default=128, metadata={"help": "memory tokens, and the most slots that a segment gets"})
    ratio: float = field(default=4.0, metadata={"help": "compression ratio where none is asked for"})
    fixed_slots: bool = field(
        default=False,
        metadata={"help": "every segment gets all mem_size slots, as in the paper, even where that makes it longer"},
    )
    segment_tokens: int | None = field(default=None, metadata={"help": "longest segment; default: mem_size * ratio"})
    projector: Literal["none", "scale", "linear"] = field(
        default="scale",
        metadata={"help": "'none' (the paper), 'scale': one factor, 'linear': a matrix that starts as that factor"},
    )
    positions: Literal["spread", "append"] = field(
        default="spread",
        metadata={
            "help": "position ids of the memory tokens: 'append' counts on after the segment (the paper), 'spread' puts each "
            "at the middle of the tokens that it stands for"
        },
    )
    residual: bool = field(
        default=True,
        metadata={"help": "add the gated pooled embeddings of the tokens that each slot stands for; not in the paper"},
    )
    special_tokens: bool = field(
        default=False, metadata={"help": "learned [AE], [LM] and [FT] embeddings, as in the paper"}
    )
    bos: bool = field(
        default=True, metadata={"help": "put the tokenizer's BOS, if it has one, in front of every segment"}
    )
    bos_once: bool = field(
        default=False,
        metadata={"help": "BOS is the passage's own first token, counted and cut with it, as in the authors' code"},
    )
    as_prompt: bool = field(
        default=False,
        metadata={
            "help": "tokenise a passage as the start of a prompt, where SentencePiece tokenizers put a space in front, as in "
            "the authors' code; default: as it stands inside a prompt"
        },
    )
    truncate: int | None = field(
        default=None,
        metadata={
            "help": "read one segment of at most so many tokens (BOS counted) and drop the rest with a warning: ICAE v1's own "
            "code alone does this; default: long passages become several segments"
        },
    )

    def __post_init__(self) -> None:
        optional = ("segment_tokens", "truncate")
        check_counts(self, {"mem_size": 1, "segment_tokens": 1, "truncate": 1}, optional)
        check_ratio(self.ratio)
        check_choices(self, {"projector": ("none", "scale", "linear"), "positions": ("spread", "append")})
        self.check_lora()
        self.check_nested()
        self.check_query()
        self.check_reader_tuning()
        self.check_overlap()
        if self.query_aware and self.bos_once:
            raise ValueError(
                "With bos_once BOS is the passage's own, and a question cannot stand behind it; leave one out."
            )
        if self.segment_overlap and self.truncate is not None:
            raise ValueError(
                "With truncate there is one segment alone, and segment_overlap has no meaning; leave one out."
            )

    @classmethod
    def faithful(cls, **changes: Any) -> ICAEConfig:
        """The paper's form: all memory slots for every segment, bare hidden states, [AE]/[LM]/[FT] embeddings."""
        paper = {"fixed_slots": True, "projector": "none", "positions": "append", "residual": False}
        paper |= {"special_tokens": True, "r": 128}
        return cls(**{**paper, **changes})
