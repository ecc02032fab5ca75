"""Token selection beside the released `llmlingua` package: the same models, text, kept share and threads, taking turns.

A case is measured in paired repeats: in each of them our compressor, the package and one bare forward of the model over the
same tokens run one after the other, in an order that rotates; ratios are medians over the pairs. The package runs first
once, and what it keeps is what `fast` may keep; `faithful` is asked for what the package is asked for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...compressors import CompressedPassage, Reader
from ...compressors.core.batching import pack, pass_positions
from ...compressors.encoders.token_classifier import load_classifier
from ...compressors.text.llmlingua import LLMLinguaCompressor, LLMLinguaConfig
from ...compressors.text.llmlingua2 import LLMLingua2Compressor, LLMLingua2Config
from ...compressors.text.longllmlingua import LongLLMLinguaCompressor, LongLLMLinguaConfig
from ...compressors.text.selection import SelectingCompressor
from ..rows import Row, clean, provenance
from ..speed.entrants import make_passages
from .peer import Peer
from .selection_models import MODELS, SHIPPED, write_model
from .selection_peer import Forwarded

QUESTION = "What happened first, and who says so?"
RATE = 0.5  # what the package is asked to keep
RAMP = 0.3  # LongLLMLingua's dynamic ratio in its authors' example
_LONG_SECONDS = 5.0  # cases that take longer are repeated less often
_BATCH_POSITIONS = 8192


@dataclass(frozen=True)
class Case:
    """What is compressed, and how.

    Attributes:
        method: `llmlingua`, `longllmlingua` or `llmlingua2`.
        tokens: the reader's tokens of all passages.
        passages: how many they are, compressed in one call.
        model: one of `selection_models.MODELS`.
        mode: `fast` or `faithful`.
    """

    method: str
    tokens: int
    passages: int = 1
    model: str = SHIPPED
    mode: str = "fast"

    @property
    def name(self) -> str:
        """As the command line names it."""
        return f"{self.method}-{self.mode}-{self.passages}x{self.tokens // self.passages}-{self.model}"


def _cases() -> tuple[Case, ...]:
    lm, tagger = (SHIPPED, "lm-90m"), ("bert-22m", "bert-110m")
    found = [Case("llmlingua", n, mode=mode) for mode in ("fast", "faithful") for n in (1000, 4000, 16000)]
    found += [Case("longllmlingua", 4000, 8, mode=mode) for mode in ("fast", "faithful")]
    found += [Case("llmlingua2", n, model=tagger[0]) for n in (100, 1000, 4000, 16000)]
    found += [Case("llmlingua2", n, model=tagger[0], mode="faithful") for n in (100, 4000)]
    found += [Case("llmlingua", 12800, 64), Case("longllmlingua", 12800, 64), Case("llmlingua2", 12800, 64, tagger[0])]
    found += [Case("llmlingua", n, model=lm[1], mode=mode) for n, mode in ((1000, "fast"), (1000, "faithful"))]
    return (*found, *(Case("llmlingua2", n, model=tagger[1]) for n in (100, 1000)))


CASES = _cases()


def key(row: Row) -> tuple[Any, ...]:
    """What tells rows of this suite apart, machine and date aside."""
    return tuple(row.get(name) for name in ("test", "method", "mode", "model", "tokens", "passages", "threads", "peer"))


def row_key(case: Case, threads: int, peer: str | None) -> tuple[Any, ...]:
    """The `key` of the row that a case will give."""
    return ("speed", case.method, case.mode, case.model, case.tokens, case.passages, threads, peer)


class Side:
    """Our side of the comparison: models, compressors and text.

    Args:
        root: a folder for the models.
        seed: of random weights.
    """

    def __init__(self, root: str, seed: int = 0) -> None:
        self.root, self.seed = root, seed
        self._readers: dict[str, Reader] = {}
        self._compressors: dict[tuple[str, str, str], SelectingCompressor] = {}

    def reader(self, case: Case) -> Reader:
        """The causal LM that scores; beside a classifier the shipped one, whose tokens are counted."""
        name = SHIPPED if MODELS[case.model].classifier else case.model
        if name not in self._readers:
            folder = write_model(name, self.root, self.seed)
            self._readers[name] = Reader.from_pretrained(folder, dtype=torch.float32, device="cpu")
        return self._readers[name]

    def compressor(self, case: Case) -> SelectingCompressor:
        """The compressor of a case."""
        asked = (case.method, case.mode, case.model)
        if asked not in self._compressors:
            self._compressors[asked] = self._make(case)
        return self._compressors[asked]

    def _make(self, case: Case) -> SelectingCompressor:
        reader, mode = self.reader(case), case.mode
        if case.method == "llmlingua":
            return LLMLinguaCompressor(LLMLinguaConfig.from_dict({"mode": mode}), reader)
        if case.method == "longllmlingua":
            settings = {"mode": mode, "dynamic_ratio": RAMP, "reorder": "sort"}
            return LongLLMLinguaCompressor(LongLLMLinguaConfig.from_dict(settings), reader)
        if case.method == "llmlingua2":
            pair = load_classifier(write_model(case.model, self.root, self.seed), "cpu")
            return LLMLingua2Compressor(LLMLingua2Config.from_dict({"mode": mode}), reader, classifier=pair)
        raise ValueError(f"A case is of llmlingua, longllmlingua or llmlingua2, got {case.method!r}.")

    def texts(self, case: Case) -> list[str]:
        """The passages, out of the shipped articles."""
        return make_passages(self.reader(case), case.passages, case.tokens // case.passages)

    def run(self, case: Case, texts: list[str], ratio: float) -> tuple[str, int]:
        """Compresses the passages of a case; the result and its number of the reader's tokens."""
        compressor = self.compressor(case)
        if case.mode == "faithful" and isinstance(compressor, LLMLinguaCompressor):
            asked = QUESTION if case.method == "longllmlingua" else ""
            found = compressor.compress_prompt(texts, question=asked, ratio=1 / RATE)
            return found.text, found.kept_tokens
        query = QUESTION if compressor.query_aware else None
        passages: list[CompressedPassage] = compressor.compress(
            texts, query, 1 / RATE if case.mode == "faithful" else ratio
        )
        return "\n\n".join(p.text or "" for p in passages), sum(p.n_tokens or 0 for p in passages)

    def scorer(self, case: Case) -> Any:
        """The module whose positions are counted."""
        compressor = self.compressor(case)
        if isinstance(compressor, LLMLingua2Compressor):
            return compressor.words.frozen
        return self.reader(case).model.get_decoder()

    def bare(self, case: Case, texts: Sequence[str]) -> Callable[[], None]:
        """One forward of the model over the texts' tokens: in windows as long as ours, in batches, logits and no losses."""
        compressor = self.compressor(case)
        if isinstance(compressor, LLMLingua2Compressor):
            tagger = compressor.words
            before, after = tagger.pieces.before, tagger.pieces.after
            room = tagger.limit - len(before) - len(after)
            ids = [tagger.pieces(text).ids for text in texts]
            rows = [[*before, *part, *after] for row in ids for part in _windows(row, room)]

            def classify(part: torch.Tensor, mask: torch.Tensor) -> None:
                tagger.logits(part, mask)

            return _forward(rows, classify)
        reader = self.reader(case)
        window = min(LLMLinguaConfig().window, reader.max_positions or LLMLinguaConfig().window)
        rows = [part for row in reader.tokenize_batch(list(texts)) for part in _windows(row, window)]
        decoder = reader.model.get_decoder()

        def read(part: torch.Tensor, mask: torch.Tensor) -> None:
            hidden = decoder(input_ids=part, attention_mask=mask, use_cache=False).last_hidden_state
            for states in hidden[mask.bool()].split(512):
                reader.head(states)

        return _forward(rows, read)


def _windows(ids: list[int], size: int) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _forward(rows: list[list[int]], run: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[[], None]:
    """A function that reads rows in batches of like length; ids and masks are made beforehand."""
    made = []
    for batch in pack([len(row) for row in rows], _BATCH_POSITIONS, pass_positions(torch.device("cpu"), False)):
        longest = max(len(rows[i]) for i in batch)
        ids = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in batch])
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in batch])
        made.append((ids, mask))

    def forward() -> None:
        with torch.no_grad():
            for ids, mask in made:
                run(ids, mask)

    return forward


def peer_options(case: Case, texts: list[str]) -> dict[str, Any]:
    """What `PromptCompressor.compress_prompt` is called with: its authors' examples, the question not repeated."""
    options: dict[str, Any] = {"context": texts, "rate": RATE}
    if case.method == "longllmlingua":
        options |= {
            "question": QUESTION,
            "rank_method": "longllmlingua",
            "condition_compare": True,
            "condition_in_question": "after_condition",
            "reorder_context": "sort",
            "dynamic_context_compression_ratio": RAMP,
            "context_budget": "+100",
        }
    return options


def measure(side: Side, case: Case, peer: Peer | None, *, repeats: int = 5, threads: int, seed: int = 0) -> Row:
    """The row of one case.

    Args:
        peer: the package; without it the row has no figures of it, and half of the tokens are kept.
        repeats: pairs that count; at most 3 where one of them takes longer than 5 seconds.

    Raises:
        ValueError: if the package fails.
    """
    texts, reader = side.texts(case), side.reader(case)
    lengths = [len(ids) for ids in reader.tokenize_batch(texts)]
    runs: dict[str, Callable[[], float]] = {}
    row: Row = {}
    ratio = 1 / RATE
    slow = 0.0
    if peer is not None:
        peer.load(case.model, write_model(case.model, side.root, side.seed))
        options = peer_options(case, texts)
        found = peer.compress(case.model, options)
        text, slow = _without_question(case, found["text"]), found["seconds"]
        kept = len(reader.tokenize(text))
        ratio = max(sum(lengths) / max(kept, 1), 1.0)
        row |= {"peer": peer.name, "peer_rate": kept / sum(lengths), "peer_positions": found["positions"]}
        runs["peer"] = lambda: peer.compress(case.model, options)["seconds"]
    side.run(case, [texts[0][:200]], ratio)  # what is made once, on a first call, is no part of what is counted
    forwarded = Forwarded(side.scorer(case))
    own, kept = side.run(case, texts, ratio)
    positions = forwarded.positions
    forwarded.remove()
    bare = side.bare(case, texts)
    bare()
    runs["ours"] = _clocked(lambda: side.run(case, texts, ratio))
    runs["bare"] = _clocked(bare)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(repeats if slow < _LONG_SECONDS else min(repeats, 3)):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            taken[name].append(runs[name]())
    row |= _figures(taken) | {"rate": kept / sum(lengths), "positions": positions}
    if peer is not None:
        row["forwarded_ratio"] = positions / row["peer_positions"]
        if case.mode == "faithful" and case.method != "llmlingua2":
            row["same_text"] = own.strip() == text.strip()
    model = side.scorer(case) if MODELS[case.model].classifier else reader.model
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    about = {
        "suite": "selection",
        "test": "speed",
        "method": case.method,
        "mode": case.mode,
        "model": case.model,
        "model_shape": f"{type(model).__name__} {model.config.num_hidden_layers}x{model.config.hidden_size}, {millions:.1f}M",
        "weights": MODELS[case.model].weights,
        "tokens": case.tokens,
        "passages": case.passages,
        "threads": threads,
        "repeats": len(taken["ours"]),
    }
    return clean(about | row | provenance(reader, seed, side.compressor(case)))


def _without_question(case: Case, text: str) -> str:
    return text.removesuffix("\n\n" + QUESTION) if case.method == "longllmlingua" else text


def _clocked(run: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def _figures(taken: dict[str, list[float]]) -> Row:
    ours, bare = taken["ours"], taken["bare"]
    found: Row = {
        "seconds": statistics.median(ours),
        "bare_seconds": statistics.median(bare),
        "over_bare": statistics.median(a / b for a, b in zip(ours, bare)),
    }
    if "peer" in taken:
        found["peer_seconds"] = statistics.median(taken["peer"])
        found["speedup"] = statistics.median(b / a for a, b in zip(ours, taken["peer"]))
    return found
