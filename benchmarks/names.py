"""Names of methods, lines and question sets in tables and plots."""

from __future__ import annotations

from typing import Literal

from ..compressors import COMPRESSORS
from .rows import Row

Kind = Literal["fixed", "soft", "text", "plain", "control"]

DATASETS = {
    "qa_dev_squad": "SQuAD",
    "qa_dev_nq": "NQ",
    "qa_dev_quoref": "Quoref",
    "qa_dev_fairytaleqa": "FairytaleQA",
    "qa_dev_qamr": "QAMR",
    "qa_dev_multispanqa": "MultiSpanQA",
    "qa_dev_squad_10": "SQuAD with distractors",
    "qa_dev_nq_10": "NQ with distractors",
}
FIXED = {"full": "full text", "none": "no context"}
BASELINES = {
    "truncate": "the passage's first tokens",
    "fewer-passages": "fewer passages",
    "extract": "sentences picked by BM25",
    "extract-embedder": "sentences picked by the embedder",
    "random-tokens": "random tokens",
}


def method_name(method: str) -> str:
    """Title of a method as its config gives it, or of a line; unknown names are returned unchanged."""
    for ending, words in (("-shuffled", " of another question's passage"), ("-query", ", for the question")):
        if method.endswith(ending):
            return method_name(method.removesuffix(ending)) + words
    name, colon, settings = method.partition(":")  # settings of a method that needs no training
    if name in COMPRESSORS:
        return (COMPRESSORS[name].config_class.title or name) + colon + " " * bool(colon) + settings
    return {**FIXED, **BASELINES}.get(method, method)


def dataset_title(dataset: str) -> str:
    """Title of a question set, with the number of passages asked for; sets joined by " + " are named one by one."""
    name, comma, rest = dataset.partition(", ")
    return " + ".join(DATASETS.get(part, part) for part in name.split(" + ")) + comma + rest


def kind_of(row: Row) -> Kind:
    """Kind of a quality row: fixed line, soft or text compressor, plain text of the same budget, or control."""
    method = str(row["method"])
    if method in FIXED or (method in COMPRESSORS and COMPRESSORS[method].config_class.cost == "none"):
        return "fixed"
    if method.endswith("-shuffled"):
        return "control"
    if "budget_of" in row:
        return "plain"
    return "text" if row.get("interface") == "text" else "soft"


def is_beside(row: Row) -> bool:
    """Whether a row belongs to the method above it: a control, a baseline of its budget, or slots from a store."""
    return "store_precision" in row or kind_of(row) in ("control", "plain")


def line_name(row: Row) -> str:
    """Name of a line in the report: fixed lines in words, methods with the ratio asked for."""
    method = str(row["method"])
    if method in FIXED:
        return FIXED[method]
    if method.endswith("-shuffled"):
        return "shuffled"
    if "store_precision" in row:
        return f"stored as {row['store_precision']}"
    if "budget_of" in row:
        return method.replace("-", " ")
    return with_ratio(row)


def with_ratio(row: Row, name: str | None = None) -> str:
    """The method's name (or `name`) and the ratio asked for, if any."""
    ratio = f" {row['ratio_asked']:g}x" if row.get("ratio_asked") else ""
    return (str(row["method"]) if name is None else name) + ratio
