"""The audit's table and its HTML page with originals and reconstructions side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from ...compressors.core.files import write_atomically
from ...compressors.core.words import plain_words
from ..names import method_name
from ..report.table import Column, Table, build, interval, render
from ..rows import Row
from .attackers import ATTACKERS
from .audit import Outcome
from .corpus_statistics import CorpusStatistics

EXAMPLES = 3  # passages on the page, of each target and attacker
_CAPTION = (
    "Shares in per cent with their 95 % bootstrap intervals. Words: share of the passage's words in the reconstruction. "
    "Names, numbers, dates: share of them in it as a whole. The guess knows how often words occur, and the "
    "passage's length. Steps: of training the attacker. Answers' F1: of the reader that reads what is stored. A stronger "
    "attacker reads more: these are lower bounds."
)


def audit_table(rows: Sequence[Row], title: str = "") -> Table:
    """One line per target and attacker, the guess first."""

    def share(key: str) -> Column:
        return Column(key, lambda row: interval(row, key, f"{key}_ci_low", f"{key}_ci_high", 100, ".0f"))

    columns = [
        Column("stored", lambda row: CorpusStatistics.title if row["method"] == "none" else method_name(row["method"])),
        Column("ratio", "ratio_asked", "{:g}x"),
        *([Column("defence", "defence")] if any(row.get("defence") for row in rows) else []),
        Column("attacker", lambda row: "" if row["method"] == "none" else attacker_title(row["attacker"])),
        *([Column("steps", "training_steps", "{:.0f}")] if any("training_steps" in row for row in rows) else []),
        Column("words", share("recall").value),
        *map(share, ("names", "numbers", "dates")),
        *(
            Column(name, key, "{:.1f}", 100)
            for name, key in (("F1", "token_f1"), ("BLEU", "bleu"), ("ROUGE-L", "rouge_l"))
        ),
        Column("exact", "exact", "{:.0f}", 100),
        Column("cosine", "cosine", "{:.2f}"),
        *([Column("answers' F1", share("answer_f1").value)] if any("answer_f1" in row for row in rows) else []),
    ]
    kind = {True: "fixed", False: "method"}
    return build(columns, rows, title=title, caption=_CAPTION, kind=lambda row: kind[row["method"] == "none"])


def attacker_title(name: str) -> str:
    """Title of an attacker as its class gives it."""
    return ATTACKERS[name].title if name in ATTACKERS else name


def write_page(
    path: str | Path, outcomes: Sequence[Outcome], sentences: Sequence[str], origins: Iterable[str] = ()
) -> Path:
    """Write the page atomically and return its path."""
    path = Path(path)
    shown = [
        {
            "title": f"{one.target.label}: {attacker_title(one.row['attacker'])}",
            "pairs": [
                {"original": marked(text, guess), "guess": guess}
                for text, guess in list(zip(one.target.texts, one.guesses))[:EXAMPLES]
            ],
        }
        for one in outcomes
        if one.row["method"] != "none"
    ]
    table = audit_table([one.row for one in outcomes])
    page = render("audit.html", sentences=sentences, table=table, outcomes=shown, origins=list(origins))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path


def marked(original: str, guess: str) -> list[tuple[str, bool]]:
    """The original in pieces; true for words that the reconstruction holds in the same order."""
    spans = list(plain_words(original))
    ours = [original[a:b].lower() for a, b in spans]
    theirs = [guess[a:b].lower() for a, b in plain_words(guess)]
    blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    read = {i for block in blocks for i in range(block.a, block.a + block.size)}
    out: list[tuple[str, bool]] = []
    last = 0
    for i, (a, b) in enumerate(spans):
        out += [(original[last:a], i - 1 in read and i in read), (original[a:b], i in read)]
        last = b
    return [piece for piece in [*out, (original[last:], False)] if piece[0]]
