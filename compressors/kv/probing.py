"""Read passages followed by probes, and record what every layer asks for and holds.

One row of a batch is ``[BOS][passage][probe][probe]...``. A probe sees the BOS, the passage and itself, and stands right
after the passage; so one pass reads every probe as if it were the only one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..fidelity.questions import ASKED, make_questions
from ..reader.attention import attending
from ..reader.kv import position_arguments
from ..reader.reader import Reader

REPEAT = ("\n\nRepeat the previous context exactly.", "\n")  # as in KVzip
SHORTEST_REPEAT = 8  # tokens of a passage in one repetition, at least


@dataclass
class LayerEvidence:
    """Of one layer, keys and queries as they were rotated.

    Attributes:
        front: ``[batch, kv_heads, BOS tokens, head_dim]`` keys of the BOS.
        keys, values: ``[batch, kv_heads, n, head_dim]`` of the passages, padded at the end.
        own: ``[batch, heads, n, head_dim]`` queries of the passages.
        queries: ``[batch, heads, m, head_dim]`` queries of the probes, padded at the end.
        asked: ``[batch, kv_heads, m, head_dim]`` keys of the probes.
        scaling: factor of the scores.
        softcap: limit of the scores, as in Gemma 2, or ``None``.
        attended: attention of the probes to the passage, once it was computed for `shared` evidence.
        states: ``[batch, n + m, hidden]`` residual stream that enters the layer, of passages and probes, if asked for.
    """

    front: Tensor
    keys: Tensor
    values: Tensor
    own: Tensor
    queries: Tensor
    asked: Tensor
    scaling: float
    softcap: float | None
    attended: Tensor | None = None
    states: Tensor | None = None


@dataclass
class Evidence:
    """What a pass over a batch of passages recorded.

    Attributes:
        start: position of the passages' first token.
        tokens: ``[batch, n]`` bool, false at padding.
        rows: ``[batch, m]`` bool, false at padding.
        seen: ``[batch, m, m]`` bool, which tokens of the probes each of them sees.
        layers: in order.
        shared: whether several ratios use it, so that attention is kept.
        protected: ``[batch, n]`` bool, tokens whose pairs must stay in every head.
    """

    start: int
    tokens: Tensor
    rows: Tensor
    seen: Tensor
    layers: list[LayerEvidence] = field(default_factory=list)
    shared: bool = False
    protected: Tensor | None = None

    def behind(self, tokens: int) -> Evidence:
        """The same evidence with so many first tokens of each passage at the front, as the BOS is: no pairs of theirs count."""
        if not tokens:
            return self
        layers = [
            replace(
                layer,
                front=torch.cat([layer.front, layer.keys[:, :, :tokens]], 2),
                keys=layer.keys[:, :, tokens:],
                values=layer.values[:, :, tokens:],
                own=layer.own[:, :, tokens:],
                attended=None if layer.attended is None else layer.attended[..., tokens:],
                states=None if layer.states is None else layer.states[:, tokens:],
            )
            for layer in self.layers
        ]
        return replace(self, start=self.start + tokens, tokens=self.tokens[:, tokens:], layers=layers)

    def enter(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Records a layer and changes nothing (a `Door`)."""
        passage = slice(self.start, self.start + self.tokens.shape[1])
        q, k, v = (tensor.to(self.tokens.device) for tensor in (query, key, value))
        self.layers.append(
            LayerEvidence(
                front=k[:, :, : self.start],
                keys=k[:, :, passage],
                values=v[:, :, passage],
                own=q[:, :, passage],
                queries=q[:, :, passage.stop :],
                asked=k[:, :, passage.stop :],
                scaling=options.get("scaling") or q.shape[-1] ** -0.5,
                softcap=options.get("softcap"),
            )
        )
        return key, value, mask


def write_probes(
    reader: Reader, text: str, needs: str, count: int, query: str | None, room: int | None = None
) -> list[list[int]]:
    """Token ids of what is read after a passage: rule-made questions, the passage again, or the user's question.

    Args:
        reader: whose tokens.
        text: the passage.
        needs: ``"questions"``, ``"repetition"`` or ``"query"``.
        count: questions at most; a passage that none can be made of is repeated.
        query: the user's question.
        room: tokens that fit after the passage. Longer questions are left out; a longer repetition is divided, as in KVzip.
    """
    if needs == "query":
        return reader.tokenize_batch([ASKED.format(question=query)])
    made = make_questions(text, count, random.Random(0)) if needs == "questions" else []
    written = reader.tokenize_batch([f"{ASKED.format(question=question)} {answer}" for question, answer in made])
    written = [probe for probe in written if room is None or len(probe) <= room]
    if written:
        return written
    *opening, passage = reader.tokenize_batch([*REPEAT, text])
    opened = [i for part in opening for i in part]
    most = len(passage) if room is None else max(SHORTEST_REPEAT, room - len(opened))
    return [[*opened, *passage[start : start + most]] for start in range(0, len(passage), most)]


def read(
    reader: Reader,
    passages: Sequence[Sequence[int]],
    probes: Sequence[Sequence[Sequence[int]]],
    *,
    states: bool = False,
) -> Evidence:
    """Reads passages, each followed by its own probes.

    Args:
        reader: the reader.
        passages: token ids of each, BOS left out.
        probes: token ids of each passage's probes.
        states: also record the residual stream.
    """
    bos, device = list(reader.bos_ids), reader.device
    n, m = max(map(len, passages)), max((sum(map(len, asked)) for asked in probes), default=0)
    width, start = len(bos) + n + m, len(bos)
    ids = torch.zeros(len(passages), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    block = torch.full_like(ids, -1)  # 0: BOS and passage, which all see; 1, 2, ...: probes; -1: padding
    for row, (passage, asked) in enumerate(zip(passages, probes)):
        end = start + len(passage)
        ids[row, :end] = torch.tensor([*bos, *passage])
        positions[row, :end] = torch.arange(end)
        block[row, :end] = 0
        at = start + n
        for number, probe in enumerate(asked, 1):
            to = at + len(probe)
            ids[row, at:to] = torch.tensor(probe)
            positions[row, at:to] = torch.arange(end, end + len(probe))
            block[row, at:to] = number
            at = to
    ids, positions, block = ids.to(device), positions.to(device), block.to(device)
    own = block[:, :, None] == block[:, None]
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    allowed = causal & (own | (block[:, None] == 0))
    mask = reader.kv_placement.additive(allowed[:, None], reader.dtype)
    after = slice(start + n, None)
    evidence = Evidence(start, block[:, start : start + n] == 0, block[:, after] > 0, allowed[:, after, after])
    decoder = reader.model.get_decoder()
    with attending(reader.model, evidence):
        out = decoder(
            inputs_embeds=reader.embed(ids),
            attention_mask=mask,
            use_cache=False,
            output_hidden_states=states,
            **position_arguments(decoder, positions),
        )
    for layer, entered in zip(evidence.layers, out.hidden_states if states else ()):
        layer.states = entered[:, start:].to(device)
    return evidence
