"""Fingerprint of a reader: its weights, config, tokenizer and chat template."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..core.fingerprint import hash_json, hash_tensors, unshared
from .tokenization import PromptTokenizer

# Config fields about running, storing or decoding, which the fingerprint ignores.
_INCIDENTAL = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "_attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class ReaderIdentity:
    """Computes a reader's fingerprint at first use and caches it.

    Hashes the *values* of the weights, so a bfloat16 checkpoint has one fingerprint in bfloat16 and in float32. If the model
    lost precision (loaded narrower than its checkpoint, or quantised) or is offloaded, the checkpoint is read for the hash.

    Attributes:
        checkpoint: source of the model, or ``None`` for a model object, whose own weights are hashed.
    """

    def __init__(self, model: PreTrainedModel, prompts: PromptTokenizer) -> None:
        self.model = model
        self.prompts = prompts
        self.checkpoint: str | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of config, weights and tokenizer."""
        return hash_json(config_facts(self.model.config), self._weights(), self.prompts.fingerprint_parts())

    @functools.cached_property
    def runs_as(self) -> dict[str, Any]:
        """Runtime dtype and quantisation, recorded with the fingerprint."""
        quantisation = getattr(self.model.config, "quantization_config", None)
        method = getattr(quantisation, "quant_method", None) if quantisation is not None else None
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantisation": None if method is None else str(method),
        }

    def _weights(self) -> str:
        model = self.model
        offloaded = any(parameter.is_meta for parameter in model.parameters())
        if offloaded and self.checkpoint is None:
            raise ValueError(
                "This model's weights are offloaded, so that they cannot be hashed; "
                "let the reader load it: Reader.from_pretrained(NAME, device_map=...)."
            )
        if self.checkpoint is not None and (offloaded or self._lost_precision(self.checkpoint)):
            model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype="auto", device_map="cpu")
        return hash_tensors(unshared(model.state_dict()).items())

    def _lost_precision(self, checkpoint: str) -> bool:
        if getattr(self.model.config, "quantization_config", None) is not None:
            # A checkpoint that is stored quantised is its own reference.
            return getattr(AutoConfig.from_pretrained(checkpoint), "quantization_config", None) is None
        stored = AutoConfig.from_pretrained(checkpoint).dtype
        held = self.model.dtype
        exact = {
            torch.bfloat16: {torch.bfloat16, torch.float32, torch.float64},
            torch.float16: {torch.float16, torch.float32},
        }
        return held not in exact.get(stored, {torch.float32, torch.float64})


def config_facts(config: Any) -> dict[str, Any]:
    """Config values that differ from the architecture's defaults and affect the computation."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): strip(v) for k, v in value.items() if k not in _INCIDENTAL and v is not None}
        return value

    return {"model_type": config.model_type, **strip(config.to_diff_dict())}
