"""Gist checkpoints: the tuned model with a <GIST> row, or its difference to the base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..kv.gist import GistCompressor, GistConfig
from ..reader.reader import Reader
from .layout import MissingOption, Source, listed, load_model_state, need, peek_json
from .models import build_model, load_tokenizer, make_reader, model_config
from .published import PublishedCompressor, PublishedSettings

GIST = "<GIST>"
_TOKENIZER_FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
_ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass
class PublishedGistConfig(PublishedSettings, GistConfig):
    """Settings of gist tokens as the authors' code runs them."""


class PublishedGist(PublishedCompressor, GistCompressor):
    """Gist tokens as the authors' code runs them."""

    config_class: ClassVar[type[GistConfig]] = PublishedGistConfig


def recognises(path: Path) -> bool:
    """Whether it has the layout of gist tokens."""
    if not path.is_dir() or "model_type" not in peek_json(path / "config.json"):
        return False
    files = [path / name for name in _TOKENIZER_FILES]
    return any(file.is_file() and f'"{GIST}"' in file.read_text(encoding="utf-8", errors="replace") for file in files)


def load(source: Source, *, n_gist: int | None = None, diff: bool | None = None) -> PublishedGist:
    """Imports gist tokens; the checkpoint holds its reader, or its difference to the base model.

    Its source and prompt: ``gist_source`` and ``gist_prompt`` of `nutgraf.compressors.importers.prompts`; with
    ``stripped=True`` for the released models. The authors' controls (``pos_control``, ``neg_control``) have the same layout,
    and were not trained to read gist tokens alone.

    Args:
        source: a Hugging Face folder whose tokenizer knows ``<GIST>``.
        n_gist: gist tokens after each passage: as the model was trained with (see the names of the released ones).
        diff: the weights are differences to the base model, which is the reader to give. Default: no; weights that look like
            differences are refused.
    """
    path = source.path
    settings = source.config()
    if settings.get("is_encoder_decoder") or settings.get("model_type") in ("t5", "mt5"):
        raise CheckpointError(
            f"{path} is an encoder-decoder ({settings.get('model_type')}); gist tokens need a causal LM."
        )
    n_gist = int(need(n_gist, "n_gist", "how many gist tokens it was trained with", path))
    config = model_config(settings, path)
    keys = source.keys(load_model_state(path))
    state = keys.take_all(r"")
    if diff is None and _looks_like_a_difference(state):
        raise MissingOption(
            f"The norms in {path} are close to zero: its weights seem to be differences to a base model. Give diff=true and "
            "the base model as the reader, or diff=false if they are not."
        )
    tokenizer = load_tokenizer(path, source)
    if diff:
        state = _added(source, state)
    index = tokenizer.get_vocab().get(GIST)
    rows = state.get(_ROWS[0])
    if index is None or rows is None or index >= len(rows):
        held = None if rows is None else len(rows)
        raise CheckpointError(f"{path}: the tokenizer gives {GIST} the id {index}, and there are {held} embeddings.")
    reader: Reader = make_reader(build_model(config, state, path), tokenizer, source)
    settled = PublishedGistConfig(n_gist=n_gist, tuning="none", fixed_slots=True, as_prompt=True)
    compressor = PublishedGist(settled, reader)
    with torch.no_grad():
        compressor.gist.copy_(reader.embed(torch.tensor([index], device=reader.device)))
    return compressor


def _looks_like_a_difference(state: dict[str, Tensor]) -> bool:
    """Norm weights are around one in a model and around zero in a difference."""
    norms = [t.float().abs().mean() for name, t in state.items() if "norm" in name and name.endswith("weight")]
    return bool(norms) and float(torch.stack(norms).mean()) < 0.1


def _added(source: Source, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Base weights plus differences; missing rows of the base count as zero."""
    base = source.need_reader("holds differences to a base model")
    own = dict(base.model.state_dict())
    if differ := own.keys() ^ state.keys():
        raise CheckpointError(f"{source.path} and the base model {base.name!r} differ in the keys {listed(differ)}.")
    out = {}
    for name, change in state.items():
        raw = own[name].to("cpu", torch.float32)
        if name in _ROWS and change.dim() == 2 and raw.shape[1] == change.shape[1] and len(raw) < len(change):
            raw = torch.cat([raw, raw.new_zeros(len(change) - len(raw), raw.shape[1])])
        if raw.shape != change.shape:
            raise CheckpointError(
                f"{source.path}: {name} is {tuple(change.shape)}, wanted {tuple(raw.shape)} as in {base.name!r}."
            )
        out[name] = (raw + change.float()).to(change.dtype)
    return out
