"""What the account reads: the ways to hand passages over, and passages, questions and slots of a wanted size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...compressors import COMPRESSORS, CompressedPassage, Compressor, Reader, make_compressor
from ...compressors.kv.encode import kv_shapes
from ..costs.roofline import synchronise
from ..loading import SAMPLE_ARTICLES, CompressorSpec, find_compressor

PROMPT_TOKENS = 64
ENCODER_POSITIONS = 16384  # of one pass of the bare encoder
RANDOM = "random-slots"


@dataclass(frozen=True)
class Entrant:
    """One way to hand passages to the reader.

    Attributes:
        method: `full`, `random-slots`, or what the rows call the compressor.
        ratio: compression ratio; None for the full text, or for the compressor's own.
        compressor: what compresses; None for the full text and for random slots.
        interface: `text`, `embeds` or `kv`.
        trained: False for a compressor whose weights are random, too.
    """

    method: str
    ratio: float | None = None
    compressor: Compressor | None = None
    interface: str = "text"
    trained: bool = True

    def reads(self, reader: Reader) -> Reader:
        """Who reads: `reader`, or the one that was tuned together with the compressor."""
        return reader if self.compressor is None else self.compressor.reader


FULL = Entrant("full")


def find_entrants(
    reader: Reader,
    specs: Sequence[str],
    ratios: Sequence[float],
    interfaces: Sequence[str],
    *,
    untrained: bool,
    spec_ratios: Sequence[float] = (),
) -> list[Entrant]:
    """Compressors that the command line names, and random slots at the ratios given.

    Args:
        specs: `NAME` or `NAME@RATIO,RATIO`, as `nutgraf bench quality` takes them.
        ratios: of random slots.
        interfaces: of random slots: `embeds`, `kv`.
        spec_ratios: of compressors that name none.
        untrained: names are methods, of which compressors with random weights are made for the reader.

    Raises:
        ValueError: for a bad name, ratio or interface.
    """
    if any(not (math.isfinite(ratio) and ratio >= 1) for ratio in ratios):
        raise ValueError(f"Ratios of random slots must be numbers of at least 1, got {list(ratios)}.")
    if bad := [name for name in interfaces if name not in ("embeds", "kv")]:
        raise ValueError(f"Random slots are embeds or kv, got {bad[0]!r}.")
    found = [Entrant(RANDOM, ratio, interface=interface) for interface in interfaces for ratio in ratios]
    for text in specs:
        spec = CompressorSpec.parse(text, spec_ratios)
        if untrained and spec.name not in COMPRESSORS:
            raise ValueError(
                f"A reader with random weights has no trained compressors, and {spec.name!r} is no method; "
                f"methods are {', '.join(sorted(COMPRESSORS))}."
            )
        made = make_compressor(spec.name, reader).eval() if untrained else find_compressor(spec.name, reader)
        method = made.config.method
        found += [Entrant(method, ratio, made, made.interface, not untrained) for ratio in spec.ratios]
    return found


@torch.no_grad()
def bare_encoder(reader: Reader, texts: list[str], slots: int, keep: bool = False) -> None:
    """One pass of the reader's body over passages of like length and so many slots behind each; no head, no LoRA.

    Args:
        keep: keep keys and values, as a compressor to KV does.
    """
    ids = reader.tokenize_batch(texts)
    longest = max(map(len, ids))
    rows = torch.tensor([row + [0] * (longest - len(row) + slots) for row in ids], device=reader.device)
    decoder = reader.model.get_decoder()
    for part in rows.split(max(1, ENCODER_POSITIONS // rows.shape[1])):
        decoder(inputs_embeds=reader.embed(part), use_cache=keep)
    synchronise(reader.device)


def make_passages(reader: Reader, count: int, tokens: int) -> list[str]:
    """So many different passages of the shipped articles, each of about so many of the reader's tokens."""
    articles = SAMPLE_ARTICLES.read_text(encoding="utf-8") + "\n"
    size = 0
    offsets: list[tuple[int, int]] = []
    while len(offsets) < count * tokens:
        size = 2 * size or 6 * count * tokens + 1000  # characters
        text = (articles * (1 + size // len(articles)))[:size]
        offsets = reader.tokenize_with_offsets(text)[1]
    return [text[offsets[i * tokens][0] : offsets[(i + 1) * tokens - 1][1]] for i in range(count)]


def make_tail(reader: Reader, tokens: int = PROMPT_TOKENS) -> str:
    """The end of a prompt: question and template in as many tokens as are left beside BOS, or one fewer."""
    end = "\nAnswer:"
    text = "\n\nQuestion: " + " ".join(SAMPLE_ARTICLES.read_text(encoding="utf-8")[:4000].split())
    offsets = reader.tokenize_with_offsets(text)[1]
    for n in range(tokens, 0, -1):
        tail = text[: offsets[n - 1][1]] + end
        if reader.length([tail]) <= tokens:
            return tail
    raise ValueError(f"The tokenizer of {reader.name!r} has no room for a question in {tokens} tokens.")


def slots_of(tokens: int, ratio: float | None) -> int:
    """Slots of a passage: its tokens over the ratio, rounded up."""
    return max(1, math.ceil(tokens / (ratio or 1)))


def random_passage(
    reader: Reader, tokens: int, slots: int, interface: str, generator: torch.Generator
) -> CompressedPassage:
    """A compressed passage of random values of a plausible size.

    Raises ValueError for another interface than embeds and kv.
    """

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=reader.device).to(reader.dtype)

    info = {"method": RANDOM}
    if interface == "embeds":
        embeds = draw(slots, reader.width) * (reader.embedding_norm / reader.width**0.5)
        return CompressedPassage("embeds", tokens, RANDOM, reader.fingerprint, embeds=embeds, info=info)
    if interface != "kv":
        raise ValueError(f"Random slots are embeds or kv, got {interface!r}.")
    shapes = kv_shapes(reader)
    keys = tuple(draw(heads, slots, width) for heads, width, _ in shapes)
    values = tuple(draw(heads, slots, width) for heads, _, width in shapes)
    return CompressedPassage(
        "kv",
        tokens,
        RANDOM,
        reader.fingerprint,
        keys=keys,
        values=values,
        positions=torch.arange(slots),
        info=info,
    )
