"""EXIT: a language model says of each sentence, in its passage, whether it is useful for the question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.config import CompressorConfig, check_counts
from ..core.hidden import hide
from ..reader.reader import Reader
from ..reader.shared import target_hidden
from ..registry import register_compressor
from .pruning import PrunerConfig, SentencePruner, SentenceScores, ThresholdSettings, sentence_spans
from .selection import ScorerSettings, find_scorer

HEAD = "Query:\n{query}\nFull context:\n{document}\n"
TAIL = 'Sentence:\n{sentence}\nIs this sentence useful in answering the query? Answer only "Yes" or "No".\nAnswer:'
_ROWS = 64  # rows of logits over the vocabulary that exist at a time
_POSITIONS = 8192  # per forward pass


@dataclass
class EXITConfig(ThresholdSettings, ScorerSettings, PrunerConfig):
    """Settings of EXIT."""

    method: ClassVar[str] = "exit"
    title: ClassVar[str] = "EXIT"
    cost: ClassVar[str] = "scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_threshold()
        check_counts(self, {"window": 64})


@register_compressor
class EXITCompressor(SentencePruner):
    """Keeps the sentences that a language model finds useful (EXIT, arXiv 2412.12559).

    A sentence's score is P(Yes) / (P(Yes) + P(No)) after the prompt with question, whole passage and sentence. The prompt up to
    the sentence is read once per passage. The model is the reader or any causal LM (``scorer``), without the paper's training.
    A passage that is too long for the window is read in runs of sentences.

    Args:
        config: the settings.
        reader: the reader; the budget counts its tokens.
        scorer: the causal LM that scores, instead of loading ``config.scorer``.

    Attributes:
        scorer: the causal LM that scores.
    """

    config_class: ClassVar[type[CompressorConfig]] = EXITConfig
    training_free = True
    config: EXITConfig
    scorer: Reader

    def __init__(self, config: EXITConfig, reader: Reader, *, scorer: Reader | None = None) -> None:
        super().__init__(config, reader)
        hide(self, "scorer", scorer or find_scorer(config, reader))

    def identity_parts(self) -> list[Any]:
        """Reader and scorer."""
        return [*super().identity_parts(), self.scorer.fingerprint]

    @torch.no_grad()
    def score_sentences(self, texts: Sequence[str], queries: Sequence[str | None]) -> list[SentenceScores]:
        """P(Yes) among Yes and No for each sentence.

        Raises:
            ValueError: if a question leaves no room in the window for the passage.
        """
        spans = [sentence_spans(text) for text in texts]
        prompts: list[str] = []
        groups: list[tuple[int, int]] = []
        for i, (text, query, cuts) in enumerate(zip(texts, queries, spans)):
            for part, prompt in self._prompts([text[a:b] for a, b in cuts], query or ""):
                prompts.append(prompt)
                groups.append((i, part))
        values = iter(self._yes(prompts, groups).split([len(cuts) for cuts in spans]))
        return [SentenceScores(cuts, next(values)) for cuts in spans]

    def _prompts(self, sentences: Sequence[str], query: str) -> Iterator[tuple[int, str]]:
        """One prompt per sentence, and the number of the run of sentences that it shows as the passage."""
        limit = self.scorer.max_positions
        frame = HEAD.format(query=query, document="") + TAIL.format(sentence="")
        room = min(self.config.window, limit or self.config.window) - len(self.scorer.tokenize(frame)) - 8
        if room < 2:
            raise ValueError(
                f"The question leaves no room for the passage in a window of {self.config.window}; shorten it."
            )
        # A sentence stands in the passage and behind it. One that is too long for that is judged by its beginning.
        heads = [self._beginning(sentence, room // 2) for sentence in sentences]
        sizes = [len(ids) for ids in self.scorer.tokenize_batch(heads)]
        run: list[int] = []
        runs = [run]
        for i, size in enumerate(sizes):
            if run and sum(sizes[j] for j in run) + size + max(size, *(sizes[j] for j in run)) > room:
                run = []
                runs.append(run)
            run.append(i)
        for number, members in enumerate(runs):
            head = HEAD.format(query=query, document="".join(heads[i] for i in members).strip())
            for i in members:
                yield number, head + TAIL.format(sentence=heads[i].strip())

    def _beginning(self, sentence: str, most: int) -> str:
        _, offsets = self.scorer.tokenize_with_offsets(sentence)
        return sentence if len(offsets) <= most else sentence[: offsets[most][0]]

    def _yes(self, prompts: Sequence[str], groups: Sequence[tuple[int, int]]) -> Tensor:
        """``[prompts]`` probability of Yes among Yes and No at the next token."""
        if not prompts:
            return torch.zeros(0)
        yes, no = self._answers()
        # A sentence that stands twice in a passage is read once, so that rounding does not choose between the two.
        once = dict(zip(prompts, groups))
        hidden = target_hidden(
            self.scorer, [[prompt] for prompt in once], [yes[:1]] * len(once), list(once.values()), _POSITIONS
        ).hidden
        found: list[float] = []
        for rows in hidden.split(_ROWS):
            logits = self.scorer.head(rows).float()
            found += torch.sigmoid(logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)).tolist()
        values = dict(zip(once, found))
        return torch.tensor([values[prompt] for prompt in prompts])

    def _answers(self) -> tuple[list[int], list[int]]:
        """First tokens of Yes and of No, with and without a space before."""
        yes, no = (
            {ids[0] for ids in self.scorer.tokenize_batch([word, f" {word}"]) if self.scorer.decode(ids[:1]).strip()}
            for word in ("Yes", "No")
        )
        if not yes or not no or yes & no:
            raise ValueError(
                f"The tokenizer of {self.scorer.name!r} does not tell Yes from No by the first token; choose another scorer."
            )
        return sorted(yes), sorted(no)
