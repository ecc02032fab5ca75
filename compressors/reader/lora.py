"""Adds a LoRA adapter to its base model's weights, so that the reader is a plain model at the base's speed.

Only what is understood is added. PEFT works out each layer's rank and scale; everything else that changes the forward pass is
refused by name, and so are weights that are missing or left over.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import Tensor, nn

ADAPTER = "adapter_config.json"
_PREFIX = "base_model.model."

# Settings of any value: they name things, matter in training only, or choose layers, ranks and scales.
_UNDERSTOOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "ensure_weight_tying",
    "eva_config",
    # without effect unless a setting that is refused is on
    "megatron_core",
    "qalora_group_size",
}
# Settings of these values only. The other ways to start LoRA change the base weights too.
_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def not_lora(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an ``adapter_config.json`` that make it other than plain LoRA, as far as is known."""
    return {
        name: value
        for name, value in settings.items()
        if (value not in _VALUES[name] if name in _VALUES else value and name not in _UNDERSTOOD)
    }


def read_settings(folder: Path) -> Any:
    """The ``LoraConfig`` of an adapter's folder.

    Raises:
        ValueError: if a setting is on that is not understood; it is named. All unlisted ones must be off (null, false, empty).
    """
    file = folder / ADAPTER
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(held).__name__}.")
    odd = [f"{name if name.isidentifier() else repr(name):.60}={value!r:.60}" for name, value in not_lora(held).items()]
    if odd or "peft_type" not in held:
        what = ", ".join(odd) or "no peft_type"
        raise ValueError(
            f"{folder} holds more than plain LoRA on linear layers, which alone can be added to the weights: {what}. Merge it "
            "with PEFT (merge_and_unload) and load the saved model."
        )
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} describes no LoRA: {error}") from error


def add_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder in its weights. The model given is used up.

    Embedding rows in the adapter's file replace the model's; there may be more of them (added tokens).

    Raises:
        ValueError: if the adapter changes other than linear layers, or its weights do not fit the model one by one.
    """
    state = load_peft_weights(str(folder), device="cpu")
    rows = {name.removeprefix(_PREFIX).replace(".base_layer.", "."): t for name, t in state.items() if not _lora(name)}
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    table, head = (names.get(id(m)) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    if unknown := sorted(rows.keys() - {table, head}):
        raise ValueError(
            f"{folder}: the adapter's file holds {unknown[0]}, which is neither LoRA nor an embedding table."
        )
    if rows:
        embed, output = rows.get(str(table)), rows.get(str(head))
        if embed is None and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            embed, output = output, None  # PEFT may write a tied table under one name only
        put_rows(model, embed, output, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights, which are checked here, and about names
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        first = " ".join(str(error).split())
        raise ValueError(f"{folder} does not fit its base model: {first:.400}") from error
    wanted = {name.replace(".default", "") for name in adapted.state_dict() if _lora(name)}
    if differ := sorted(wanted ^ {name for name in state if _lora(name)}):
        what = "lacks" if differ[0] in wanted else "has, without a place in the base model,"
        raise ValueError(f"{folder}: the adapter's file {what} {differ[0]} ({len(differ)} names differ).")
    merge(adapted)
    return adapted.unload()


def _lora(name: str) -> bool:
    return ".lora_" in name


@torch.no_grad()
def merge(adapted: PeftModel) -> None:
    """Adds every LoRA update to the weight it belongs to. A head that is tied to the embeddings gets a table of its own.

    Raises:
        ValueError: if a layer is not linear.
    """
    model: Any = adapted.get_base_model()
    table = model.get_input_embeddings().weight
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        base: Any = module.get_base_layer()  # type: ignore[operator]
        (which,) = module.active_adapters  # type: ignore[misc,union-attr]
        if type(base) is not nn.Linear or which not in module.lora_A:  # type: ignore[operator]
            raise ValueError(
                f"The adapter changes {name}, a {type(base).__name__}; LoRA on linear layers can be added."
            )
        down, up = module.lora_A[which].weight, module.lora_B[which].weight  # type: ignore[index]
        if base.weight is table:
            untie(model)
        base.weight = updated(base.weight, up, down, module.scaling[which])  # type: ignore[index]


def updated(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> nn.Parameter:
    """``weight + scale * up @ down`` as a new parameter of the weight's dtype.

    The sum is taken in float64 and rounded once: in float32 its last bits, and with them the reader's fingerprint, would
    depend on the machine.
    """
    total = (up.to(weight.device).double() @ down.to(weight.device).double()).mul_(scale).add_(weight)
    return nn.Parameter(total.to(weight.dtype), requires_grad=False)


def untie(model: Any) -> None:
    """Notes in a model's config that embeddings and head are two tables."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def put_rows(model: Any, embed: Tensor | None, head: Tensor | None, where: str) -> None:
    """Replaces a model's embedding table and output rows, in place; the number of rows may differ.

    Args:
        model: a causal LM.
        embed: ``[rows, width]`` input embeddings, or ``None`` to keep them.
        head: ``[rows, hidden]`` output rows; ``None``: the input embeddings if the model ties them, else kept.
        where: the checkpoint's name in error messages.

    Raises:
        ValueError: if their widths differ from the model's, or there are not as many embeddings as output rows.
    """
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is table.weight
    if tied and embed is not None and head is not None and torch.equal(embed, head):
        head = None  # still one table

    def put(module: Any, rows: Tensor, what: str) -> None:
        old = module.weight
        if rows.dim() != 2 or rows.shape[1] != old.shape[1]:
            raise ValueError(f"{where}: {what} are {tuple(rows.shape)}, wanted rows of width {old.shape[1]}.")
        module.weight = nn.Parameter(rows.to(old.device, old.dtype), requires_grad=False)

    if embed is not None:
        put(table, embed, "the embeddings")
        table.num_embeddings = len(embed)
        if tied and head is None:
            output.weight = table.weight
    if head is not None:
        put(output, head, "the head's rows")
        if tied:
            untie(model)
    rows = output.out_features = output.weight.shape[0]
    if rows != table.weight.shape[0]:
        raise ValueError(f"{where}: {table.weight.shape[0]} embeddings and {rows} rows of the head.")
    model.config.get_text_config().vocab_size = model.vocab_size = rows
