"""Ragged keys and values: every KV head of every layer keeps its own pairs of a passage.

A ragged passage stores one tensor per kind. The pairs of layer 0, head 0 come first, then layer 0, head 1, and so on;
``counts [layers, kv_heads]`` says how many belong to each head.
"""

from __future__ import annotations

from torch import Tensor


def check_ragged(
    keys: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, counts: Tensor, span: tuple[int, int]
) -> None:
    """Checks that the tensors of a ragged passage fit each other.

    Args:
        keys, values: ``[pairs, head_dim]``.
        bias: ``[pairs]``, or ``None``.
        positions: ``[pairs]``, where each key was computed.
        counts: ``[layers, kv_heads]``.
        span: first position and length of the block in which the keys were computed.

    Raises:
        ValueError: with what was wanted and what was got.
    """
    if counts.dim() != 2 or counts.is_floating_point() or bool((counts < 0).any()):
        raise ValueError(f"counts must be [layers, kv_heads] integers of at least 0, got {tuple(counts.shape)}.")
    pairs = int(counts.sum())
    if keys.dim() != 2 or values.dim() != 2 or len(keys) != pairs or len(values) != pairs:
        raise ValueError(
            f"The counts of the heads add up to {pairs} pairs, so keys and values must be [{pairs}, head_dim]; "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}."
        )
    if bias is not None and bias.shape != (pairs,):
        raise ValueError(f"bias must be [{pairs}], one number per pair, got {tuple(bias.shape)}.")
    start, length = span
    if positions.shape != (pairs,) or start < 0 or length < 0:
        raise ValueError(f"positions must be [{pairs}], in a span of at least 0; got {tuple(positions.shape)}, {span}.")
    if pairs and not start <= int(positions.min()) <= int(positions.max()) < start + length:
        raise ValueError(
            f"The positions of the pairs must lie in the span {start}..{start + length - 1}, "
            f"got {int(positions.min())}..{int(positions.max())}."
        )
    if pairs and int(counts.max()) > length:
        raise ValueError(f"A head keeps {int(counts.max())} pairs of a passage of {length} positions.")
