"""Cost of a decoder's forward pass, counted from its config: floating-point operations and bytes.

A multiply-add is two operations. Counted are matrices (projections, MLP, experts, router, head) and attention's two products;
norms, activations, biases, rotations and the embedding look-up (under one percent) are not. Bytes are the least that must
move: every matrix in use once, keys and values read and written. Times from these numbers are lower bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Matrices of the MLP: gate, up and down, or up and down.
MLP_MATRICES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), 3),
    **dict.fromkeys(("olmo", "olmo2", "cohere", "granite", "smollm3", "mixtral", "qwen3_moe"), 3),
    **dict.fromkeys(("gpt2", "gpt_neox", "opt", "falcon", "phi", "gptj", "starcoder2"), 2),
}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes between memory and chip."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder-only transformer that decide its cost.

    Attributes:
        name: In messages and rows.
        hidden, width: Widths of the residual stream and of the token embeddings.
        mlp_width: Inner width of the MLP, or of one expert. `mlp_matrices`: 3 if gated, else 2.
        vocab: Rows of embedding table and head; `tied` if they are one matrix.
        windows: Per layer how far back attention looks; None: all the way.
        max_positions: Longest prompt with its answer, if limited.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    mlp_matrices: int
    vocab: int
    width: int
    tied: bool = False
    experts: int = 1
    experts_per_token: int = 1
    windows: tuple[int | None, ...] = ()
    max_positions: int | None = None

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if key not in ("name", "tied", "windows", "max_positions") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"The shape of {self.name!r} needs {key} to be a whole number >= 1, got {value!r}.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name!r} has {self.heads} heads for {self.kv_heads} KV heads; it needs a multiple of them."
            )

    @property
    def attention_weights(self) -> int:
        """Query, key, value and output projections of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """The MLP of one layer, or one of its experts."""
        return self.mlp_matrices * self.hidden * self.mlp_width

    @property
    def router_weights(self) -> int:
        """The router of one layer; 0 in a dense model."""
        return self.hidden * self.experts if self.experts > 1 else 0

    @property
    def head_weights(self) -> int:
        """The head, with the projection to the embeddings' width if that differs."""
        return self.vocab * self.width + self._bridge

    @property
    def _bridge(self) -> int:
        return self.hidden * self.width if self.width != self.hidden else 0

    @property
    def parameters(self) -> int:
        """All matrices; norms, biases and learned positions are left out."""
        layer = self.attention_weights + self.expert_weights * self.experts + self.router_weights
        tables = self.vocab * self.width * (1 if self.tied else 2)
        return self.layers * layer + tables + 2 * self._bridge

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the matrices."""
        return self.parameters * item_bytes(dtype)

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Bytes of keys and values of `tokens` positions, in all layers."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * item_bytes(dtype)

    def embed_bytes(self, slots: int, dtype: str) -> int:
        """Bytes of soft slots."""
        return slots * self.width * item_bytes(dtype)

    def forward(
        self,
        tokens: int,
        past: int = 0,
        *,
        batch: int = 1,
        logits: int = 1,
        dtype: str = "bfloat16",
        causal: bool = True,
    ) -> Work:
        """Work of one forward pass.

        Args:
            tokens: Positions run per prompt, after `past` positions whose keys and values exist.
            batch: Prompts run together; each weight is read once for all of them.
            logits: Positions per prompt that the head runs on; 0 for an encoder.
            causal: Count only pairs that causal attention and its windows need; False counts all, as `FlopCounterMode`.

        Raises:
            ValueError: For negative or fractional numbers, or more logits than tokens.
        """
        for key, value, least in (("tokens", tokens, 0), ("past", past, 0), ("batch", batch, 1), ("logits", logits, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{key} must be a whole number >= {least}, got {value!r}.")
        if logits > tokens:
            raise ValueError(f"The head cannot run on {logits} of {tokens} positions.")
        if not tokens:
            return Work()
        mlp = self.expert_weights * self.experts_per_token + self.router_weights
        flops = 2 * tokens * (self.layers * (self.attention_weights + mlp) + self._bridge)
        flops += 4 * self.heads * self.head_dim * self._pairs(tokens, past, causal)
        flops += 2 * logits * self.head_weights
        moved = self.layers * (self.attention_weights + self.router_weights)
        moved += round(self.layers * self.expert_weights * self._experts_met(tokens * batch)) + self._bridge
        moved += self.head_weights if logits else 0
        rows = batch * tokens * self.width  # of the embedding table
        kept = batch * (self.kv_bytes(past, dtype) + self.kv_bytes(tokens, dtype))
        return Work(float(batch * flops), float((moved + rows) * item_bytes(dtype) + kept))

    def _pairs(self, tokens: int, past: int, causal: bool) -> int:
        """Pairs of query and key over all layers."""
        if not causal:
            return self.layers * tokens * (past + tokens)
        whole = tokens * past + tokens * (tokens + 1) // 2
        windows = self.windows or (None,) * self.layers
        return sum(whole if w is None else _windowed(tokens, past, w) for w in windows)

    def _experts_met(self, tokens: int) -> float:
        """Expected number of a layer's experts that `tokens` tokens use, if drawn evenly."""
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)


def _windowed(tokens: int, past: int, window: int) -> int:
    """Sum of min(past + t + 1, window) over t in 0..tokens-1."""
    growing = max(0, min(tokens, window - past))  # positions that still see everything before them
    return growing * past + growing * (growing + 1) // 2 + (tokens - growing) * window


def item_bytes(dtype: str) -> int:
    """Bytes of a number. Raises ValueError for an unknown dtype."""
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {sorted(ITEM_BYTES)}, got {dtype!r}.")
    return ITEM_BYTES[dtype]


def decoder_shape(config: Any, name: str = "") -> DecoderShape:
    """The shape of a Hugging Face config. Raises ValueError for an architecture whose cost is unknown."""
    config = config.get_text_config()
    kind = str(config.model_type)
    name = name or kind
    if kind not in MLP_MATRICES:
        raise ValueError(
            f"What a {kind!r} model costs is not known here; known are {', '.join(sorted(MLP_MATRICES))}. "
            "Give the --shape of a model of like size instead."
        )
    hidden, heads = config.hidden_size, config.num_attention_heads
    layers = config.num_hidden_layers
    return DecoderShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        mlp_width=_mlp_width(config, kind, hidden),
        mlp_matrices=MLP_MATRICES[kind],
        vocab=config.vocab_size,
        width=getattr(config, "word_embed_proj_dim", None) or hidden,
        tied=bool(config.tie_word_embeddings),
        experts=_first(config, ("num_local_experts", "num_experts"), 1),
        experts_per_token=_first(config, ("num_experts_per_tok",), 1),
        windows=_windows(config, layers),
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _first(config: Any, names: Sequence[str], default: int) -> int:
    """The first of several settings that is there."""
    return next((value for n in names if (value := getattr(config, n, None)) is not None), default)


def _kv_heads(config: Any, heads: int) -> int:
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else heads
    return _first(config, ("num_key_value_heads", "num_kv_heads"), heads)


def _mlp_width(config: Any, kind: str, hidden: int) -> int:
    if kind == "qwen3_moe":
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            raise ValueError("A qwen3_moe model whose layers differ is not counted here; give a --shape of like size.")
        return config.moe_intermediate_size
    return _first(config, ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 4 * hidden)


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """How far back each layer looks."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return ()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
