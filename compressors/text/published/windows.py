"""LLMLingua's token filter as released: window by window, by the losses given the tokens kept so far. See `llmlingua`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...reader.kv import position_arguments
from ...reader.reader import Reader
from ..scoring import token_losses

_SINKS = 10  # first tokens, which stay in the cache


class CachedLosses:
    """Next-token losses of a row whose end changes: the unchanged start stays in a KV cache and is not read again.

    A token's position is the number of cached tokens when it is read. Dropping tokens from the middle later moves no
    position.
    """

    def __init__(self, scorer: Reader) -> None:
        self.scorer = scorer
        self._decoder: nn.Module = scorer.model.get_decoder()  # type: ignore[assignment]
        self._cache = DynamicCache()

    def __len__(self) -> int:
        return int(self._cache.get_seq_length())

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Reads the whole row ``ids`` ``[tokens]``, which begins with the cached tokens, to its last token but one.

        Returns:
            ``[tokens - cached - 1]`` losses, float32 on the CPU: entry i belongs to token ``cached + i + 1``.
        """
        device, known = self.scorer.device, len(self)
        new = ids[known:-1]
        if not len(new):
            return torch.zeros(0)
        positions = torch.arange(known, known + len(new), device=device)[None]
        hidden = self._decoder(
            input_ids=new[None].to(device),
            past_key_values=self._cache,
            use_cache=True,
            **position_arguments(self._decoder, positions),
        ).last_hidden_state[0]
        return token_losses(self.scorer, hidden, ids[known + 1 :].to(device)).cpu()

    def drop(self, start: int, number: int | None = None) -> None:
        """Drops ``number`` tokens from ``start`` on; ``None``: all of them."""
        layers: list[Any] = self._cache.layers
        end = len(self) if number is None else start + number
        self._cache = DynamicCache()
        for i, layer in enumerate(layers):
            pairs = (layer.keys, layer.values)
            keys, values = (torch.cat([t[..., :start, :], t[..., end:, :]], -2) for t in pairs)
            if keys.shape[-2]:
                self._cache.update(keys, values, i)


def window_plan(
    lengths: Sequence[int], target: float, size: int, shifts: Sequence[float]
) -> list[list[tuple[int, float]]]:
    """The stretches ``(tokens, keep ratio)`` of each window; a window may span several contexts.

    Args:
        lengths: tokens of each context, plus 2 for its separator.
        target: tokens to keep; the common ratio is ``target / (sum(lengths) + 1)``.
        size: tokens per window; the first has one less.
        shifts: added to the common ratio, then clamped to [0, 1].
    """
    common = target / (sum(lengths) + 1)
    plan: list[list[tuple[int, float]]] = []
    window: list[tuple[int, float]] = []
    filled = 1
    for length, shift in zip(lengths, shifts):
        ratio = max(min(1, common + shift), 0)
        if filled + length < size:
            window.append((length, ratio))
            filled += length
            continue
        plan.append([*window, (size - filled, ratio)])
        filled += length - size
        if filled > size:
            whole, filled = divmod(filled, size)
            plan += [[(size, ratio)]] * whole
        window = [(filled, ratio)] if filled else []
    return [*plan, window] if window else plan


def keep_tokens(
    scorer: Reader,
    ids: Sequence[int],
    plan: Sequence[Sequence[tuple[int, float]]],
    size: int,
    *,
    start: int = 0,
    compare: bool = False,
    split: int | None = None,
) -> list[int]:
    """Indices of the kept tokens, without the prefix.

    Args:
        scorer: the causal LM.
        ids: prefix and text, without BOS.
        plan: see `window_plan`.
        size: tokens per window.
        start: tokens of the prefix.
        compare: threshold the loss without the prefix minus the loss after it, instead of the loss.
        split: a token that stays if it is doubled in the text, and is not kept twice in a row otherwise.
    """
    limit = len(ids) if scorer.max_positions is None else scorer.max_positions
    if limit < len(ids) and limit < start + _SINKS + 2 * size:
        raise ValueError(
            f"mode='published' slides windows of {size} tokens after {start + _SINKS} over {len(ids)} tokens, but "
            f"{scorer.name!r} has {limit} positions; give a smaller iterative_size or mode='fast'."
        )
    tokens, alive = torch.tensor(ids, dtype=torch.long), torch.arange(len(ids))
    flags = _doubled(tokens, split)
    gone: list[Tensor] = []  # indices of kept tokens beyond the model's positions
    end = min(size + start, len(ids))
    behind = alone = torch.zeros(0)  # entry i belongs to token i: the loss of the token after it
    asked, bare = CachedLosses(scorer), CachedLosses(scorer)
    ready = ready_alone = 0
    for step, stretches in enumerate(plan):
        if end > len(tokens):
            break
        if step > 1 and end > limit:
            over = end - limit
            asked.drop(min(_SINKS + start, limit), over)
            if compare:
                bare.drop(min(_SINKS + start, len(bare) - over), over)
            gone.append(alive[:over])
            tokens, alive, flags = tokens[over:], alive[over:], flags[over:]
            end, ready, ready_alone = end - over, ready - over, ready_alone - over
        stop = end if step else min(len(tokens), limit)
        found = asked.read(tokens[:stop])
        if not len(found):
            break
        behind = _renew(behind, found, ready) if step else found
        asked.drop(end - size if step else 0)
        if compare:
            found = bare.read(tokens[start:stop])
            alone = _renew(alone, found, ready_alone) if step else found
            bare.drop(max(end - size - start, 0) if step else 0)
        ready = 0 if start and not step else end - size
        ready_alone = 0 if start and not step else end - start - size
        for length, ratio in stretches:
            score = alone[: len(behind) - start] - behind[start:] if compare else behind
            above = score > _threshold(score, ratio)
            keep = torch.cat([behind[:start] > 0, above, behind[:1] > 0] if compare else [above, behind[:1] > 0])
            # These slices count from the end where they are negative, as they do in a text shorter than a window.
            border = end - size + length
            keep[border:] = True
            keep[: border - length] = True
            behind = behind[keep[:-1]]
            if compare:
                keep = _fit(keep, max(len(keep), len(alone) + start + 1))
                alone = alone[keep[start:-1]]
            keep = _fit(keep, len(tokens)) | flags
            if split is not None:
                _drop_repeats(keep, tokens == split, flags, max(border - length, 0), border)
            tokens, alive, flags = tokens[keep], alive[keep], flags[keep]
            end = border - int((~keep[:border]).sum()) + size
    return torch.cat([*gone, alive])[start:].tolist()


def _renew(past: Tensor, found: Tensor, ready: int) -> Tensor:
    """Replaces the known losses from ``ready`` on."""
    upto = ready + len(found)
    past = torch.cat([past, torch.zeros(max(0, upto - len(past)))])
    past[ready:upto] = found
    return past


def _threshold(losses: Tensor, ratio: float) -> float:
    """The loss at rank ``int(n * ratio) - 1``, largest first."""
    if ratio == 1.0 or not len(losses):
        return float("-inf")
    rank = max(0, min(len(losses) - 1, int(len(losses) * ratio) - 1))
    return float(losses.sort(descending=True).values[rank])


def _fit(keep: Tensor, length: int) -> Tensor:
    """Cuts to a length, or pads with tokens that stay."""
    return torch.cat([keep, torch.ones(max(0, length - len(keep)), dtype=torch.bool)])[:length]


def _doubled(tokens: Tensor, split: int | None) -> Tensor:
    """Marks split tokens next to another one."""
    found = tokens == split if split is not None else torch.zeros(len(tokens), dtype=torch.bool)
    beside = torch.zeros_like(found)
    beside[1:] |= found[:-1]
    beside[:-1] |= found[1:]
    return found & beside


def _drop_repeats(keep: Tensor, split: Tensor, flags: Tensor, start: int, end: int) -> None:
    """Drops a kept split token if the last kept token is one too, unless it is flagged."""
    last = False
    for i in range(start, min(end, len(keep))):
        if keep[i]:
            if split[i] and last and not flags[i]:
                keep[i] = False
            else:
                last = bool(split[i])
