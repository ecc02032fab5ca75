"""A prompt with ragged KV passages in one pass over all its tokens, with eager attention written out here."""

from __future__ import annotations

import sys

import pytest
import torch
from nutgraf import Reader

LOW = torch.finfo(torch.float32).min


def one_pass(reader: Reader, pieces: list, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Last logits of one pass over everything: a passage's tokens see themselves, the rest sees what heads keep."""
    ids, blocks, passages = list(reader.bos_ids), [0] * len(reader.bos_ids), {}
    for text, passage in pieces:
        new = reader.tokenize(text)
        if passage is not None:
            passages[len(ids)] = passage
        blocks += [len(ids) if passage is not None else 0] * len(new)
        ids += new
    n, block = len(ids), torch.tensor(blocks)
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & ((block[:, None] == 0) | (block[:, None] == block))

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs):
        heads = key.shape[1]
        bias = torch.zeros(heads, n, n).masked_fill(~allowed, LOW)
        for start, passage in passages.items():
            counts = passage.counts.flatten().tolist()
            layer = range(module.layer_idx * heads, (module.layer_idx + 1) * heads)
            for head, i in enumerate(layer):
                part = slice(sum(counts[:i]), sum(counts[: i + 1]))
                row = torch.full((passage.places,), LOW)
                row[passage.positions[part] - passage.span[0]] = 0.0 if passage.bias is None else passage.bias[part]
                after = (torch.arange(n) >= start + passage.places) & (block == 0)  # the passage itself is read in full
                bias[head, after, start : start + passage.places] = row
        groups = query.shape[1] // heads
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = (scores + bias.repeat_interleave(groups, 0)).softmax(-1)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights

    own = reader.model.config._attn_implementation
    module = sys.modules[type(reader.model).__module__]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", attend)
        reader.model.set_attn_implementation("eager")
        whole = torch.tensor([ids])
        logits = reader.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, -1]
    reader.model.set_attn_implementation(own)
    return logits
