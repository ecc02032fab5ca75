"""RECOMP, extractive: keeps the sentences whose vectors are closest to the question's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ..core.batching import pack, pad_rows, pass_positions
from ..core.config import CompressorConfig, setting
from ..core.fingerprint import hash_json
from ..core.hidden import hide
from ..encoders.embedder import MINILM
from ..encoders.lora import LoRASettings, lora_rank
from ..encoders.lora_twin import LoRATwin
from ..encoders.token_classifier import ClassifierTokenizer, load_encoder, position_limit, weights_hash
from ..reader.reader import Reader
from ..registry import register_compressor
from .pruning import PruneExample, PrunerConfig, SentenceScores, TrainedPruner, sentence_spans

_SCALE = 20.0  # factor of the cosines in the loss, as in Sentence-BERT
_POSITIONS = 8192  # per forward pass
_LEAST = 0.5  # a sentence of this value or more is a positive


@dataclass
class RECOMPConfig(PrunerConfig, LoRASettings):
    """Settings of RECOMP's extractive compressor."""

    method: ClassVar[str] = "recomp"
    title: ClassVar[str] = "RECOMP (extractive)"
    cost: ClassVar[str] = "scores"
    unpublished: ClassVar[str] = "the release keeps a fixed number of sentences of several passages"

    encoder: str = setting(MINILM, "the frozen encoder below LoRA", kw_only=True)
    frozen_hash: str | None = setting(None, "hash of the frozen weights and tokenizer; filled in", kw_only=True)
    r: int = lora_rank(16, " (the encoder's)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lora()


@register_compressor
class RECOMPCompressor(TrainedPruner):
    """Keeps the sentences with the highest cosine to the question (RECOMP, arXiv 2310.04408, extractive).

    One encoder, mean pooling, gives the vectors of question and sentences. It is trained by the softmax over sentences in the
    batch with the right sentence as the target, and the other sentences of its passage among the negatives. The paper trains
    Contriever by the dot product; here it is a small embedder with LoRA, by the cosine times 20.

    Attributes:
        twin: the encoder with LoRA.
        pieces: its tokenizer.

    Raises:
        ValueError: if the encoder cannot be loaded, or is not the one of training.
    """

    config_class: ClassVar[type[CompressorConfig]] = RECOMPConfig
    config: RECOMPConfig
    frozen: Any

    def __init__(self, config: RECOMPConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        frozen, tokenizer = load_encoder(config.encoder, str(reader.device))
        hide(self, "frozen", frozen)
        self.pieces = ClassifierTokenizer(tokenizer)
        self.limit = position_limit(frozen, tokenizer) - len(self.pieces.before) - len(self.pieces.after)
        found = hash_json(weights_hash(frozen), self.pieces.fingerprint_parts())
        if config.frozen_hash not in (None, found):
            raise ValueError(
                f"The encoder's frozen weights ({found}) are not those of the saved compressor ({config.frozen_hash}); load "
                "the same encoder."
            )
        self.config = replace(config, frozen_hash=found)
        self.twin = LoRATwin(frozen, **config.lora).to(frozen.device)

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """``[texts, width]`` unit vectors; differentiable. A text that is too long for the encoder is read to its limit."""
        rows = [[*self.pieces.before, *self.pieces(text).ids[: self.limit], *self.pieces.after] for text in texts]
        device, out = self.reader.device, dict[int, Tensor]()
        for batch in pack([len(row) for row in rows], _POSITIONS, pass_positions(device)):
            ids, mask = pad_rows([rows[i] for i in batch], self.pieces.pad)
            states = self.twin.decoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
            real = mask.to(states)[:, :, None]
            out.update(zip(batch, (states * real).sum(1) / real.sum(1)))
        return normalize(torch.stack([out[i] for i in range(len(rows))]), dim=-1)

    @torch.no_grad()
    def score_sentences(self, texts: Sequence[str], queries: Sequence[str | None]) -> list[SentenceScores]:
        """The cosine of each sentence to its question."""
        spans = [sentence_spans(text) for text in texts]
        sentences = [text[a:b].strip() for text, cuts in zip(texts, spans) for a, b in cuts]
        if not sentences:
            return [SentenceScores(cuts, torch.zeros(0)) for cuts in spans]
        asked = list(dict.fromkeys(query or "" for query in queries))
        found = self.vectors([*asked, *sentences]).float().cpu()
        vectors = iter(found[len(asked) :].split([len(cuts) for cuts in spans]))
        where = {query: found[i] for i, query in enumerate(asked)}
        return [SentenceScores(cuts, next(vectors) @ where[query or ""]) for cuts, query in zip(spans, queries)]

    def loss(self, examples: Sequence[PruneExample]) -> dict[str, Tensor]:
        """Cross-entropy of the best sentence of each example among those of all examples.

        An example without a sentence of value 1/2 or more gives negatives alone. Sentences of unknown value are left out.
        """
        sentences: list[str] = []
        targets: dict[int, int] = {}
        for i, example in enumerate(examples):
            values = [-1.0 if value is None else value for value in example.values]
            best = max(range(len(values)), key=values.__getitem__, default=0)
            for j, ((a, b), value) in enumerate(zip(example.sentences, values)):
                if j == best and value >= _LEAST:
                    targets[i] = len(sentences)
                if (j == best and value >= _LEAST) or 0 <= value < _LEAST:
                    sentences.append(example.passage[a:b].strip())
        found = self.vectors([*(example.question for example in examples), *sentences])
        if not targets:
            return {"loss": found.sum() * 0.0}
        cosines = found[list(targets)] @ found[len(examples) :].T
        wanted = torch.tensor(list(targets.values()), device=cosines.device)
        right = (cosines.argmax(1) == wanted).float().mean()
        return {"loss": cross_entropy(_SCALE * cosines, wanted), "accuracy": right.detach()}
