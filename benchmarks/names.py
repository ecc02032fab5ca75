"""What tables and pictures call methods and question sets."""

from __future__ import annotations

from typing import Literal

from .rows import Row

Kind = Literal["fixed", "soft", "text", "plain", "control"]

DATASETS = {
    "qa_dev_squad": "SQuAD",
    "qa_dev_nq": "NQ",
    "qa_dev_quoref": "Quoref",
    "qa_dev_fairytaleqa": "FairytaleQA",
    "qa_dev_qamr": "QAMR",
    "qa_dev_multispanqa": "MultiSpanQA",
    "qa_dev_squad_10": "SQuAD among distractors",
    "qa_dev_nq_10": "NQ among distractors",
}
METHODS = {
    "full": "full text",
    "full-text": "full text, tuned reader",
    "none": "no context",
    "mean-pool": "mean-pooled windows",
    "salient-pool": "salient windows",
    "icae": "ICAE",
    "gist": "gist tokens",
    "500x": "500xCompressor",
    "autocompressor": "AutoCompressor",
    "pisco": "PISCO",
    "xrag": "xRAG",
    "llmlingua": "LLMLingua",
    "longllmlingua": "LongLLMLingua",
    "llmlingua2": "LLMLingua-2",
    "selective-context": "Selective Context",
    "truncate": "the passage's first tokens",
    "fewer-passages": "fewer passages",
    "extract": "sentences picked by BM25",
    "extract-embedder": "sentences picked by the embedder",
    "random-tokens": "random tokens",
}


def method_name(method: str) -> str:
    """A method in words; one that is not known by its own name."""
    for ending, words in (("-shuffled", " of another question's passage"), ("-query", ", for the question")):
        if method.endswith(ending):
            return method_name(method.removesuffix(ending)) + words
    return METHODS.get(method, method)


def dataset_title(dataset: str) -> str:
    """A question set in words, with its number of passages where one was asked for."""
    name, comma, rest = dataset.partition(", ")
    return DATASETS.get(name, name) + comma + rest


def kind_of(row: Row) -> Kind:
    """What a quality row is: a fixed line, soft or text compressor, plain text of the same budget, or a control."""
    if row["method"] in ("full", "none", "full-text"):
        return "fixed"
    if str(row["method"]).endswith("-shuffled"):
        return "control"
    if "budget_of" in row:
        return "plain"
    return "text" if row.get("interface") == "text" else "soft"
