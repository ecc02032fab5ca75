"""Tuned copies of the reader: weight-sharing with LoRA, or full."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.hidden import hide
from ..reader.kv import position_arguments

# Query and value projections, or the fused projection; the first row whose names all exist is used.
_ATTENTION_INPUTS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
    ("W_pack",),
    ("att_proj",),
)
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "attn_out")


def share(model: PreTrainedModel) -> Any:
    """Copies a module tree but shares its parameters and buffers.

    Changes to the copy's modules (injected LoRA, modes) do not affect the original.

    Raises:
        ValueError: if some of its weights are not in memory.
    """
    _check_in_memory(model)
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _check_in_memory(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "This method runs the reader's weights, and they are offloaded (device_map). Compress into a store with the reader "
            "loaded whole; an offloaded reader can read the store, except for methods that tune the reader."
        )


def attention_inputs(model: nn.Module, keys: bool = False) -> list[str]:
    """Names of the modules that get LoRA by default: query and value projections, or the fused one.

    Args:
        model: a causal LM or its decoder.
        keys: the key projection, too.

    Raises:
        ValueError: if the architecture uses unknown names.
    """
    leaves = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    for names in _ATTENTION_INPUTS:
        if set(names) <= set(leaves):
            between = [names[0].replace("q_", "k_").replace("query", "key")] if keys and len(names) > 1 else []
            return [names[0], *between, *names[1:]]
    raise ValueError(
        f"{type(model).__name__} has no attention projections of a known name; set target_modules to some of {leaves}."
    )


def attention_output(model: nn.Module) -> str:
    """Name of the module that projects the output of attention. Raises ``ValueError`` if it has no known name."""
    leaves = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    for name in _ATTENTION_OUTPUTS:
        if name in leaves:
            return name
    raise ValueError(
        f"{type(model).__name__} has no output projection of a known name; set target_modules to some of {sorted(leaves)}."
    )


class Twin(nn.Module):
    """A tuned copy of a causal LM: `LoRATwin`, `FullTwin` or `Untuned`. Make one with `tune`.

    The original is never switched, so another thread can use it at any time.

    Attributes:
        lm: the tuned causal LM, for an `AdaptedReader` to read with.
    """

    lm: Any
    checkpointing = False

    @property
    def decoder(self) -> Any:
        """The body of the tuned LM, which gives hidden states."""
        return self.lm.get_decoder()

    def merged(self) -> PreTrainedModel:
        """The tuned LM as a plain model; weights that are not tuned are shared with it."""
        return self.lm

    def train(self, mode: bool = True) -> Twin:
        """Switches LoRA's dropout only; the model's own dropout stays off, as in the reader."""
        self.training = mode
        # Hugging Face models checkpoint gradients in training mode only.
        self.decoder.train(mode and self.checkpointing)
        for name, module in self.decoder.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes activations in the backward pass (not reentrant). The model's own dropout is then on in training."""
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        self.checkpointing = True
        self.train(self.training)

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """Last hidden states, after the final norm.

        Args:
            embeds: ``[batch, time, width]``, padded on the right.
            mask: ``[batch, time]``, 1 for tokens, 0 for padding.
            positions: ``[batch, time]`` position ids; default: 0, 1, 2, ...

        Returns:
            ``[batch, time, hidden]``.
        """
        # With padding on the right, a row's positions are those of an unpadded pass.
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        out = self.decoder(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, **position_arguments(self.decoder, positions)
        )
        return out.last_hidden_state


class LoRATwin(Twin):
    """Weight-sharing LoRA copy of a causal LM.

    Its parameters are the LoRA matrices only. ``to()``, ``train()`` and ``state_dict()`` never reach the shared weights.

    Args:
        model: the causal LM, frozen.
        r: LoRA rank.
        alpha: LoRA scale; updates are multiplied by ``alpha / r``.
        dropout: dropout before LoRA's first matrix, in training.
        target_modules: names of the modules that get LoRA; ``None``: see `attention_inputs`.

    Attributes:
        lora: LoRA matrices in float32 by their path in the decoder, with ``/`` instead of dots.

    Raises:
        ValueError: if a target module does not exist.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        target_modules: Sequence[str] | None = None,
    ) -> None:
        # Imported here because it takes a second, and reading compressed passages does not need it.
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        lm = share(model)
        decoder = lm.get_decoder()
        targets = attention_inputs(decoder) if target_modules is None else list(target_modules)
        linears = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        if missing := [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in linears)]:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ValueError(f"target_modules {missing} are not in {type(decoder).__name__}, which has {leaves}.")
        first = next(m for n, m in linears.items() if n == targets[0] or n.endswith(f".{targets[0]}"))
        lora = LoraConfig(
            r=r,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=targets,
            fan_in_fan_out=isinstance(first, Conv1D),
            bias="none",
        )
        inject_adapter_in_model(lora, decoder)  # in place
        adapters = {name: p for name, p in decoder.named_parameters() if "lora_" in name}
        for parameter in adapters.values():
            parameter.data = parameter.data.float()
        hide(self, "lm", lm.eval())
        self.lora = nn.ParameterDict({short_name(name): p for name, p in adapters.items()})
        self.requires_grad_(True)
        self.train()

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        """The LM with LoRA added to its weights, rounded to their dtype once; other weights are shared.

        Raises:
            ValueError: if some weights are quantised.
        """
        from ..reader.lora import updated  # takes PEFT, too

        plain = share(self.lm)
        decoder = plain.get_decoder()
        for name, module in [*decoder.named_modules()]:
            if not hasattr(module, "lora_A"):
                continue
            base = module.get_base_layer()
            if type(base) not in (nn.Linear, Conv1D):
                raise ValueError(
                    f"LoRA cannot be added to {name}, a {type(base).__name__}; load the reader unquantised."
                )
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            factors = (down.T, up.T) if isinstance(base, Conv1D) else (up, down)  # Conv1D's weight is transposed
            base.weight = updated(base.weight, *factors, module.scaling["default"])
            decoder.set_submodule(name, base)
        return plain

    @contextlib.contextmanager
    def only_at(self, where: Tensor, modules: Sequence[str] | None = None) -> Iterator[None]:
        """Within it, LoRA changes some tokens only; the model's own weights run the others.

        Args:
            where: ``[batch, time]`` bool, the tokens that LoRA changes.
            modules: names of the modules that this concerns; default: all that have LoRA.
        """
        share = where[..., None]
        names = {
            name.rsplit(".", 2)[0]: m for name, m in self.decoder.named_modules() if name.endswith(".lora_B.default")
        }
        chosen = [m for name, m in names.items() if modules is None or name.rsplit(".", 1)[-1] in modules]
        handles = [m.register_forward_hook(lambda _, given, out: out * share.to(out)) for m in chosen]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class FullTwin(Twin):
    """Full copy of a causal LM; all its weights are trained and saved."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        _check_in_memory(model)
        self.lm = copy.deepcopy(model).eval().requires_grad_(True)
        self.train()


class Untuned(Twin):
    """The model itself as a `Twin` without trainable parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        hide(self, "lm", model)

    def train(self, mode: bool = True) -> Untuned:
        """Sets this module's flag only."""
        self.training = mode
        return self


def tune(model: PreTrainedModel, tuning: str, **lora: Any) -> Twin:
    """Makes a tuned copy of a causal LM.

    Args:
        model: the original, left as it is.
        tuning: ``"lora"``, ``"full"`` or ``"none"`` (the model itself).
        lora: arguments of `LoRATwin`.

    Raises:
        ValueError: for any other tuning.
    """
    if tuning == "lora":
        return LoRATwin(model, **lora)
    if tuning == "full":
        return FullTwin(model)
    if tuning == "none":
        return Untuned(model)
    raise ValueError(f"tuning must be 'lora', 'full' or 'none', got {tuning!r}.")


def short_name(name: str) -> str:
    """Name of a LoRA matrix for a ParameterDict: its path in the decoder without dots or adapter name."""
    return name.replace(".default", "").removesuffix(".weight").replace(".", "/")
