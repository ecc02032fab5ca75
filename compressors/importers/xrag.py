"""xRAG checkpoints: the whole reader with its projector, or only the projector and the embedding rows."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tokenizers import AddedToken
from torch import Tensor

from ..core.config import check_choices, setting
from ..core.errors import CheckpointError
from ..encoders.embedder import Embedder, load_embedder
from ..reader.reader import Reader
from ..soft.xrag import XRAGCompressor, XRAGConfig
from .last_token import load_last_token_embedder
from .layout import Keys, Source, holds_key, load_model_state, load_tensors, peek_json, weight_files
from .models import build_model, graft_rows, load_tokenizer, make_reader, model_config
from .prompts import XRAG_TOKEN as TOKEN

UNKNOWN = "unknown"  # hash of an embedder that was not loaded at import
EMBEDDER = "Salesforce/SFR-Embedding-Mistral"
_PROJECTOR = "projector.projector."
_OWN_SETTINGS = ("projector_type", "retriever_hidden_size", "retriever_type")


@dataclass
class PublishedXRAGConfig(XRAGConfig):
    """Settings of xRAG as its authors' code runs it."""

    normalize: bool = setting(True, "bring every vector to root mean square 1 first", kw_only=True)
    scale: Literal["matched", "none"] = setting("matched", "'none': the bare projector", kw_only=True)
    pooling: Literal["own", "last"] = setting(
        "own", "'own': vectors of sentence-transformers; 'last': the last hidden state at the last token", kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"scale": ("matched", "none"), "pooling": ("own", "last")})


class PublishedXRAG(XRAGCompressor):
    """xRAG as its authors' code runs it."""

    config_class: ClassVar[type[XRAGConfig]] = PublishedXRAGConfig
    config: PublishedXRAGConfig

    def __init__(self, config: PublishedXRAGConfig, reader: Reader, *, embedder: Any = None) -> None:
        super().__init__(config, reader, embedder=embedder)
        if config.scale == "none":
            self.log_scale = None

    def load_embedder(self) -> Embedder:
        """Loads ``config.embedder``, as a `LastTokenModel` with ``pooling="last"``."""
        load = load_last_token_embedder if self.config.pooling == "last" else load_embedder
        return load(self.config.embedder, self.reader.device)

    def check_embedder(self, embedder: Embedder) -> None:
        """Accepts any embedder of the right width if none was loaded at import."""
        if self.config.embedder_hash != UNKNOWN or embedder.dim != self.config.vector_size:
            super().check_embedder(embedder)

    def standardise(self, vectors: Tensor) -> Tensor:
        """Raw vectors without ``normalize``."""
        return super().standardise(vectors) if self.config.normalize else vectors


def recognises(path: Path) -> bool:
    """Whether it has xRAG's layout."""
    if path.is_dir():
        return "projector_type" in peek_json(path / "config.json") or (path / "ckpt.pth").is_file()
    return holds_key(path, _PROJECTOR)


def load(
    source: Source, *, embedder: Any = None, added_rows: bool = True, shard_tokens: int = 180, layers: int | None = None
) -> PublishedXRAG:
    """Imports xRAG. Its prompts: `nutgraf.compressors.importers.prompts.xrag_prompt`.

    Args:
        source: a folder with ``config.json`` and the whole model's weights, or a file (or a folder with a ``ckpt.pth``) of the
            projector and the embedding rows, which needs the reader.
        embedder: the retriever: an id or folder; default: SFR-Embedding-Mistral, loaded when first needed.
        added_rows: without the whole model: add the rows of ``<pad>`` and ``<xRAG>`` to the reader and the tokens to its
            tokenizer, as the authors' code does; otherwise the reader stays as it is.
        shard_tokens: longest piece per slot, in the retriever's tokens.
        layers: linear layers of the projector; default: the config's, or as many as there are.
    """
    path = source.path
    whole = path.is_dir() and bool(weight_files(path))
    if whole:
        keys = source.keys(load_model_state(path))
    else:
        keys = source.keys(load_tensors(path / "ckpt.pth" if path.is_dir() else path))
    state = keys.take_all(re.escape(_PROJECTOR))
    if not state:
        raise CheckpointError(f"{path} lacks {_PROJECTOR}0.weight: it holds no xRAG projector.")
    reader = _whole_reader(source, keys) if whole else _with_rows(source, keys, added_rows)
    keys.done()

    settings = source.config() if whole else {}
    projector = Keys(dict(state), path)
    depth = layers or _depth(settings.get("projector_type"), projector, path)
    size = settings.get("retriever_hidden_size")
    widths = [size, *[reader.width] * depth]
    tensors = {}
    for i in range(depth):
        weight = projector.take(f"{2 * i}.weight", (reader.width, widths[i]))
        tensors[f"{2 * i}.weight"] = weight
        tensors[f"{2 * i}.bias"] = projector.take(f"{2 * i}.bias", (reader.width,))
    projector.done()

    found = None if embedder is None else load_last_token_embedder(embedder, reader.device)
    width = tensors["0.weight"].shape[1]
    if found is not None and found.dim != width:
        raise CheckpointError(
            f"{path} projects vectors of width {width}, but {found.name!r} makes {found.dim}; give the embedder it was "
            "trained with."
        )
    config = PublishedXRAGConfig(
        normalize=False,
        scale="none",
        embedder=found.name if found else EMBEDDER,
        pooling="last",
        shard_tokens=shard_tokens,
        layers=depth,
        vector_size=width,
        embedder_hash=found.fingerprint if found else UNKNOWN,
    )
    compressor = PublishedXRAG(config, reader, embedder=found)
    with torch.no_grad():
        for name, parameter in compressor.projector.named_parameters():
            parameter.copy_(tensors[name])
    return compressor


def _whole_reader(source: Source, keys: Keys) -> Reader:
    config = model_config(source.config(), source.path, drop=_OWN_SETTINGS)
    state = keys.take_all(r"(?=model\.|lm_head\.)")
    model = build_model(config, state, source.path)
    return make_reader(model, load_tokenizer(source.path, source), source)


def _with_rows(source: Source, keys: Keys, added_rows: bool) -> Reader:
    """The given reader, with the checkpoint's additional rows; its own rows must be the same."""
    reader = source.need_reader("holds an xRAG projector without its reader")
    output = reader.model.get_output_embeddings().weight
    table = reader.model.get_input_embeddings().weight
    rows = {}
    for name, own in (("model.embed_tokens.weight", table), ("lm_head.weight", output)):
        rows[name] = keys.take(name, (None, own.shape[1]))
        n = min(len(own), len(rows[name]))
        # The file is float32 of what the reader holds in its own dtype.
        if not torch.allclose(rows[name][:n].to(own.device, own.dtype), own[:n], atol=1e-5, rtol=1e-2):
            raise CheckpointError(
                f"{source.path}: {name} differs from the reader's {reader.name!r}; the projector was trained for another one."
            )
    embed, head = rows["model.embed_tokens.weight"], rows["lm_head.weight"]
    if not added_rows or len(embed) <= len(table):
        source.ignored |= dict.fromkeys(rows, "rows that the reader holds already")
        return reader
    return graft_rows(reader, source, embed, head, _with_names(reader.tokenizer, len(embed)))


def _with_names(tokenizer: Any, rows: int) -> Any:
    """The tokenizer with ``<pad>`` and ``<xRAG>``, as the authors' code adds them; unchanged if no row is left."""
    if TOKEN in tokenizer.get_vocab():
        return tokenizer
    named = copy.deepcopy(tokenizer)
    named.add_special_tokens({"pad_token": "<pad>"})
    # Not normalised, or a normalizer that puts a space before a text would put one into the token's name.
    named.add_tokens([AddedToken(TOKEN, special=False, lstrip=False, rstrip=False, normalized=False)])
    return named if named.get_vocab()[TOKEN] < rows else tokenizer


def _depth(kind: Any, projector: Keys, path: Path) -> int:
    held = sum(name.endswith(".weight") for name in projector)
    if kind is None:
        return held
    match = re.fullmatch(r"mlp(\d+)x_gelu", str(kind))
    if kind != "linear" and match is None:
        raise CheckpointError(f"{path}/config.json: projector_type must be 'mlpNx_gelu', got {kind!r}.")
    return int(match[1]) if match else 1
