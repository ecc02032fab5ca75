"""Scores of keys and values against the released kvpress (Apache-2.0), pair by pair, on a reader without a BOS.

kvpress 0.5.5 pins an older transformers; its scores work with ours too, so it is installed without its dependencies:

    pip install --no-deps --target peer kvpress==0.5.5 'cachetools<6' 'fire<0.7' termcolor
    PYTHONPATH=peer python -m nutgraf.benchmarks.studies.kvpress_release --out benchmarks/results/kvpress.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache

from ...compressors import Reader
from ...compressors.kv.probing import REPEAT, read, write_probes
from ...compressors.kv.selection import SCORES
from ...compressors.kv.surrogate import QueryStatistics
from ..loading import find_reader, find_records
from ..rows import append_rows, clean, provenance

Score = Callable[[Any, Tensor, Any, dict[str, Any]], Tensor]


def score_layers(reader: Reader, passes: Sequence[Sequence[int]], score: Score) -> list[Tensor]:
    """Run token ids through the reader, on one cache, and return what ``score`` says of each layer in the last pass."""
    model, cache = reader.model.model, DynamicCache()
    found: list[Tensor] = []
    for number, ids in enumerate(passes, 1):
        hooks = []
        if number == len(passes):
            for layer in model.layers:
                layer.self_attn.rotary_emb = model.rotary_emb  # where kvpress looks for it

                def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                    found.append(score(module, kwargs["hidden_states"], cache.layers[module.layer_idx], kwargs))

                hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        try:
            model(input_ids=torch.tensor([list(ids)], device=reader.device), past_key_values=cache)
        finally:
            for handle in hooks:
                handle.remove()
    return found


def peer_scores(
    reader: Reader, ids: list[int], question: list[int], statistics: QueryStatistics
) -> dict[str, list[Tensor]]:
    """Per method and layer ``[kv_heads, n]``, as kvpress scores the pairs of a passage."""
    from kvpress import ExpectedAttentionPress, ExpectedAttentionStatsPress, KeyDiffPress, KVzipPress, SnapKVPress

    stats = ExpectedAttentionStatsPress(n_sink=1)
    stats.mu, stats.cov = statistics.mean, statistics.covariance

    def plain(press: Any) -> Score:
        return lambda module, hidden, cache, kwargs: press.score(
            module, hidden, cache.keys, cache.values, None, kwargs
        )[0]

    zip_press = KVzipPress()
    layers, heads = reader.model.config.num_hidden_layers, reader.model.config.num_key_value_heads
    zip_press.context_length = zip_press.end_idx = len(ids)
    zip_press.score_val = torch.zeros(layers, 1, heads, len(ids), device=reader.device)

    def zipped(module: Any, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> Tensor:
        zip_press.score_kvzip(module, hidden, cache.keys, cache.values, None, kwargs)
        return zip_press.score_val[module.layer_idx, 0]

    plus = KVzipPress(kvzip_plus_normalization=True)
    plus.context_length = plus.end_idx = len(ids)
    plus.score_val = torch.zeros(layers, 1, heads, len(ids), device=reader.device)

    def zipped_plus(module: Any, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> Tensor:
        # The paper's h is the residual stream; the release takes what attention gets. Given the residual stream, its queries
        # come through the layer's own normalisation.
        layer = reader.model.model.layers[module.layer_idx]
        proxy = SimpleNamespace(
            config=module.config,
            head_dim=module.head_dim,
            layer_idx=module.layer_idx,
            num_key_value_groups=module.num_key_value_groups,
            o_proj=module.o_proj,
            q_proj=lambda states: module.q_proj(layer.input_layernorm(states)),
        )
        plus.score_kvzip(proxy, entering[module.layer_idx], cache.keys, cache.values, None, kwargs)
        return plus.score_val[module.layer_idx, 0]

    entering: dict[int, Tensor] = {}

    def enter(index: int) -> Any:
        return lambda module, args: entering.__setitem__(index, args[0])

    again = [i for part in reader.tokenize_batch(list(REPEAT)) for i in part] + ids

    def peer_plus() -> list[Tensor]:
        hooks = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(reader.model.model.layers)]
        try:
            return score_layers(reader, [ids, again], zipped_plus)
        finally:
            for handle in hooks:
                handle.remove()

    return {
        "keydiff": score_layers(reader, [ids], plain(KeyDiffPress())),
        "expected": score_layers(reader, [ids], plain(ExpectedAttentionPress(n_sink=1))),
        "expected-stats": score_layers(reader, [ids], plain(stats)),
        "snapkv": score_layers(reader, [[*ids, *question]], plain(SnapKVPress(window_size=len(question)))),
        "kvzip": score_layers(reader, [ids, again], zipped),
        "kvzip+": peer_plus(),
    }


@torch.no_grad()
def compare(reader: Reader, text: str, query: str, statistics: QueryStatistics) -> dict[str, float]:
    """The largest difference between our scores and theirs, per method, as a share of the layer's largest score.

    The attention sink is left out: both sides keep it whatever its score.
    """
    (ids,) = reader.tokenize_batch([text])
    (question,) = write_probes(reader, text, "query", 1, query)
    found = {}
    for method, theirs in peer_scores(reader, ids, question, statistics).items():
        score, needs = SCORES.get(method, (statistics, "nothing"))
        probes = [] if needs == "nothing" else write_probes(reader, text, needs, 1, query)
        evidence = read(reader, [ids], [probes], states=True)
        found[method] = 0.0
        for index, (layer, wanted) in enumerate(zip(evidence.layers, theirs)):
            ours, other = score(layer, evidence, reader.kv_placement, index)[0][:, 1:], wanted[:, 1 : len(ids)]
            found[method] = max(found[method], float((ours - other).abs().max() / other.abs().max()))
    return found


def main(
    reader: Annotated[str, typer.Option(help="A reader of the Llama family without a BOS.")] = "reader-smollm2",
    questions: Annotated[int, typer.Option(help="Questions of the shipped sample, each with its passage.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Results file to append rows to.")] = None,
) -> None:
    """Compare the scores, method by method."""
    loaded = find_reader(reader)
    if loaded.bos_ids:
        raise typer.BadParameter(f"{reader} has a BOS, which kvpress scores as a part of the passage.")
    records = find_records("sample", limit=questions)
    statistics = QueryStatistics(loaded)
    statistics.fit(loaded, [record.question for record in records])  # any queries will do
    found = [compare(loaded, record.passages[0], record.question, statistics) for record in records]
    for method in found[0]:
        row = {
            "test": "kvpress",
            "method": method,
            "n": len(found),
            "largest_difference": max(each[method] for each in found),
            "peer": f"kvpress {version('kvpress')}",
        }
        row = clean(row | provenance(loaded, 0))
        typer.echo(json.dumps(row))
        if out is not None:
            append_rows(out, [row])


if __name__ == "__main__":
    typer.run(main)
