"""`CompressedPassage`: the result of compression, which a reader reads instead of the passage."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from .files import write_atomically
from .ragged import check_ragged

Interface = Literal["embeds", "kv", "text"]
FORMAT_VERSION = "1"
_HEADER = "nutgraf"  # the one metadata entry of the safetensors header


@dataclass(frozen=True, eq=False)
class CompressedPassage:
    """A passage in compressed form: soft embeddings, keys and values, or a shorter text.

    Attributes:
        interface: ``"embeds"``, ``"kv"`` or ``"text"``.
        source_tokens: length of the original passage in the reader's tokens, without special tokens.
        compressor: fingerprint of the compressor (``"identity"`` for a passage's own embeddings).
        reader: fingerprint of the reader it was made for; ``None`` for text, which every reader can read.
        embeds: ``[slots, width]``, on the scale of the reader's embeddings.
        keys, values: one ``[kv_heads, slots, head_dim]`` tensor per layer (the last axis of keys and values may differ);
            ragged: one ``[pairs, head_dim]`` tensor for all layers and heads (see `nutgraf.compressors.core.ragged`).
        positions: ``[slots]`` or ``[pairs]`` integers, the positions at which the keys were computed.
        text: the shorter text.
        spans: kept ``(start, end)`` character spans of the original passage, in order.
        n_tokens: length of ``text`` in the reader's tokens.
        info: JSON-able facts (method, dtype, ratio asked for, ...).
        counts: ``[layers, kv_heads]`` integers, the pairs that each head keeps; makes a KV passage ragged.
        bias: ``[pairs]``, added to the attention scores of each pair (ragged only, optional).
        span: first position and length of the block in which ragged keys were computed; the reader moves it as a whole.
        first: token ids that the reader reads in front of the block, as text (ragged only). They are the passage's first.
    """

    interface: Interface
    source_tokens: int
    compressor: str
    reader: str | None = None
    embeds: Tensor | None = None
    keys: tuple[Tensor, ...] | None = None
    values: tuple[Tensor, ...] | None = None
    positions: Tensor | None = None
    text: str | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    n_tokens: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    counts: Tensor | None = None
    bias: Tensor | None = None
    span: tuple[int, int] | None = None
    first: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.interface not in get_args(Interface):
            raise ValueError(f"interface must be one of {get_args(Interface)}, got {self.interface!r}.")
        if self.source_tokens < 0:
            raise ValueError(f"source_tokens must not be negative, got {self.source_tokens}.")
        if self.interface != "text" and not self.reader:
            raise ValueError(f"A passage compressed to {self.interface} must carry its reader's fingerprint.")
        if self.first and self.counts is None:
            raise ValueError("first needs counts: only ragged KV passages have tokens that are read again.")
        if self.interface == "embeds":
            if self.embeds is None or self.embeds.dim() != 2:
                got = None if self.embeds is None else tuple(self.embeds.shape)
                raise ValueError(f"embeds must be a [slots, width] tensor, got {got}.")
        elif self.interface == "kv":
            self._check_kv_shapes()
        elif self.text is None or self.n_tokens is None:
            raise ValueError("A passage compressed to text needs both text and n_tokens.")

    def _check_kv_shapes(self) -> None:
        if not self.keys or not self.values or self.positions is None:
            raise ValueError("A passage compressed to kv needs keys, values and positions.")
        if len(self.keys) != len(self.values):
            raise ValueError(f"kv needs as many keys as values, got {len(self.keys)} and {len(self.values)} layers.")
        if self.counts is not None:
            if len(self.keys) != 1 or self.span is None:
                raise ValueError("A ragged KV passage needs one tensor of keys, one of values, and its span.")
            check_ragged(self.keys[0], self.values[0], self.bias, self.positions, self.counts, self.span)
            if bad := [i for i in self.first if type(i) is not int or i < 0]:
                raise ValueError(f"first must hold token ids of at least 0, got {bad[0]!r}.")
            return
        if self.bias is not None:
            raise ValueError("A bias needs counts: only ragged KV passages carry one.")
        slots = self.positions.numel()
        for layer, (k, v) in enumerate(zip(self.keys, self.values)):
            if k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2] or k.shape[1] != slots:
                raise ValueError(
                    f"Layer {layer}: keys and values must be [kv_heads, {slots}, head_dim], "
                    f"got {tuple(k.shape)} and {tuple(v.shape)}."
                )

    # -- numbers ---------------------------------------------------------------------------------------------------

    @property
    def ragged(self) -> bool:
        """Whether every KV head keeps its own pairs."""
        return self.counts is not None

    @property
    def slots(self) -> int:
        """Size: soft tokens, KV positions, or tokens of text.

        Of a ragged passage its `first` tokens and the mean pairs per head, rounded up.
        """
        if self.counts is not None:
            return math.ceil(self._mean_slots)
        if self.interface == "embeds":
            return self.embeds.shape[0]  # type: ignore[union-attr]
        if self.interface == "kv":
            return self.positions.numel()  # type: ignore[union-attr]
        return self.n_tokens  # type: ignore[return-value]

    @property
    def _mean_slots(self) -> float:
        if self.counts is not None:
            return len(self.first) + int(self.counts.sum()) / max(self.counts.numel(), 1)
        return self.slots

    @property
    def places(self) -> int:
        """Logical positions that the passage occupies in a prompt: its slots; of a ragged passage its whole span."""
        return len(self.first) + self.span[1] if self.counts is not None and self.span is not None else self.slots

    @property
    def heads_per_token(self) -> Tensor | None:
        """``[source_tokens]`` heads of all layers that keep the pair of each token; all, of a token that is read again.

        ``None`` if the pairs are not those of single tokens.
        """
        if self.counts is None or self.span is None or self.positions is None:
            return None
        start, length = self.span
        if len(self.first) + length != self.source_tokens:
            return None
        heads = torch.bincount(self.positions.cpu().long() - start, minlength=length)
        return torch.cat([heads.new_full((len(self.first),), self.counts.numel()), heads])

    @property
    def ratio(self) -> float:
        """Compression ratio L / l; infinite for zero slots, 1 for an empty passage."""
        if self.slots:
            return self.source_tokens / self._mean_slots
        return float("inf") if self.source_tokens else 1.0

    @property
    def rate(self) -> float:
        """Compression rate l / L (survey, equation 10)."""
        return self._mean_slots / self.source_tokens if self.source_tokens else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, or of the UTF-8 text."""
        if self.interface == "text":
            return len(self.text.encode("utf-8", "surrogatepass"))  # type: ignore[union-attr]
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    # -- checks and moves ------------------------------------------------------------------------------------------

    def check(self) -> CompressedPassage:
        """Returns itself, or raises ``ValueError`` if a tensor holds NaN or infinity."""
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"The compressed passage's {name} holds NaN or infinite numbers; "
                    "compress the passage again, in float32 or bfloat16 if it was float16."
                )
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CompressedPassage:
        """The same passage with its tensors on another device or in another floating dtype."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def detach(self) -> CompressedPassage:
        """The same passage, detached from its autograd graph."""
        return self.map(Tensor.detach)

    def map(self, f: Callable[[Tensor], Tensor]) -> CompressedPassage:
        """The same passage with a function applied to its tensors; the counts of a ragged one stay on the CPU."""
        if self.embeds is not None:
            return replace(self, embeds=f(self.embeds))
        if self.keys and self.values and self.positions is not None:
            return replace(
                self,
                keys=tuple(map(f, self.keys)),
                values=tuple(map(f, self.values)),
                positions=f(self.positions),
                bias=None if self.bias is None else f(self.bias),
            )
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as a file holds them; none for text."""
        if self.interface == "embeds":
            return {"embeds": self.embeds}  # type: ignore[dict-item, return-value]
        if self.interface == "kv":
            pairs = {f"keys.{i}": k for i, k in enumerate(self.keys or ())}
            pairs |= {f"values.{i}": v for i, v in enumerate(self.values or ())}
            pairs |= {"positions": self.positions, "counts": self.counts, "bias": self.bias}  # type: ignore[dict-item]
            return {name: tensor for name, tensor in pairs.items() if tensor is not None}
        return {}

    # -- safetensors round trip ------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, as a JSON-able dict that `assemble` takes back."""
        found: dict[str, Any] = {
            "interface": self.interface,
            "source_tokens": self.source_tokens,
            "compressor": self.compressor,
            "reader": self.reader,
            "text": self.text,
            "spans": self.spans,
            "n_tokens": self.n_tokens,
            "info": dict(self.info),
        }
        found |= {} if self.span is None else {"span": self.span}
        return found | ({"first": self.first} if self.first else {})

    @classmethod
    def assemble(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CompressedPassage:
        """The passage of its `facts` and its named tensors.

        Raises:
            KeyError, TypeError, ValueError: if something is missing or does not fit.
        """
        if unnamed := [name for name in tensors if not isinstance(name, str)]:
            raise TypeError(f"The name of a tensor must be a string, got {unnamed[0]!r}.")
        layers = sum(name.startswith("keys.") for name in tensors)
        kv = facts["interface"] == "kv"
        return cls(
            interface=facts["interface"],
            source_tokens=int(facts["source_tokens"]),
            compressor=facts["compressor"],
            reader=facts["reader"],
            embeds=tensors.get("embeds"),
            keys=tuple(tensors[f"keys.{i}"] for i in range(layers)) if kv else None,
            values=tuple(tensors[f"values.{i}"] for i in range(layers)) if kv else None,
            positions=tensors.get("positions"),
            text=facts["text"],
            spans=None if facts["spans"] is None else tuple((int(a), int(b)) for a, b in facts["spans"]),
            n_tokens=facts["n_tokens"],
            info=facts["info"],
            counts=tensors.get("counts"),
            bias=tensors.get("bias"),
            span=None if facts.get("span") is None else (int(facts["span"][0]), int(facts["span"][1])),
            first=tuple(facts.get("first", ())),
        )

    def to_bytes(self) -> bytes:
        """Serialises to safetensors: the tensors, and the rest as JSON in the header. Text may hold lone surrogates."""
        header = {"version": FORMAT_VERSION, **self.facts()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
        # safetensors rejects an empty file; JSON's \u escapes keep lone surrogates.
        tensors = tensors or {"empty": torch.zeros(0)}
        return save_safetensors(tensors, metadata={_HEADER: json.dumps(header)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically."""
        write_atomically(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressedPassage:
        """Reads a file written by `save`. Raises ``ValueError`` if it is damaged or of another format."""
        return cls.from_bytes(Path(path).read_bytes(), name=os.fspath(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "this") -> CompressedPassage:
        """Reads bytes written by `to_bytes`.

        Raises:
            ValueError: if the data is damaged or of another format; the message calls it ``name``.
        """
        try:
            tensors = load_safetensors(data)
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
            header = json.loads(metadata.get(_HEADER, "null"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{name} is not a readable compressed passage: {error}") from error
        if not isinstance(header, dict) or header.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{name} is no compressed passage of format {FORMAT_VERSION}: its header is {header!r:.200}."
            )
        try:
            passage = cls.assemble(header, tensors)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{name} is a damaged compressed passage: {error!r}") from error
        return passage.check()
