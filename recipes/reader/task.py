"""Training task of a reader, from scratch or from a pretrained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ...compressors.encoders.embedder import packaged_minilm
from ..data.corpus import find_files, read_documents, read_records
from ..data.overlap import HeldOut
from ..training.schema import Recipe, Stage, validate
from .base import BaseSettings, TunedBase
from .corpus import ReaderCorpus
from .evaluation import copy_loss, heldout_perplexity, question_scores
from .init import start_copying, word_rows
from .model import PackedReader
from .pooled_contexts import token_weights
from .rows import LOSS_KINDS, ReaderRows, RowSettings, collate_rows
from .tokenizer import tokenizer_texts, train_tokenizer

PARAGRAPHS = 4  # of an article, in which document frequencies are counted


class ReaderTask:
    """Task of a reader recipe.

    Recipe sections: `data` (dir, texts, questions, documents, held_out, dev_texts, dev_questions, dev_limit); `tokenizer`
    (path of a finished one, or vocab_size and characters); `model` (fields of LlamaConfig, `embedder: auto | none`, `copying:
    bool`; or fields of `BaseSettings` for LoRA on a pretrained model with its tokenizer); each stage's `mix` (`RowSettings`).
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        data = recipe.data
        if not data.get("dir"):
            raise ValueError("The reader recipe needs data.dir: the folder of its text and question files.")
        self.folder = Path(data["dir"])
        held_out = HeldOut.from_files(find_files(self.folder, data.get("held_out", [])))
        self.corpus = ReaderCorpus(self.folder, data["texts"], data["questions"], data.get("documents"), held_out)
        torch.manual_seed(recipe.seed)
        self.base: TunedBase | None = None
        if "base" in (recipe.model or {}):
            if recipe.tokenizer:
                raise ValueError(
                    f"{recipe.name} begins with a pretrained model, whose tokenizer it takes: remove tokenizer."
                )
            self.base = TunedBase(validate(BaseSettings, recipe.model or {}, recipe.name, "model"))
        self.tokenizer: Any = self.base.tokenizer if self.base else self._tokenizer()
        self.module = PackedReader(self.base.model if self.base else self._model())

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        settings = dict(self.recipe.tokenizer or {})
        if path := settings.get("path"):
            return PreTrainedTokenizerFast.from_pretrained(str(path))
        texts = tokenizer_texts(
            self.corpus.text_files[:: max(1, len(self.corpus.text_files) // 2)][:2],
            self.corpus.records,
            settings.get("characters", 20_000_000),
        )
        positions = (self.recipe.model or {}).get("max_position_embeddings", 4096)
        return train_tokenizer(texts, settings.get("vocab_size", 8192), positions)

    def _model(self) -> LlamaForCausalLM:
        settings = dict(self.recipe.model or {})
        embedder, copying = settings.pop("embedder", "auto"), settings.pop("copying", True)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            tie_word_embeddings=True,
            **settings,
        )
        config._attn_implementation = "sdpa"
        model = LlamaForCausalLM(config)
        if copying:
            folder = packaged_minilm() if embedder == "auto" else None
            width = config.hidden_size - 1 - int(config.head_dim or 0)
            content = word_rows(self.tokenizer, Path(folder), width, self.recipe.seed) if folder else None
            start_copying(model, content, self.recipe.seed)
        return model

    def dataset(self, stage: Stage) -> Dataset:
        """Rows for the steps of a stage."""
        rows = stage.steps * stage.batch_size * stage.accumulate
        settings, seed = self._rows(stage), f"{self.recipe.seed}/{stage.name}"
        weights = self._token_weights() if settings.pooled else None
        return ReaderRows(self.corpus, self.tokenizer, settings, seed, rows, weights)

    def _token_weights(self) -> np.ndarray:
        texts = [text for article in self.corpus.articles for text in article[:PARAGRAPHS]]
        return token_weights(self.tokenizer.backend_tokenizer, texts)

    def _rows(self, stage: Stage) -> RowSettings:
        return validate(RowSettings, stage.mix, self.recipe.name, f"stages.{stage.name}.mix")

    def collator(self, stage: Stage) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Stacks rows into a batch."""
        return collate_rows

    def begin_stage(self, stage: Stage) -> None:
        """Trains everything (LoRA only on a pretrained base) and sets the weights of the losses."""
        mix = self._rows(stage)
        self.module.weights = dict.fromkeys(LOSS_KINDS, 1.0) | {str(kind): w for kind, w in mix.weights.items()}
        self.module.point_weight, self.module.point_groups = mix.point, mix.point_groups
        have = int(self.module.model.config.num_key_value_heads or 1)
        if mix.point_groups > have:
            raise ValueError(
                f"Stage {stage.name!r}: mix.point_groups is {mix.point_groups}; the model has {have} key-value groups."
            )
        if self.base is None:
            self.module.requires_grad_(True)
            return
        if self.module.point_weight:
            raise ValueError(
                f"Stage {stage.name!r}: mix.point teaches heads of a model that is trained whole; set it to 0."
            )
        self.base.freeze()

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Scores on the tuning half of the dev questions, perplexity of held-out text, copying loss."""
        model, data, limit = self.module.model, self.recipe.data, self.recipe.data.get("dev_limit", 100)
        training, scores = model.training, {"copy_loss": copy_loss(model, len(self.tokenizer))}
        for path in find_files(self.folder, data.get("dev_texts", [])):
            documents = list(read_documents(path))[:20]
            scores["heldout_ppl"] = heldout_perplexity(model, self.tokenizer, documents)
        for path in find_files(self.folder, data.get("dev_questions", [])):
            records = read_records(path, half="tune")
            records = records[:: max(1, len(records) // limit)][:limit]
            name = path.name.split(".")[0].removeprefix("qa_dev_")
            for context in (True, False):
                found = question_scores(model, self.tokenizer, records, context)
                scores.update({f"{key}_{name}{'' if context else '_none'}": value for key, value in found.items()})
        model.train(training)
        return scores

    def save(self, folder: Path) -> None:
        """Writes the reader, or the adapter on its base, for `Reader.from_pretrained`."""
        dtype = self.recipe.output.torch_dtype or torch.float32
        if self.base is not None:
            self.base.save(folder, dtype)
        else:
            self._save_whole(folder, dtype)
        for file in folder.iterdir():  # safetensors creates files that only their owner can read
            file.chmod(0o644)

    def _save_whole(self, folder: Path, dtype: torch.dtype) -> None:
        state = {name: value.detach().to("cpu", dtype) for name, value in self.module.model.state_dict().items()}
        copy: Any = LlamaForCausalLM(self.module.model.config)
        copy = copy.to(dtype)
        copy.load_state_dict(state)
        copy.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=False,
            max_new_tokens=32,
        )
        copy.save_pretrained(folder)
        self.tokenizer.backend_tokenizer.no_truncation()  # scoring has set truncation and padding
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.save_pretrained(folder)
