"""ARC-Encoder checkpoints: the encoder's own layers, one bridge per decoder, and the vectors that ask for a target."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

from ..base import Passages
from ..core.config import added, check_choices, setting
from ..core.errors import CheckpointError
from ..encoders.small_lm import SmallLMEncoder
from ..reader.loading import load_tokenizer as load_any_tokenizer
from ..reader.reader import Reader
from ..soft.arc_encoder import ARCEncoderCompressor, ARCEncoderConfig
from .layout import Keys, Source, listed, load_model_state, load_tensors, need, read_json, single_file
from .models import build_model, has_tokenizer, load_tokenizer

LONGEST = 32768  # tokens of a passage in the authors' code
# Names of a layer's weights: the authors', transformers'.
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Settings of the encoder that are understood, with the values that are supported (None: any).
_ENCODER: dict[str, tuple[Any, ...] | None] = {
    "causal_embedder": (False,),
    "memory_tokens": (0,),
    "pooling_module": ({"pool_type": "mean_pooled_queries", "where": "before"},),
    "compress_rates": None,
    "n_truncated_layers": None,
    "trained_layers": None,
    "train_embedding_mtx": None,
    "rec_tok": None,
    "cont_tok": None,
}


@dataclass
class PublishedARCEncoderConfig(ARCEncoderConfig):
    """Settings of ARC-Encoder as its authors' code runs it."""

    scale: Literal["matched", "none"] = setting("matched", "'none': slots without an output factor", kw_only=True)
    continuation: bool = added(False, "a learned vector after the slots of each passage")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"scale": ("matched", "none")})


class PublishedARCEncoder(ARCEncoderCompressor):
    """ARC-Encoder as its authors' code runs it: its own tokens are counted, and a vector asks for a continuation.

    Attributes:
        continuation: ``[1, encoder width]``, bridged and appended to the slots of each passage; or ``None``.
    """

    config_class: ClassVar[type[ARCEncoderConfig]] = PublishedARCEncoderConfig
    config: PublishedARCEncoderConfig

    def __init__(
        self, config: PublishedARCEncoderConfig, reader: Reader, *, encoder_model: SmallLMEncoder | None = None
    ) -> None:
        super().__init__(config, reader, encoder_model=encoder_model)
        width = next(self.bridge.parameters()).shape[1]
        if config.scale == "none":
            self.log_scale = None
        self.continuation = nn.Parameter(torch.zeros(1, width, device=reader.device)) if config.continuation else None

    def token_ids(self, passages: Passages) -> list[list[int]]:
        """Token ids of the passages, each tokenised as a text of its own."""
        return (
            self.tokenizer.encode_batch([(text, True) for text in passages.texts]) if passages.texts else passages.ids
        )

    def cut(
        self, n_tokens: int, ratio: float | None, question_tokens: int, source_tokens: int
    ) -> list[tuple[int, int]]:
        """``ceil(S / ratio)`` slots for S tokens of the encoder."""
        return super().cut(n_tokens, ratio, question_tokens, n_tokens)

    def join(self, parts: Sequence[Any]) -> Any:
        """The slots of a passage, and the vector after them."""
        if self.continuation is None or not parts:
            return super().join(parts)
        return torch.cat([*parts, self.project(self.continuation)])


def recognises(path: Path) -> bool:
    """Whether it has the layout of the hub or of training."""
    if (path / "params.json").is_file() and (path / "embedder").is_dir() and (path / "bridge_module").is_dir():
        return True
    try:
        with safe_open(str(path / "model.safetensors"), "pt") as file:
            return "embedder.tok_embeddings.weight" in set(file.keys())
    except (OSError, SafetensorError):
        return False


def load(
    source: Source,
    *,
    compress_rate: float | None = None,
    decoder: int = 0,
    tokenizer: str | None = None,
    head_dim: int = 128,
    rope_theta: float = 500000.0,
    norm_eps: float = 1e-5,
) -> PublishedARCEncoder:
    """Imports ARC-Encoder (arXiv 2510.20535): the hub's layout, or that of the authors' training.

    Args:
        source: the folder; it needs the reader (the decoder).
        compress_rate: tokens per slot; default: what training wrote. The hub's checkpoints do not say (their names do).
        decoder: which of the checkpoint's decoders the reader is.
        tokenizer: hub id or folder of the encoder's tokenizer; default: the folder's, or the reader's if it has as many tokens
            as the encoder has embeddings.
        head_dim, rope_theta, norm_eps: of the encoder; default: Llama-3.2-3B's.
    """
    path = source.path
    reader = source.need_reader("holds no decoder")
    keys = source.keys(_state(path))
    rate = float(need(compress_rate or _rate(path), "compress_rate", "how many tokens a slot stands for", path))
    sizes = {"head_dim": head_dim, "rope_theta": rope_theta, "rms_norm_eps": norm_eps}
    encoder = _encoder(keys, source, reader, tokenizer, sizes)
    width = encoder.body.config.hidden_size
    (first, second), continuation = _decoder_parts(keys, decoder, width, reader)
    keys.done()
    config = PublishedARCEncoderConfig(
        ratio=rate,
        segment_tokens=LONGEST,
        encoder="encoder",
        dropped_layers=0,
        bridge_width=len(first),
        scale="none",
        continuation=continuation is not None,
    )
    compressor = PublishedARCEncoder(config, reader, encoder_model=encoder)
    with torch.no_grad():
        for layer, weight in zip(compressor.bridge, (first, second)):
            layer.weight.copy_(weight)  # type: ignore[operator, union-attr]
        if compressor.continuation is not None and continuation is not None:
            compressor.continuation.copy_(continuation)
    return compressor


def _state(path: Path) -> dict[str, Tensor]:
    """All tensors, named as on the hub."""
    if not (path / "embedder").is_dir():
        return load_model_state(path)
    parts = {name: load_tensors(single_file(path / name)) for name in ("embedder", "bridge_module")}
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def _rate(path: Path) -> float | None:
    """The compression rate that training wrote. Raises ``CheckpointError`` for an encoder of another kind."""
    if not (path / "params.json").is_file():
        return None
    settings = read_json(path / "params.json").get("embedder_params")
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{path}/params.json lacks embedder_params.")
    for name, value in settings.items():
        if name not in _ENCODER:
            raise CheckpointError(f"{path}/params.json sets {name}, which is not known; known are {listed(_ENCODER)}.")
        if (supported := _ENCODER[name]) is not None and value not in supported:
            raise CheckpointError(f"{path}/params.json sets {name} to {value!r}; supported is {supported[0]!r}.")
    rates = settings.get("compress_rates")
    if not (isinstance(rates, list) and len(rates) == 1 and isinstance(rates[0], int) and rates[0] < -1):
        raise CheckpointError(
            f"{path}/params.json sets compress_rates to {rates!r}; supported is one negative rate, for pooling before the last "
            "layer, such as [-8]."
        )
    return float(-rates[0])


def _encoder(
    keys: Keys, source: Source, reader: Reader, tokenizer: str | None, sizes: Mapping[str, Any]
) -> SmallLMEncoder:
    """The encoder as a Llama of exactly the checkpoint's layers, with its tokenizer."""
    path, head_dim = source.path, int(sizes["head_dim"])
    table = keys.take("embedder.tok_embeddings.weight", (None, None))
    rows, width = table.shape
    count = 1 + max((int(m[1]) for name in keys if (m := re.match(r"embedder\.layers\.(\d+)\.", name))), default=-1)
    # PooledQueries takes the final norm away: the release has none, and the model class wants its weight.
    state = {"embed_tokens.weight": table, "norm.weight": torch.ones(width, dtype=table.dtype)}
    for i in range(count):
        for theirs, ours in _LAYER.items():
            weight = keys.take(f"embedder.layers.{i}.{theirs}.weight")
            if theirs in ("attention.wq", "attention.wk"):
                weight = _halves(weight, head_dim, f"{path}: embedder.layers.{i}.{theirs}")
            state[f"layers.{i}.{ours}.weight"] = weight
    if count == 0:
        raise CheckpointError(f"{path} holds no layers of the encoder.")
    try:
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=width,
            intermediate_size=len(state["layers.0.mlp.gate_proj.weight"]),
            num_hidden_layers=count,
            num_attention_heads=len(state["layers.0.self_attn.q_proj.weight"]) // head_dim,
            num_key_value_heads=len(state["layers.0.self_attn.k_proj.weight"]) // head_dim,
            max_position_embeddings=LONGEST,
            **sizes,
        )
    except Exception as error:  # configs validate in many ways of their own
        raise CheckpointError(f"{path} holds no Llama with heads of {head_dim}: {error}") from error
    body: Any = build_model(config, state, path, AutoModel)
    if tokenizer is not None:
        spelled = load_any_tokenizer(str(tokenizer))
    elif has_tokenizer(path) or len(reader.tokenizer) == rows:
        spelled = load_tokenizer(path, source)
    else:
        spelled = need(None, "tokenizer", f"which tokenizer of {rows} tokens its encoder reads with", path)
    if len(spelled) > rows:
        raise CheckpointError(f"{path}: the tokenizer has {len(spelled)} tokens, the encoder {rows} embeddings.")
    return SmallLMEncoder(body.to(source.device), spelled)


def _halves(weight: Tensor, head_dim: int, name: str) -> Tensor:
    """Rows of a query or key projection, from neighbouring pairs (the authors' rotary embedding) to halves (transformers')."""
    if weight.dim() != 2 or not len(weight) or len(weight) % head_dim:
        raise CheckpointError(
            f"{name} is {tuple(weight.shape)}, wanted rows for heads of {head_dim}; give head_dim=... ."
        )
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _decoder_parts(keys: Keys, decoder: int, width: int, reader: Reader) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """The two layers of a decoder's bridge, and its vector for a continuation ``[1, width]``, if there is one."""
    several = {int(m[1]) for name in keys if (m := re.match(r"bridge_module\.(\d+)\.", name))}
    if decoder not in (several or {0}):
        raise CheckpointError(f"{keys.where} holds no decoder {decoder}; it holds {listed(map(str, several or {0}))}.")
    keys.ignore(r"^embedder\.rec_tok\.", "vectors that ask for a repetition")
    start = f"bridge_module.{decoder}." if several else "bridge_module."
    hidden = keys.take(f"{start}layer1.weight", (None, width))
    bridge = hidden, keys.take(f"{start}layer2.weight", (reader.width, len(hidden)))
    names = [n for n in (f"embedder.cont_tok.{decoder}.weight", "embedder.cont_tok.weight") if n in keys]
    continuation = keys.take(names[0], (1, width)) if names else None
    for other in sorted(several - {decoder}):
        keys.ignore(
            rf"^(bridge_module\.{other}\.layer[12]|embedder\.cont_tok\.{other})\.weight$", "other decoders' parts"
        )
    return bridge, continuation
