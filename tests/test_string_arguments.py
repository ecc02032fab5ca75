"""A single string is no list of strings, in any public argument."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pytest
from nutgraf import Reader, make_compressor
from nutgraf.adapters.placeholders.cache import PassageCache
from nutgraf.adapters.placeholders.source import PassageSource
from nutgraf.adapters.store import MemoryStore, fill, keys_for
from nutgraf.benchmarks.baselines import BASELINES, bm25
from nutgraf.benchmarks.methods import lines, named_methods
from nutgraf.benchmarks.metrics import containment, exact_match, f1, rouge_l_answer
from nutgraf.benchmarks.speed.entrants import find_entrants
from nutgraf.benchmarks.studies.allocation import allocation_rows
from nutgraf.compressors import FidelityConfig, FidelityGate
from nutgraf.compressors.encoders.lora import module_names
from nutgraf.compressors.text.published.llmlingua import (
    LLMLinguaOptions,
    compress_prompt,
    filter_sentences,
    rank_contexts,
)
from nutgraf.compressors.text.scoring import self_information
from nutgraf.recipes.data.corpus import Record, find_files
from nutgraf.recipes.data.records import load_articles, load_records
from nutgraf.recipes.sweep import Evaluation, parse_grid
from nutgraf.recipes.training.schema import load_recipe


@pytest.fixture(scope="module")
def made(zoo) -> SimpleNamespace:
    reader = Reader(zoo.model("llama", num_hidden_layers=1), zoo.tokenizer())
    return SimpleNamespace(
        reader=reader,
        mean=make_compressor("mean-pool", reader).eval(),
        match=make_compressor("kv-match", reader).eval(),
        gate=FidelityGate(make_compressor("mean-pool", reader).eval()),
    )


CALLS = {
    "compress": lambda m: m.mean.compress("ab"),
    "compress_at": lambda m: m.mean.compress_at("ab", [2.0]),
    "kv-match compress_at": lambda m: m.match.compress_at("ab", [2.0]),
    "generate": lambda m: m.reader.generate("ab"),
    "target_hidden": lambda m: m.reader.target_hidden(["a", "b"], "ab"),
    "self_information": lambda m: self_information(m.reader, "ab"),
    "gate": lambda m: m.gate.measure(m.mean.compress(["a", "b"]), "ab"),
    "keys_for": lambda m: keys_for(m.mean, "ab"),
    "fill": lambda m: fill(MemoryStore(), m.mean, "ab"),
    "source": lambda m: PassageSource(m.mean, PassageCache()).get("ab"),
    "exact_match": lambda m: exact_match("a", "ab"),
    "f1": lambda m: f1("a", "ab"),
    "containment": lambda m: containment("a", "ab"),
    "rouge": lambda m: rouge_l_answer("a", "ab"),
    "record answers": lambda m: Record("a?", "ab", ("a",), ("",), 0, ""),
    "record passages": lambda m: Record("a?", ("a",), "ab", ("", ""), 0, ""),
    "load_records": lambda m: load_records("ab", "."),
    "load_articles": lambda m: list(load_articles("ab", ".")),
    "find_files": lambda m: find_files(".", "ab"),
    "load_recipe": lambda m: load_recipe("icae", "seed=1"),
    "sweep": lambda m: Evaluation("ab"),
    "parse_grid": lambda m: parse_grid("a=1"),
    "named_methods": lambda m: named_methods(m.reader, "ab", [2.0]),
    "baselines": lambda m: lines([], baselines="ab", shuffled=False),
    "entrants": lambda m: find_entrants(m.reader, "ab", (), (), untrained=True),
    "interfaces": lambda m: find_entrants(m.reader, (), (2.0,), "kv", untrained=True),
    "scorers": lambda m: allocation_rows(m.reader, [], [], None, scorers="ab"),
    "keep": lambda m: make_compressor("selective-context", m.reader, keep="ab"),
    "target_modules": lambda m: module_names("target_modules", "q_proj"),
    "compress_prompt": lambda m: compress_prompt(m.reader, "ab", LLMLinguaOptions()),
    "compress_prompt of the method": lambda m: make_compressor("llmlingua", m.reader).compress_prompt("ab"),
    "forced": lambda m: compress_prompt(m.reader, ["a", "b"], LLMLinguaOptions(), forced="01"),
    "rank_contexts": lambda m: rank_contexts(m.reader, "ab"),
    "filter_sentences": lambda m: filter_sentences(m.reader, "ab", 2.0),
    **{f"baseline {name}": lambda m, f=f: f(m.reader, "a?", "ab", 9, Random(0)) for name, f in BASELINES.items()},
    "bm25": lambda m: bm25("a?", "ab"),
    "signals": lambda m: FidelityConfig(signals="nll"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_string_is_refused_as_a_list(made, name):
    with pytest.raises((TypeError, ValueError), match=r"list|must|tuple"):
        CALLS[name](made)
