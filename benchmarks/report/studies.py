"""The readers whose results the README shows, each with its rows, its page and what must be said of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..rows import PACKAGE, RESULTS


@dataclass(frozen=True)
class Study:
    """The measurements of one reader.

    Attributes:
        name: what the markers in the README call it.
        rows, others: its results files: quality, and those of other tests that its page shows.
        page, pooled, picture: the files made from them.
        intro, notes: the README's sentences in front of and behind its tables.
    """

    name: str
    rows: Path
    page: Path
    pooled: Path
    picture: Path
    intro: str
    notes: tuple[str, ...]
    others: tuple[Path, ...] = ()

    @property
    def markers(self) -> tuple[str, str]:
        """The lines of the README between which its block stands."""
        return (
            f"<!-- results of {self.name}: begin (python -m nutgraf.benchmarks.report.readme) -->",
            f"<!-- results of {self.name}: end -->",
        )


PLAIN = (
    "Plain text is what any pipeline can do without a compressor: the first tokens of each passage, random ones, or sentences "
    "picked by the question."
)
SMALL = Study(
    name="reader-small",
    rows=RESULTS / "tradeoff.jsonl",
    page=PACKAGE / "benchmarks" / "RESULTS.md",
    pooled=RESULTS / "pooled.jsonl",
    picture=RESULTS / "tradeoff.png",
    others=tuple(RESULTS / name for name in ("allocation.jsonl", "gate.jsonl", "sweeps.jsonl")),
    intro=(
        "On the shipped toy reader (6 million parameters, [two hours of training](benchmarks/results/reader_training.jsonl) on "
        "two CPU cores), greedy answers. **Find your budget in the first column; in bold is what kept most of it.**"
    ),
    notes=(
        "Aims are what we want to reach, not what is reached, whichever way. **Compressed once** is what this package is for: "
        "passages are compressed when they are indexed, and every question reads what is stored. **For the question** a "
        "passage is compressed anew for each one, which the times count: a classifier four times the reader's size reads both "
        f"first, and finds the answer better than this reader does; that is why it can keep more than all. {PLAIN} "
        "[benchmarks/RESULTS.md](benchmarks/RESULTS.md) has every method at every ratio on every set, with exact "
        "match, perplexity, KL to the full text and controls. The reader is weak, and it has seen pooled embeddings in its own "
        "training ([its card](recipes/pretrained/reader-small/README.md)): with another reader the figures will differ.",
        "A slot of this reader takes 2 x 256 = 512 bytes in bfloat16, or 2 x 5 layers x 2 heads x (64 + 64) = 2,560 as keys "
        "and values (gist tokens, 500xCompressor).",
    ),
)
SMOLLM2 = Study(
    name="reader-smollm2",
    rows=RESULTS / "smollm2.jsonl",
    page=PACKAGE / "benchmarks" / "RESULTS_SMOLLM2.md",
    pooled=RESULTS / "smollm2_pooled.jsonl",
    picture=RESULTS / "smollm2.png",
    intro=(
        "On a pretrained reader: SmolLM2-135M-Instruct in four bits, from the package index, with [LoRA trained for an hour on "
        "two CPU cores](recipes/pretrained/reader-smollm2/README.md) to answer briefly from passages; it has never seen "
        "anything compressed. Greedy answers; **in bold is what kept most at a budget.**"
    ),
    notes=(
        "ICAE, xRAG and salient windows were [trained](benchmarks/results/compressor_training.jsonl) for this reader on two "
        "CPU cores, for 23, 13 and 9 minutes, a small part of what their papers take. Methods that are missing were not "
        "trained for it. **For the question** a passage is compressed anew for each one, which the times "
        "count, by a classifier of 22 million parameters. "
        f"{PLAIN} Times are of two CPU cores and bfloat16. "
        "[benchmarks/RESULTS_SMOLLM2.md](benchmarks/RESULTS_SMOLLM2.md) has every line.",
    ),
)
STUDIES = (SMOLLM2, SMALL)
