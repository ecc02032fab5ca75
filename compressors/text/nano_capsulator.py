"""Nano-Capsulator: the reader with LoRA writes a passage again, in fewer words."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..base import CompressorT, TextCompressor
from ..core.config import CompressorConfig, check_counts, check_ratio, setting
from ..core.errors import ReaderMismatchError
from ..core.hidden import hide
from ..core.passage import CompressedPassage
from ..encoders.lora import LoRASettings, lora_rank
from ..encoders.lora_twin import LoRATwin
from ..encoders.tuned_reader import AdaptedReader
from ..reader.reader import Reader
from ..registry import register_compressor
from .facts import supported
from .sampling import Sample

PROMPT = "{text}\n\nWrite this again in at most {words} words.{asked}\nShort version:"
ASKED = " Keep what answers the question: {query}"
_TEMPERATURE = 0.8  # of the draws in training
_ROWS = 256  # rows of logits over the vocabulary that exist at a time


@dataclass
class NanoCapsulatorConfig(LoRASettings, CompressorConfig):
    """Settings of Nano-Capsulator."""

    method: ClassVar[str] = "nano-capsulator"
    title: ClassVar[str] = "Nano-Capsulator"
    cost: ClassVar[str] = "scores"

    ratio: float = setting(4.0, "compression ratio if a call gives no budget")
    query_aware: bool = setting(False, "the writer reads the question (RECOMP, abstractive)")
    verify: bool = setting(True, "drop sentences with a number or name that the passage lacks")
    frozen_hash: str | None = setting(None, "fingerprint of the reader below LoRA; filled in")
    max_tokens: int | None = setting(None, "budget in the reader's tokens, instead of the ratio")
    r: int = lora_rank(16, " (the writer's)")

    def __post_init__(self) -> None:
        check_counts(self, {"max_tokens": 0}, ("max_tokens",))
        check_ratio(self.ratio, "source tokens per kept token")
        self.check_lora()


@register_compressor
class NanoCapsulatorCompressor(TextCompressor):
    """Writes a passage again under a length limit (Nano-Capsulator, arXiv 2402.18700; RECOMP, abstractive, 2310.04408).

    The writer is the reader with LoRA. A recipe of kind `rewards` trains it on what the reader answers from the short version,
    and on its likeness to the passage. The result has at most the tokens of the budget, ends at a word, and may be empty. A
    text that fits is returned unchanged. Passage and prompt must fit into the reader's positions.

    Args:
        config: the settings.
        reader: the reader, which also writes.

    Attributes:
        twin: the writer's weights.
        writer: the reader with these weights.

    Raises:
        ReaderMismatchError: if the writer was trained on another reader.
    """

    config_class: ClassVar[type[CompressorConfig]] = NanoCapsulatorConfig
    config: NanoCapsulatorConfig
    writer: Reader

    def __init__(self, config: NanoCapsulatorConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        if config.frozen_hash not in (None, reader.fingerprint):
            raise ReaderMismatchError(
                f"The writer was made for another reader ({config.frozen_hash}) than {reader.name!r} ({reader.fingerprint}); "
                "load that reader, or train a writer for this one."
            )
        self.config = replace(config, frozen_hash=reader.fingerprint)
        self.twin = LoRATwin(reader.model, **config.lora)
        hide(self, "writer", AdaptedReader(reader, self.twin))

    @classmethod
    def from_pretrained(cls: type[CompressorT], folder: str | Path, reader: Reader, **kwargs: Any) -> CompressorT:
        """Loads a folder written by `save_pretrained`. ``ratio`` and ``max_tokens`` replace those in it."""
        if unknown := sorted(kwargs.keys() - {"ratio", "max_tokens"}):
            raise ValueError(
                f"A saved Nano-Capsulator takes the settings ratio and max_tokens; got {', '.join(unknown)}."
            )
        compressor: Any = super().from_pretrained(folder, reader)  # type: ignore[misc]
        compressor.config = replace(compressor.config, **kwargs)
        return compressor

    def _compress(
        self,
        texts: list[str],
        queries: list[str | None],
        ratio: float | None,
        *,
        vectors: Any,
        max_tokens: int | None = None,
        **options: Any,
    ) -> list[CompressedPassage]:
        """``max_tokens``, an option of `compress`: the reader's tokens of each result, instead of a ratio."""
        if options:
            raise TypeError(f"{type(self).__name__}.compress has no options {sorted(options)}.")
        if ratio is not None and max_tokens is not None:
            raise ValueError(f"Give ratio or max_tokens, not both (got {ratio} and {max_tokens}).")
        replace(self.config, max_tokens=max_tokens)  # checks it
        max_tokens = self.config.max_tokens if ratio is None and max_tokens is None else max_tokens
        asked = self.config.ratio if ratio is None else ratio
        lengths = [len(ids) for ids in self.reader.tokenize_batch(texts)]
        budgets = [math.floor(n / asked + 1e-9) if max_tokens is None else max_tokens for n in lengths]
        found = self.write(texts, queries, budgets)
        about: dict[str, Any] = {"method": self.config.method}
        about |= {"ratio_asked": float(asked)} if max_tokens is None else {"max_tokens": max_tokens}
        sizes = [len(ids) for ids in self.reader.tokenize_batch(found)]
        return [
            CompressedPassage(
                "text", length, self.fingerprint, text=text, spans=(), n_tokens=n, info=about | {"budget": budget}
            )
            for length, text, n, budget in zip(lengths, found, sizes, budgets)
        ]

    def write(self, texts: Sequence[str], queries: Sequence[str | None], budgets: Sequence[int]) -> list[str]:
        """The likeliest short version of each text within its budget of the reader's tokens."""
        out = list(texts)
        jobs: dict[int, list[int]] = defaultdict(list)
        for i, (ids, budget) in enumerate(zip(self.reader.tokenize_batch(texts), budgets)):
            if len(ids) > budget:
                out[i] = ""
                jobs[budget].append(i)
        # Prompts of one limit share a batch, so that a result does not depend on the others.
        for budget, which in jobs.items():
            prompts = [[self.prompt(texts[i], queries[i], budget)] for i in which]
            for i, short in zip(which, self.writer.generate(prompts, budget) if budget else ()):
                short = supported(short, texts[i]) if self.config.verify else short
                out[i] = self.cut(short.strip(), budget)
        return out

    def prompt(self, text: str, query: str | None, budget: int) -> str:
        """What the writer reads; a token is some three quarters of a word.

        Raises:
            ValueError: if a query-aware writer gets no question.
        """
        if self.query_aware and (query is None or not query.strip()):
            raise ValueError("Nano-Capsulator with query_aware writes for a question and got none; pass query=....")
        asked = ASKED.format(query=query) if self.query_aware else ""
        return PROMPT.format(text=text.strip(), words=max(1, 3 * budget // 4), asked=asked)

    def cut(self, text: str, budget: int) -> str:
        """The longest run of words from the start within a budget of tokens."""
        ends = [match.end() for match in re.finditer(r"\S+", text)]
        while ends and len(self.reader.tokenize(text[: ends[-1]])) > budget:
            ends.pop()
        return text[: ends[-1]] if ends else ""

    def sample(
        self, texts: Sequence[str], queries: Sequence[str | None], ratio: float | None, count: int, seed: int
    ) -> list[list[Sample]]:
        """See `Sampler`; log probabilities are those of the draws, at their temperature."""
        asked = self.config.ratio if ratio is None else ratio
        budgets = [max(1, int(len(ids) / asked)) for ids in self.reader.tokenize_batch(texts)]
        prompts = [[self.prompt(text, query, n)] for text, query, n in zip(texts, queries, budgets)]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            again = [prompt for prompt in prompts for _ in range(count)]
            drawn = self.writer.generate(again, max(budgets), do_sample=True, temperature=_TEMPERATURE)
            likely = self.writer.generate(prompts, max(budgets))
        each = [i for i in range(len(texts)) for _ in range(count + 1)]
        forms = [form for i in range(len(texts)) for form in (likely[i], *drawn[i * count : (i + 1) * count])]
        short = [self.cut(form.strip(), budgets[i]) for form, i in zip(forms, each)]
        # A form of the largest budget was stopped.
        ended = [a == b.strip() and len(self.reader.tokenize(b)) < max(budgets) for a, b in zip(short, forms)]
        log_probs = self._log_probs([prompts[i] for i in each], short, ended)
        samples = [Sample(form, found, torch.zeros_like(found)) for form, found in zip(short, log_probs)]
        return [samples[i : i + count + 1] for i in range(0, len(samples), count + 1)]

    def _log_probs(self, prompts: Sequence[list[str]], forms: Sequence[str], ended: Sequence[bool]) -> Tensor:
        """``[prompts]`` log probability of each form, and of the end after it unless it was cut, under the writer."""
        targets = self.writer.target_hidden(prompts, [f" {form}" if form else "" for form in forms], add_eos=True)
        losses = torch.cat(
            [
                cross_entropy(self.writer.head(hidden).float() / _TEMPERATURE, ids, reduction="none")
                for hidden, ids in zip(targets.hidden.split(_ROWS), targets.ids.split(_ROWS))
            ]
        )
        last = torch.bincount(targets.rows, minlength=len(prompts)).cumsum(0) - 1
        losses = losses.index_fill(0, last[~torch.tensor(ended, device=losses.device)], 0.0)
        return losses.new_zeros(len(prompts)).index_add(0, targets.rows, -losses)
