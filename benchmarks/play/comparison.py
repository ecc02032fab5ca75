"""Answers one question from the full text, from compressed passages and from nothing, with costs and with what was kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...adapters.placeholders import PassageCache
from ...adapters.placeholders.source import PassageSource
from ...adapters.threads import astream
from ...compressors import COMPRESSORS, CompressedPassage, Compressor, Reader, load_compressor
from ...compressors.core.checkpoint import read_config
from ...compressors.core.shipped import PRETRAINED, shipped_names
from ...compressors.reader.plan import KV
from ...recipes.data.templates import question_prompt

FULL, NONE = "full-text-as-is", "no-context"
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Way:
    """A way to read passages, as the page offers it.

    Attributes:
        name: of a compressor, `FULL` or `NONE`.
        title: for people.
        interface: ``"embeds"``, ``"kv"``, ``"text"``; ``""``: nothing is compressed.
        ratio: compression ratio to begin with; ``None``: it has none.
        chosen: whether the page asks it unless told otherwise.
    """

    name: str
    title: str
    interface: str = ""
    ratio: float | None = None
    chosen: bool = False


class Comparison:
    """Reads passages in several ways, one after another, so that times are comparable.

    Args:
        reader: answers.
        names: compressors to offer; default: those that need no training, and the shipped ones of this reader.
    """

    def __init__(self, reader: Reader, names: Sequence[str] = ()) -> None:
        self.reader = reader
        self._compressors: dict[str, Compressor] = {}
        self._loading = threading.Lock()
        self._turn = asyncio.Lock()
        self._cache = PassageCache()
        found = _told_apart(self._find(names))
        self.ways = [Way(FULL, "Full text", chosen=True), *found, Way(NONE, "No context", chosen=True)]
        reader.generate(["Warm up."], 2)  # the first pass takes longer than any later one

    def _find(self, names: Sequence[str]) -> list[Way]:
        if names:
            loaded = {name: self._compressor(name) for name in names}
            return [_way(name, type(one), vars(one.config), True) for name, one in loaded.items()]
        found: list[Way] = []
        for name, cls in COMPRESSORS.items():
            if cls.training_free:
                try:
                    config = vars(self._compressor(name).config)
                except ValueError:  # not with this reader
                    continue
                quick = cls.config_class.cost != "fit"  # minutes per passage: only if asked for
                first = cls.interface not in {way.interface for way in found}
                found.append(_way(name, cls, config, quick and first))
        for name in shipped_names():
            about = read_config(PRETRAINED / name) if not name.startswith("reader-") else {}
            if about.get("reader") == self.reader.fingerprint:
                found.append(_way(name, COMPRESSORS[about["method"]], about["config"], False))
        return found

    def _compressor(self, name: str) -> Compressor:
        with self._loading:
            if name not in self._compressors:
                self._compressors[name] = load_compressor(name, self.reader)
            return self._compressors[name]

    async def ask(
        self, question: str, passages: Sequence[str], name: str, ratio: float | None
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield events: ``context`` (sizes, and what was kept), ``piece`` by ``piece`` the answer, and ``end`` (times).

        Raises:
            ValueError: if there is no such way, or the passages cannot be compressed or are too long for the reader.
        """
        way = next((way for way in self.ways if way.name == name), None)
        if way is None:
            raise ValueError(f"There is no way {name!r:.60} to read passages here.")
        async with self._turn:
            context, made = await asyncio.to_thread(self._context, way, passages, question, ratio)
            reader = self.reader if not way.interface else self._compressor(name).reader
            (plan,) = reader.plan([question_prompt(context, question)])
            reader.check_room([plan], MAX_NEW_TOKENS)
            yield {
                "event": "context",
                "read": sum(kind != KV for kind in plan.kinds),
                "bytes": sum(one.nbytes if isinstance(one, CompressedPassage) else _bytes(one) for one in context),
                **made,
            }
            start = time.perf_counter()
            first: float | None = None
            async with aclosing(astream(reader, plan, max_new_tokens=MAX_NEW_TOKENS, stop=["\n"])) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    first = first or time.perf_counter() - start
                    yield {"event": "piece", "text": piece}
            yield {"event": "end", "ttft_ms": round(1e3 * (first or time.perf_counter() - start), 1)}

    def _context(
        self, way: Way, passages: Sequence[str], question: str, ratio: float | None
    ) -> tuple[list[Any], dict[str, Any]]:
        if not way.interface:
            return (list(passages) if way.name == FULL else []), {}
        compressor = self._compressor(way.name)
        query = question if compressor.query_aware else None
        start = time.perf_counter()
        found, new = PassageSource(compressor, self._cache).get(passages, query=query, ratio=ratio)
        seconds = time.perf_counter() - start
        facts = {
            "ratio": round(sum(one.source_tokens for one in found) / max(sum(_mean_slots(one) for one in found), 1), 2),
            "compress_ms": round(1e3 * seconds, 1) if new else None,
            "kept": [kept(self.reader, text, one) for text, one in zip(passages, found)],
            "texts": [one.text for one in found] if way.interface == "text" else None,
        }
        return found, facts


def _way(name: str, cls: type[Compressor], config: dict[str, Any], chosen: bool) -> Way:
    return Way(name, getattr(cls.config_class, "title", name), cls.interface, config.get("ratio"), chosen)


def _told_apart(ways: Sequence[Way]) -> list[Way]:
    """The ways, with their names beside titles that repeat."""
    titles = Counter(way.title for way in ways)
    return [replace(way, title=f"{way.title} ({way.name})") if titles[way.title] > 1 else way for way in ways]


def _mean_slots(passage: CompressedPassage) -> float:
    return passage.rate * passage.source_tokens


def kept(reader: Reader, text: str, passage: CompressedPassage) -> list[tuple[int, int, float]] | None:
    """What is left of a passage, as ``(start, end, share)`` over its characters; ``None``: slots stand for no words.

    The share is 1 for words that a text keeps; for ragged keys and values it is the share of all heads that keep the pair of
    the token there.
    """
    if passage.spans is not None:
        return [(start, end, 1.0) for start, end in passage.spans]
    if passage.counts is None or (heads := passage.heads_per_token) is None:
        return None
    shares = [round(n / passage.counts.numel(), 4) for n in heads.tolist()]
    offsets = reader.tokenize_with_offsets(text)[1]
    return [(start, end, share) for (start, end), share in zip(offsets, shares, strict=True)]


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def described(ways: Sequence[Way]) -> list[dict[str, Any]]:
    """The ways as JSON."""
    return [asdict(way) for way in ways]
