"""The attack on keys of all layers: a linear model of each head's keys, learned from public text in closed form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...compressors import CompressedPassage, Reader
from ...compressors.core.batching import pad_rows
from ...compressors.kv.encode import cached_layers
from ...compressors.reader.kv import ROTARY
from .attacker import Stolen, register_attacker
from .kv_lookup import KVLookup, stored_keys
from .targets import Target

TEXTS = 64  # public passages whose keys are fitted
RIDGE = 1e-3  # added to the features' covariance, whose diagonal is about 1
PLACES = 2048  # positions whose distances to all tokens exist at the same time


@register_attacker
class KVLayers(KVLookup):
    r"""Reads the tokens that `KVLookup` finds, and estimates the others from the keys of deeper layers.

    A head's key without rotation is modelled as Gaussian around a linear map of its token's embedding,
    :math:`k \sim N(A e_t + b, \Sigma)`, fitted by ridge regression on public text. The estimate is the token with the largest
    sum of log-likelihoods over the stored keys of its position, plus the log-frequency of the token. Ours; the inversion from
    keys to tokens by regression is that of arXiv 2508.09442, section 4, on more than one layer.
    """

    name: ClassVar[str] = "kv-layers"
    title: ClassVar[str] = "all layers' keys"

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self.maps: list[Tensor] | None = None  # of each layer [kv_heads, width + 1, head_dim], whitened
        self.whiten: list[Tensor] = []  # of each layer [kv_heads, head_dim, head_dim]
        self.sizes = torch.zeros(0)  # [layers * kv_heads, vocabulary], squared lengths of mapped tokens
        self.prior = torch.zeros(reader.vocab_size)

    def features(self, ids: Tensor) -> Tensor:
        """``[..., width + 1]``: embeddings of tokens with mean square 1, and a one."""
        wide = self.reader.embed(ids).float()
        wide = wide / wide.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return torch.cat([wide, torch.ones_like(wide[..., :1])], dim=-1)

    @torch.no_grad()
    def learn(self, texts: Sequence[str], target: Target | None = None) -> None:
        """Fit maps and covariances to public text. Raises ValueError if it has fewer tokens than an embedding has numbers."""
        ids = [found for found in self.reader.tokenize_batch(list(texts)) if found]
        counts = Counter(token for found in ids for token in found)
        frequency = torch.full((self.reader.vocab_size,), 0.1)
        frequency[list(counts)] += torch.tensor(list(counts.values()), dtype=torch.float32)
        self.prior = (frequency / frequency.sum()).log().to(self.reader.device)
        ids = ids[:TEXTS]
        if (tokens := sum(map(len, ids))) <= self.reader.width:
            raise ValueError(
                f"The keys of deeper layers are fitted to public text of more than {self.reader.width} tokens, got {tokens}."
            )
        square: Tensor | float = 0.0
        cross: list[Tensor | float] = [0.0] * len(self.reader.kv_placement.kinds)
        own: list[Tensor | float] = list(cross)
        for start in range(0, len(ids), 8):
            x, layers = self._read(ids[start : start + 8])
            square = square + (x.T @ x).double()
            for layer, k in enumerate(layers):
                cross[layer] = cross[layer] + (x.T @ k).double()
                own[layer] = own[layer] + (k.mT @ k).double()
        eye = torch.eye(square.shape[0], dtype=torch.float64, device=square.device)  # type: ignore[union-attr]
        factor = torch.linalg.cholesky(square + RIDGE * tokens * eye)
        self.maps, self.whiten = [], []
        for both, power in zip(cross, own):
            a = torch.cholesky_solve(both, factor)  # type: ignore[arg-type]
            rest = (power - a.mT @ both - both.mT @ a + a.mT @ square @ a) / tokens  # type: ignore[union-attr,operator]
            width = rest.shape[-1]
            # The first layer's keys are linear in the features, and rounding leaves next to nothing of them.
            size = power.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] / tokens  # type: ignore[union-attr]
            rest = rest + (1e-3 * size + 1e-12) * torch.eye(width, dtype=rest.dtype, device=rest.device)
            whiten = torch.linalg.inv(torch.linalg.cholesky(rest)).mT
            self.whiten.append(whiten.float())
            self.maps.append((a @ whiten).float())
        every = self.features(torch.arange(self.reader.vocab_size, device=self.reader.device))
        self.sizes = torch.stack([(every @ head).square().sum(-1) for layer in self.maps for head in layer])

    def _read(self, ids: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
        """Features ``[tokens, width + 1]`` of some texts, and of each layer the keys ``[kv_heads, tokens, head_dim]``."""
        bos, placement = self.reader.bos_ids, self.reader.kv_placement
        rows, real = pad_rows([[*bos, *found] for found in ids], 0)
        rows, mask = rows.to(self.reader.device), real.long().to(self.reader.device)
        positions = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape)
        layers = cached_layers(self.reader.model.get_decoder(), self.reader.embed(rows), mask, positions)
        used = mask.bool()
        used[:, : len(bos)] = False
        out = []
        for layer, (keys, _) in enumerate(layers):
            keys = keys.float()
            if placement.kinds[layer] == ROTARY:
                batch, heads = keys.shape[:2]
                keys = placement.rotate(keys.flatten(0, 1), -positions[0], layer).unflatten(0, (batch, heads))
            out.append(keys.transpose(1, 2)[used].transpose(0, 1))
        return self.features(rows[used]), out

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        """Raises ValueError before `learn`."""
        passages = [one for one in stolen if isinstance(one, CompressedPassage)]
        return [self.text(passage, tokens) for passage, tokens in zip(passages, self.estimates(passages))]

    @torch.no_grad()
    def estimates(self, passages: Sequence[CompressedPassage]) -> list[dict[int, int]]:
        """Tokens of each passage by their position, after its `first` tokens. Raises ValueError before `learn`."""
        if self.maps is None:
            raise ValueError("This attacker learns from public text first: call learn(texts).")
        found = [self.tokens(one) for one in passages]
        left = self._left(passages, found)
        for start in range(0, len(left), PLACES):
            part = left[start : start + PLACES]
            for (i, place), token in zip(part, self._estimate(passages, part)):
                found[i][place] = token
        return found

    def _left(self, passages: Sequence[CompressedPassage], found: Sequence[dict[int, int]]) -> list[tuple[int, int]]:
        """Passage and position of the tokens that only deeper layers hold."""
        out = []
        for i, passage in enumerate(passages):
            heads = stored_keys(passage, self.reader, range(len(self.whiten)))
            places = {int(place) for keys in heads for place in keys.at}
            out += [(i, place) for place in sorted(places - found[i].keys())]
        return out

    def _estimate(self, passages: Sequence[CompressedPassage], wanted: Sequence[tuple[int, int]]) -> list[int]:
        """The likeliest token at each of the wanted places, given as passage and position.

        Of the squared distances between whitened keys and mapped embeddings, summed over the keys of a place, what depends on
        the token is ``-2 f(t) . sum_k A k + sum_k |A' f(t)|^2`` with the features f: one product with the vocabulary.
        """
        device, maps = self.reader.device, self.maps or []
        row = {place: n for n, place in enumerate(wanted)}
        pulls = torch.zeros(len(wanted), self.reader.width + 1, device=device)
        held = torch.zeros(len(wanted), self.sizes.shape[0], device=device)
        for i in sorted({i for i, _ in wanted}):
            for found in stored_keys(passages[i], self.reader, range(len(maps))):
                mine = [n for n, place in enumerate(found.at.tolist()) if (i, place) in row]
                rows = torch.tensor([row[i, int(found.at[n])] for n in mine], dtype=torch.long, device=device)
                whitened = found.keys[mine] @ self.whiten[found.layer][found.head]
                pulls.index_add_(0, rows, whitened @ maps[found.layer][found.head].T)
                held[rows, found.layer * len(maps[found.layer]) + found.head] = 1.0
        every = self.features(torch.arange(self.reader.vocab_size, device=device))
        total = held @ self.sizes - 2 * (pulls @ every.T) - 2 * self.prior
        return total.argmin(-1).tolist()
