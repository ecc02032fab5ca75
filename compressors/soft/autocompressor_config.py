"""The settings of AutoCompressor, and the paper's form of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..core.config import CompressorConfig, check_choices, check_counts, check_ratio
from ..encoders.lora import LoRASettings, lora_alpha, lora_rank


@dataclass
class AutoCompressorConfig(CompressorConfig, LoRASettings):
    """Settings of AutoCompressor. ``AutoCompressorConfig.faithful()`` gives the paper's form."""

    method: ClassVar[str] = "autocompressor"

    summary_length: int = field(
        default=64, metadata={"help": "summary tokens, and the most summary vectors that a segment gets"}
    )
    ratio: float = field(default=4.0, metadata={"help": "compression ratio where none is asked for"})
    fixed_slots: bool = field(
        default=False,
        metadata={
            "help": "every segment gets all summary_length vectors, as in the paper, even where it has fewer tokens"
        },
    )
    segment_tokens: int | None = field(
        default=None, metadata={"help": "longest segment; default: summary_length * ratio"}
    )
    equal_segments: bool = field(
        default=True,
        metadata={
            "help": "a passage's segments are equally long; false: each as long as it may be and the last one what is left, "
            "as the authors' code cuts"
        },
    )
    accumulate_summary: bool = field(
        default=True,
        metadata={"help": "the soft prompt is the summaries of all segments so far, and not only of the last one"},
    )
    scale: Literal["matched", "none"] = field(
        default="matched",
        metadata={
            "help": "'matched': a learned factor that starts at the reader's embedding norm; 'none' (the paper): raw states"
        },
    )
    positions: Literal["count", "paper"] = field(
        default="count",
        metadata={
            "help": "position ids: 'count': 0, 1, 2, ... over all that is read; 'paper': the same for rotary models, while "
            "in OPT slots and summary tokens take the padding position and a segment's tokens count from 0"
        },
    )
    bos: bool = field(
        default=True,
        metadata={"help": "put the tokenizer's BOS, if it has one, in front of every pass, as the reader does"},
    )
    as_prompt: bool = field(
        default=False,
        metadata={
            "help": "tokenise a passage as the start of a prompt, where SentencePiece tokenizers put a space in front, as in "
            "the authors' code; default: as it stands inside a prompt"
        },
    )
    tuning: Literal["lora", "full", "none"] = field(
        default="lora", metadata={"help": "what of the model trains, beside the summary tokens"}
    )
    adapt_reader: bool = field(
        default=True, metadata={"help": "the tuned model reads the slots too (the paper); else the reader as it is"}
    )
    r: int = lora_rank(16)
    alpha: float = lora_alpha(16.0)
    train_segments: int = field(default=4, metadata={"help": "segments that a document is cut into in training"})
    segments_per_substep: int = field(
        default=2, metadata={"help": "segments in a row between which gradients flow through the soft prompt"}
    )

    def __post_init__(self) -> None:
        least = {"summary_length": 1, "segment_tokens": 1, "train_segments": 2, "segments_per_substep": 2}
        check_counts(self, least, optional=("segment_tokens",))
        check_ratio(self.ratio)
        choices = {"scale": ("matched", "none"), "positions": ("count", "paper"), "tuning": ("lora", "full", "none")}
        check_choices(self, choices)
        self.check_lora()

    @classmethod
    def faithful(cls, **changes: Any) -> AutoCompressorConfig:
        """The paper's form for Llama: 50 raw summary vectors a segment of up to 2,048 tokens, LoRA on all of attention.

        For OPT, which the paper tunes whole: ``faithful(tuning="full", target_modules=None)``.
        """
        paper: dict[str, Any] = {"summary_length": 50, "ratio": 40.96, "fixed_slots": True, "scale": "none"}
        paper |= {"positions": "paper", "bos": False, "r": 16, "alpha": 16.0, "dropout": 0.05}
        paper |= {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
        return cls(**{**paper, **changes})
