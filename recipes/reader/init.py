"""Initial weights of the small reader: token embeddings from a retrieval embedder, copying heads set by hand.

A small transformer learns to copy from its context only after millions of tokens. Here the attention patterns of copying
are written into the initial weights, and trained further like all others:

- in layer 0 one head attends to the previous token and writes its content into a workspace of the residual stream;
- in layers 1 and 2 heads attend to positions whose previous token equals the current one, and raise the token there;
- in the last two layers the first head of each key-value group raises the token it attends to; training teaches these
  heads to point at answers.

The residual stream (width d) has 1 constant channel, d - 1 - head_dim channels of token content, and head_dim channels of
workspace that start at zero. The constant channel lets a head attend by position (Llama attention has no biases). Content is
matched in slowly rotating channels of the rotary embedding, so that distance does not blur it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTENT_STD = 1.0  # of a content channel: large beside what fresh layers add, so that a token stays what it is
FINAL_GAIN = 0.1  # of the last norm: brings the logits of such embeddings back to the usual size
SLOW, FAST = 0.004, 0.09  # radians a token: content is matched below SLOW, positions are told apart above FAST


def orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random [rows, columns] matrix with orthonormal rows (or columns, whichever are fewer)."""
    q, _ = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))
    return (q if rows >= columns else q.T)[:rows, :columns].contiguous()


@torch.no_grad()
def word_rows(tokenizer: PreTrainedTokenizerFast, folder: Path, width: int, seed: int = 0) -> Tensor:
    """Embeddings ``[vocabulary, width]`` of unit variance for the tokens, from word-piece embeddings of a BERT-like model.

    Averages the embeddings of each token's word pieces, removes the mean, and keeps principal components with the square
    root of their spectrum. Two random directions mark capitals and word continuations; noise separates equal strings.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces.no_padding()
    pieces.no_truncation()
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        key = next(name for name in file.keys() if name.endswith("embeddings.word_embeddings.weight"))  # noqa: SIM118
        table = file.get_tensor(key).float()
    rows = torch.zeros(len(tokenizer), table.shape[1])
    capital, inner = torch.zeros(len(tokenizer), 1), torch.zeros(len(tokenizer), 1)
    specials = set(tokenizer.all_special_ids)
    for index in range(len(tokenizer)):
        text = "" if index in specials else str(tokenizer.decode([index]))
        word = text.strip()
        joined = pieces.token_to_id("##" + word.lower()) if text == word else None
        found = [joined] if joined is not None else pieces.encode(word, add_special_tokens=False).ids
        if found:
            rows[index] = table[found].mean(0)
        capital[index], inner[index] = float(word[:1].isupper()), float(bool(word) and text == word)
    known = rows.abs().sum(1) > 0
    rows[known] -= rows[known].mean(0)
    _, scale, basis = torch.linalg.svd(rows, full_matrices=False)
    kept = min(width, len(scale))
    rows = rows @ basis[:kept].T / scale[:kept].sqrt()
    rows = torch.cat([rows, torch.zeros(len(rows), width - kept)], 1)
    rows[known] /= rows[known].std()
    for mark in (capital, inner):
        rows += 0.5 * mark * torch.randn(1, width, generator=generator)
    rows[~known] = 0
    rows += torch.randn(rows.shape, generator=generator) * torch.where(known, 0.3, 1.0)[:, None]
    return rows / rows.std()


@torch.no_grad()
def start_copying(model: LlamaForCausalLM, content: Tensor | None = None, seed: int = 0) -> None:
    """Sets embeddings and copying heads of a new model, in place.

    `content` is ``[vocabulary, d - 1 - head_dim]`` (see `word_rows`), random if None. Raises ValueError for a wrong shape, or
    a rotary base too small for a slow channel.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    width, size, half = config.hidden_size, config.head_dim, config.head_dim // 2
    content_width = width - 1 - size
    if content_width < size:
        raise ValueError(
            f"hidden_size {width} leaves {content_width} channels beside a head of {size}: widen the model."
        )
    if content is None:
        content = torch.randn(config.vocab_size, content_width, generator=generator)
    if content.shape != (config.vocab_size, content_width):
        raise ValueError(f"content is {tuple(content.shape)}; this model takes ({config.vocab_size}, {content_width}).")
    tokens, workspace = slice(1, 1 + content_width), slice(1 + content_width, width)
    table = model.model.embed_tokens.weight
    table[:, 0] = 4 * CONTENT_STD
    table[:, tokens] = CONTENT_STD * content.to(table)
    table[:, workspace] = 0
    model.model.norm.weight.fill_(FINAL_GAIN)
    speed = model.model.rotary_emb.inv_freq.float()
    slow = [i for i in range(half) if speed[i] < SLOW]
    channels = slow + [i + half for i in slow]
    if not channels:
        raise ValueError("No rotary channel rotates slowly enough to match content by: raise rope_theta (1e6 does).")
    probe = orthogonal(len(channels), content_width, generator)
    _attend_back(model, speed, offset=1)
    _write_workspace(model, probe, tokens, workspace)
    heads = config.num_attention_heads // config.num_key_value_heads
    for layer in range(1, min(3, config.num_hidden_layers)):
        for head in range(0, config.num_attention_heads, heads):
            _match_workspace(model, layer, head, probe, channels, tokens, workspace)
            _raise_token(model, layer, head, orthogonal(size, content_width, generator), tokens)
    for layer in range(max(3, config.num_hidden_layers - 2), config.num_hidden_layers):
        basis = orthogonal(min(config.num_key_value_heads * size, content_width), content_width, generator)
        for group in range(len(basis) // size):
            _raise_token(model, layer, group * heads, basis[group * size : (group + 1) * size], tokens)


def _rows(model: LlamaForCausalLM, head: int) -> tuple[slice, slice]:
    """Rows of a head in q_proj, and of its group in k_proj and v_proj."""
    config: Any = model.config
    group, size = head // (config.num_attention_heads // config.num_key_value_heads), config.head_dim
    return slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)


def _attend_back(model: LlamaForCausalLM, speed: Tensor, offset: int, gain: float = 1.6) -> None:
    """Layer 0, head 0 attends `offset` tokens back: key and query from the constant channel, turned by the offset."""
    attention, (query, key) = model.model.layers[0].self_attn, _rows(model, 0)
    q, k = attention.q_proj.weight[query], attention.k_proj.weight[key]
    half = len(speed)
    q.zero_()
    k.zero_()
    for i in range(half):
        if speed[i] > FAST:
            angle = -float(speed[i]) * offset
            k[i, 0] = gain
            q[i, 0], q[i + half, 0] = gain * math.cos(angle), gain * math.sin(angle)


def _write_workspace(model: LlamaForCausalLM, probe: Tensor, tokens: slice, workspace: slice) -> None:
    """Layer 0, head 0 writes the probed content of the token it attends to into the workspace."""
    attention, (query, key) = model.model.layers[0].self_attn, _rows(model, 0)
    count = len(probe)
    value, out = attention.v_proj.weight[key], attention.o_proj.weight[:, query]
    value.zero_()
    out.zero_()
    value[:count, tokens] = probe.to(value)
    out[workspace][:count, :count] = 1.5 * CONTENT_STD * torch.eye(count)


def _match_workspace(
    model: LlamaForCausalLM, layer: int, head: int, probe: Tensor, channels: list[int], tokens: slice, workspace: slice
) -> None:
    """The head attends to places whose workspace holds the content of the present token."""
    attention, (query, key) = model.model.layers[layer].self_attn, _rows(model, head)
    q, k = attention.q_proj.weight[query], attention.k_proj.weight[key]
    q.zero_()
    k.zero_()
    for row, channel in enumerate(channels):
        q[channel, tokens] = 2.0 * probe[row].to(q)
        k[channel, workspace.start + row] = 2.0


def _raise_token(model: LlamaForCausalLM, layer: int, head: int, probe: Tensor, tokens: slice) -> None:
    """The head adds the content of the token it attends to, seen through `probe` [head_dim, content], to the stream."""
    attention, (query, key) = model.model.layers[layer].self_attn, _rows(model, head)
    value, out = attention.v_proj.weight[key], attention.o_proj.weight[:, query]
    value.zero_()
    out.zero_()
    value[:, tokens] = probe.to(value)
    out[tokens] = 3.0 * CONTENT_STD * probe.T.to(out)
