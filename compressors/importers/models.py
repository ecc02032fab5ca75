"""Builds readers from checkpoints: models, embedding rows, LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..core.errors import CheckpointError
from ..encoders.lora_twin import LoRATwin, share, short_name
from ..reader.loading import load_tokenizer as load_any_tokenizer
from ..reader.lora import put_rows, updated
from ..reader.quiet import quiet_loading
from ..reader.reader import Reader
from ..reader.tokenization import PromptTokenizer
from .layout import Keys, Source, listed

_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>\w+))?(\.weight)?$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def model_config(settings: Mapping[str, Any], where: Path, drop: Iterable[str] = ()) -> Any:
    """Builds a ``transformers`` config from a dict, without settings that are not the model's.

    Raises:
        CheckpointError: if the model type is unknown.
    """
    kind = str(settings.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{where}/config.json names the model type {kind!r}, which transformers does not know.")
    left_out = {*drop, "auto_map", "_name_or_path", "quantization_config"}
    try:
        return CONFIG_MAPPING[kind].from_dict({k: v for k, v in settings.items() if k not in left_out})
    except Exception as error:  # configs validate in many ways of their own
        raise CheckpointError(f"{where}/config.json describes no {kind}: {error}") from error


def build_model(config: Any, state: Mapping[str, Tensor], where: Path, auto: Any = AutoModelForCausalLM) -> Any:
    """Builds a model of exactly these weights, in their stored dtype.

    Raises:
        CheckpointError: with the names, if weights are missing, left over or misshapen.
    """
    with torch.device("meta"):
        cls: Any = type(auto.from_config(config))
    dtype = next((t.dtype for t in state.values() if t.is_floating_point() and t.dim() > 1), torch.float32)
    try:
        with quiet_loading():
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, all at once
            )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} does not load as a {cls.__name__}: {error}") from error
    problems = []
    if info["missing_keys"]:
        problems.append(f"missing {listed(info['missing_keys'])}")
    if info["unexpected_keys"]:
        problems.append(f"unknown {listed(info['unexpected_keys'])}")
    problems += [f"{n} is {tuple(got)}, wanted {tuple(want)}" for n, got, want in sorted(info["mismatched_keys"])[:8]]
    if problems:
        raise CheckpointError(f"{where} does not fit a {cls.__name__}: {'; '.join(problems)}.")
    return model


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path, source: Source) -> Any:
    """The tokenizer of a folder, or the given reader's."""
    if has_tokenizer(folder):
        try:
            return load_any_tokenizer(str(folder))
        except Exception as error:  # tokenizers fail in many ways of their own
            raise CheckpointError(f"The tokenizer in {folder} cannot be loaded: {error}") from error
    return source.need_reader("holds no tokenizer").tokenizer


def make_reader(model: Any, tokenizer: Any, source: Source) -> Reader:
    """Makes a reader of a model built from a checkpoint. Raises ``CheckpointError`` if that fails."""
    try:
        return Reader(model.to(source.device), tokenizer, name=source.path.name)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source.path} gives no reader: {error}") from error


def graft_rows(
    reader: Reader, source: Source, embed: Tensor | None, head: Tensor | None, tokenizer: Any = None
) -> Reader:
    """Copies a reader with other embedding rows, sharing all other weights.

    Args:
        embed: ``[rows, width]`` input embeddings, or ``None`` to keep them.
        head: ``[rows, hidden]`` output rows; ``None``: the input embeddings if the reader ties them, else unchanged.
        tokenizer: replaces the reader's.
    """
    model = share(reader.model)
    try:
        put_rows(model, embed, head, f"{source.path} for the reader {reader.name!r}")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return make_reader(model, tokenizer or reader.tokenizer, source)


# -- LoRA --------------------------------------------------------------------------------------------------------------


def body_prefix(model: Any) -> str:
    """Path of the decoder's body in a causal LM, such as ``"model."``."""
    body = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is body)
    return f"{name}." if name else ""


def take_lora(keys: Keys, start: str, adapter: str = r"\w+") -> dict[str, Tensor]:
    """Takes LoRA matrices from a checkpoint, keyed like ``layers.0.self_attn.q_proj.lora_A``.

    Args:
        start: regular expression before the path in the decoder's body.
        adapter: regular expression of the adapter's name.
    """
    found = {}
    for name, tensor in keys.take_all(rf"{start}(?=.*\.lora_[AB](\.{adapter})?(\.weight)?$)").items():
        match = _LORA.match(name)
        if match is None:
            raise CheckpointError(f"{keys.where}: {name} is not a LoRA matrix with a known name.")
        short = f"{match['module']}.lora_{match['side']}"
        if short in found:
            raise CheckpointError(f"{keys.where} holds {short} twice, for several adapters.")
        found[short] = tensor
    return found


def lora_shape(lora: Mapping[str, Tensor], where: Path) -> tuple[int, list[str]]:
    """Rank and target modules of a checkpoint's LoRA matrices.

    Raises:
        CheckpointError: if there are none, or their ranks differ.
    """
    if not lora:
        raise CheckpointError(f"{where} holds no LoRA matrices.")
    ranks = {t.shape[0 if name.endswith("lora_A") else 1] for name, t in lora.items() if t.dim() == 2}
    if bad := [name for name, t in lora.items() if t.dim() != 2]:
        raise CheckpointError(f"{where}: {bad[0]} is {tuple(lora[bad[0]].shape)}, wanted a matrix.")
    if len(ranks) != 1:
        raise CheckpointError(f"{where} holds LoRA matrices of ranks {sorted(ranks)}; one rank is wanted.")
    return ranks.pop(), sorted({name.split(".")[-2] for name in lora})


def drop_idle(twin: LoRATwin, lora: dict[str, Tensor], source: Source) -> None:
    """Leaves out the LoRA matrices that a KV method has dropped, and notes why."""
    idle = {short_name(n) for n, _ in twin.decoder.named_parameters() if "lora_" in n} - set(twin.lora)
    for name in [n for n in lora if short_name(n) in idle]:
        source.ignored[name] = "LoRA of the last layer that no key or value depends on"
        del lora[name]


def fill_lora(twin: LoRATwin, lora: Mapping[str, Tensor], where: Path) -> None:
    """Copies LoRA matrices into a twin. Raises ``CheckpointError`` with the names unless all match."""
    found = {short_name(name): tensor for name, tensor in lora.items()}
    wanted = dict(twin.lora.items())
    problems = [f"missing {n.replace('/', '.')}" for n in sorted(wanted.keys() - found.keys())]
    problems += [f"unknown {n.replace('/', '.')}" for n in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{n.replace('/', '.')} is {tuple(found[n].shape)}, wanted {tuple(wanted[n].shape)}"
        for n in sorted(wanted.keys() & found.keys())
        if wanted[n].shape != found[n].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{where}: LoRA does not fit the reader: {'; '.join(problems[:8])}{more}.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def merge_lora(reader: Reader, source: Source, lora: Mapping[str, Tensor], scale: float) -> Reader:
    """Copies a reader with LoRA merged (``W + scale * B A``), sharing all other weights.

    Raises:
        CheckpointError: if a module does not exist, or matrices are missing or misshapen.
    """
    model = share(reader.model)
    modules = dict(model.get_decoder().named_modules())
    for path in sorted({name.rsplit(".lora_", 1)[0] for name in lora}):
        module: Any = modules.get(path)
        if not isinstance(module, nn.Linear):
            raise CheckpointError(f"{source.path}: LoRA on {path}, which is not a linear layer of {reader.name!r}.")
        a, b = lora.get(f"{path}.lora_A"), lora.get(f"{path}.lora_B")
        if a is None or b is None:
            raise CheckpointError(f"{source.path} lacks {path}.lora_{'A' if a is None else 'B'}.")
        if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(module.weight.shape):
            raise CheckpointError(
                f"{source.path}: LoRA on {path} is {tuple(b.shape)} x {tuple(a.shape)}, "
                f"wanted a product of {tuple(module.weight.shape)}."
            )
        module.weight = updated(module.weight, b, a, scale)
    return make_reader(model, reader.tokenizer, source)


def as_prompt(prompts: PromptTokenizer, before: Sequence[int] = (), text: str = "a b") -> bool:
    """Whether a tokenizer treats text after special tokens like the start of a prompt.

    SentencePiece tokenizers then put a space before it, unlike inside a prompt.
    """
    tokenizer = prompts.tokenizer
    opening = prompts.encode(text, opens=True)
    front = "".join(tokenizer.convert_ids_to_tokens(list(before)))
    own = tokenizer(front + text, add_special_tokens=False)["input_ids"]
    return list(own[-len(opening) :]) == opening
