"""The gist mask: one pass over passages, their gist tokens and the rest of the prompt, which sees the gist tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nutgraf.compressors.core.passage import CompressedPassage
from nutgraf.compressors.kv.gist import GistCompressor
from nutgraf.compressors.reader.plan import TOKEN
from nutgraf.compressors.slots.segments import Segment
from torch import Tensor


@dataclass(frozen=True)
class Gisted:
    """A passage that stands in a prompt in full, its gist tokens behind it. For `masked_logits`."""

    text: str


def gist_mask(gist: Tensor, valid: Tensor | None = None, *, neg_control: bool = False) -> Tensor:
    """The paper's mask for rows ``[what is compressed][gist tokens][the rest]``, causality included.

    In each row of the batch, positions up to and including the last gist token see the positions up to the last gist token;
    positions behind it see from the first gist token on. Tokens between two gist tokens therefore stay visible. A row
    without a gist token is plainly causal.

    Args:
        gist: ``[batch, time]`` bool, where gist tokens stand.
        valid: ``[batch, time]`` bool, False at padding on either side; default: no padding. Padding sees only itself.
        neg_control: the paper's negative control: what stands behind the gist tokens does not see them either.

    Returns:
        ``[batch, 1, time, time]`` bool, True where the row's position may look at the column's.

    Raises:
        ValueError: if the shapes or dtypes are others.
    """
    for name, given in (("gist", gist), ("valid", gist if valid is None else valid)):
        if given.dim() != 2 or given.dtype != torch.bool or given.shape != gist.shape:
            raise ValueError(
                f"{name} must be a bool tensor [batch, time] = {list(gist.shape)}, got {given.dtype} {list(given.shape)}."
            )
    time = gist.shape[1]
    at = torch.arange(time, device=gist.device)
    row, column = at[:, None], at[None, :]
    first = torch.where(gist, at, time).amin(1)[:, None, None]
    last = torch.where(gist, at, -1).amax(1)[:, None, None]
    behind = column > last if neg_control else column >= first
    seen = torch.where(row > last, behind, column <= last) | ~gist.any(1)[:, None, None]
    return _causal(seen, torch.ones_like(gist) if valid is None else valid)


def passages_mask(block: Tensor, gist: Tensor, valid: Tensor) -> Tensor:
    """The mask for several passages in one prompt, each with its own gist tokens; causality included.

    A passage and its gist tokens see themselves alone. The prompt's own text sees itself and all gist tokens before it.

    Args:
        block: ``[batch, time]`` int64, 0 for the prompt's own text, else the number of the passage (or segment).
        gist: ``[batch, time]`` bool, where gist tokens stand.
        valid: ``[batch, time]`` bool, False at padding.

    Returns:
        ``[batch, 1, time, time]`` bool, True where the row's position may look at the column's.
    """
    own = block[:, :, None] == block[:, None, :]
    text = (block == 0)[:, :, None] & gist[:, None, :]
    return _causal(own | text, valid)


def _causal(seen: Tensor, valid: Tensor) -> Tensor:
    time = valid.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool, device=valid.device).tril()
    own = torch.eye(time, dtype=torch.bool, device=valid.device)  # so that no softmax runs over nothing
    seen = seen & causal & valid[:, None, :] & valid[:, :, None]
    return (seen | own)[:, None]


@dataclass
class _Row:
    """A prompt in full: ids (0 at gist tokens), logical positions, block numbers, 1 at gist tokens; and its segments."""

    ids: list[int]
    positions: list[int]
    block: list[int]
    gist: list[int]
    segments: list[tuple[list[int], int]]

    def add(self, ids: Sequence[int], start: int, block: int, gist: bool = False) -> None:
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.block += [block] * len(ids)
        self.gist += [int(gist)] * len(ids)


def masked_logits(
    compressor: GistCompressor,
    prompts: Sequence[Sequence[Any]],
    targets: Sequence[str] | Sequence[Sequence[int]],
    *,
    ratio: float | None = None,
) -> list[Tensor]:
    """What `Reader.target_logits` gives with compressed passages, in one pass with the passages in full under the gist mask.

    Positions are logical: the prompt's text and the gist tokens count on as if the passages were not there, and every
    passage ends right before its first gist token. Differentiable.

    Args:
        compressor: a gist compressor whose tuned model reads too.
        prompts: lists of strings and `Gisted` passages in reading order.
        targets: for each prompt the text that follows, or its ids.
        ratio: compression ratio; ``None``: the config's.

    Returns:
        For each prompt the logits ``[target tokens, vocabulary]``.

    Raises:
        ValueError: if the reader is not tuned with the compressor, slots are spread, or a prompt ends with a passage.
    """
    config, reader = compressor.config, compressor.reader
    if not config.adapt_reader or config.positions != "append":
        raise ValueError(
            "One masked pass needs adapt_reader=True, as one model must compress and read, and positions='append', as a gist "
            f"token can stand at one position only; got {config.adapt_reader} and {config.positions!r}."
        )
    if len(prompts) != len(targets):
        raise ValueError(f"One target a prompt is needed: got {len(prompts)} prompts and {len(targets)} targets.")
    wanted = [reader.tokenize(t) if isinstance(t, str) else list(t) for t in targets]
    rows = [_lay_out(compressor, p, ids, ratio) for p, ids in zip(prompts, wanted)]
    time = max(len(row.ids) for row in rows)

    def stack(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([part + [fill] * (time - len(part)) for part in lists], device=reader.device)

    ids, block = stack([row.ids for row in rows], 0), stack([row.block for row in rows], 0)
    positions, gist = stack([row.positions for row in rows], 0), stack([row.gist for row in rows], 0).bool()
    valid = stack([[1] * len(row.ids) for row in rows], 0).bool()
    allowed = passages_mask(block, gist, valid)
    reader.kv_placement.check_length(int(positions.max()) + 1)
    tokens = reader.embed(ids)
    segments = [segment for row in rows for segment in row.segments]
    memory = compressor.memory_inputs([Segment(ids, slots, []) for ids, slots in segments])
    source = torch.cat([tokens.new_zeros(0, reader.width), *memory]).to(tokens.dtype)
    decoder = compressor.encoder.decoder
    hidden = decoder(
        inputs_embeds=tokens.index_put(torch.where(gist), source),
        attention_mask=reader.kv_placement.additive(allowed, reader.dtype),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    ends = [len(row.ids) for row in rows]
    return [reader.head(h[end - len(target) : end]) for h, end, target in zip(hidden, ends, wanted)]


def _lay_out(compressor: GistCompressor, prompt: Sequence[Any], target: Sequence[int], ratio: float | None) -> _Row:
    """The prompt and its target but for the last token, as the reader plans it, with every passage written out."""
    reader = compressor.reader
    if compressor.config.query_aware:
        raise ValueError("The single masked pass knows no questions.")
    bos = list(reader.bos_ids)
    atoms: list[Any] = []
    passages: list[tuple[list[int], list[tuple[int, int]]]] = []
    for atom in prompt:
        if isinstance(atom, Gisted):
            ids = reader.tokenize(atom.text)
            cut = compressor.segments(len(ids), ratio)
            passages += [(ids, cut)] if cut else []
            counted = torch.zeros(sum(n for _, n in cut), reader.width)  # a stand-in, for the planner to count
            atom = CompressedPassage("embeds", len(ids), "stand-in", reader.fingerprint, embeds=counted)
        atoms.append(atom)
    plan = reader.plan([atoms])[0]
    if not target or plan.kinds[-1] != TOKEN:
        raise ValueError("A prompt must end with text, and a target needs at least one token.")
    plan.add_tokens(target[:-1])
    starts = {start: passage for (start, _), passage in zip(plan.soft, passages)}
    row = _Row([], [], [], [], [])
    at = blocks = 0
    while at < len(plan):
        if at not in starts:
            row.add([plan.ids[at]], at, 0)
            at += 1
            continue
        ids, cut = starts[at]
        for tokens, slots in cut:
            blocks += 1
            row.segments.append((ids[:tokens], slots))
            hidden = bos + ids[:tokens]
            ids = ids[tokens:]
            row.add(hidden, at - len(hidden), blocks)
            row.add([0] * slots, at, blocks, gist=True)
            at += slots
    shift = max(
        0, -min(row.positions)
    )  # a long passage at the front would begin below 0; rotations know differences alone
    row.positions = [p + shift for p in row.positions]
    return row
