"""What is timed: ways to hand passages to the reader, and passages, questions and slots of a given size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...compressors import COMPRESSORS, CompressedPassage, Compressor, Reader, load_compressor, make_compressor
from ...compressors.core.textfiles import check_strings
from ...compressors.kv.encode import kv_shapes
from ..costs.roofline import synchronise
from ..loading import SAMPLE_ARTICLES, CompressorSpec
from ..methods import Compressed

PROMPT_TOKENS = 64
ENCODER_POSITIONS = 16384  # per pass of the bare encoder
RANDOM = "random-slots"


@dataclass(frozen=True)
class Entrant:
    """One way to hand passages to the reader.

    Attributes:
        method: `full`, `random-slots`, or the compressor's name in the rows.
        ratio: Compression ratio; None for the full text, or for the compressor's own.
        compressor: None for the full text and for random slots.
        interface: `text`, `embeds` or `kv`.
        trained: False for a compressor with random weights.
    """

    method: str
    ratio: float | None = None
    compressor: Compressor | None = None
    interface: str = "text"
    trained: bool = True

    @classmethod
    def of(cls, line: Compressed) -> Entrant:
        """A line of the quality suite."""
        return cls(line.name, line.ratio, line.compressor, line.compressor.interface)

    def reads(self, reader: Reader) -> Reader:
        """`reader`, or the reader that was tuned together with the compressor."""
        return reader if self.compressor is None else self.compressor.reader

    def make(self, reader: Reader, texts: list[str], seed: int = 0) -> list[Any]:
        """What is read of the passages: their texts, compressed passages, or random slots."""
        if self.compressor is not None:
            return list(self.compressor.compress(texts, ratio=self.ratio))
        if self.method == RANDOM:
            return random_slots(reader, texts, self.ratio, self.interface, seed)
        return texts


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
    """Random slots at `ratios` and `interfaces` (`embeds`, `kv`), then the compressors named by `specs`.

    Args:
        specs: `NAME` or `NAME@RATIO,RATIO`.
        spec_ratios: Ratios of compressors that name none.
        untrained: Names are methods; their compressors get random weights.

    Raises:
        ValueError: For a bad name, ratio or interface.
    """
    specs = check_strings("specs", specs, "compressors")
    interfaces = check_strings("interfaces", interfaces, "names")
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
        made = make_compressor(spec.name, reader).eval() if untrained else load_compressor(spec.name, reader)
        name = spec.name if made.training_free else made.config.method  # with its settings
        found += [Entrant(name, r, made, made.interface, not untrained) for r in spec.ratios]
    return found


@torch.no_grad()
def bare_encoder(reader: Reader, texts: list[str], slots: int, keep: bool = False) -> None:
    """One pass of the reader's body over passages of similar length and `slots` after each; no head, no LoRA.

    `keep`: keep keys and values, as a KV compressor does.
    """
    ids = reader.tokenize_batch(texts)
    longest = max(map(len, ids))
    rows = torch.tensor([row + [0] * (longest - len(row) + slots) for row in ids], device=reader.device)
    decoder = reader.model.get_decoder()
    for part in rows.split(max(1, ENCODER_POSITIONS // rows.shape[1])):
        decoder(inputs_embeds=reader.embed(part), use_cache=keep)
    synchronise(reader.device)


def make_passages(reader: Reader, count: int, tokens: int) -> list[str]:
    """`count` different passages of the shipped articles, each of about `tokens` of the reader's tokens."""
    articles = SAMPLE_ARTICLES.read_text(encoding="utf-8") + "\n"
    size = 0
    offsets: list[tuple[int, int]] = []
    while len(offsets) < count * tokens:
        size = 2 * size or 6 * count * tokens + 1000  # characters
        text = (articles * (1 + size // len(articles)))[:size]
        offsets = reader.tokenize_with_offsets(text)[1]
    return [text[offsets[i * tokens][0] : offsets[(i + 1) * tokens - 1][1]] for i in range(count)]


def make_tail(reader: Reader, tokens: int = PROMPT_TOKENS) -> str:
    """The end of a prompt: question and template in `tokens` tokens with BOS, or one fewer."""
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
    """A compressed passage of random values, of the reader's scale for `embeds`. Raises ValueError for `text`."""

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=reader.device).to(reader.dtype)

    made: dict[str, object]
    if interface == "embeds":
        made = {"embeds": draw(slots, reader.width) * (reader.embedding_norm / reader.width**0.5)}
    elif interface == "kv":
        shapes = kv_shapes(reader)
        keys = tuple(draw(heads, slots, width) for heads, width, _ in shapes)
        values = tuple(draw(heads, slots, width) for heads, _, width in shapes)
        made = {"keys": keys, "values": values, "positions": torch.arange(slots)}
    else:
        raise ValueError(f"Random slots are embeds or kv, got {interface!r}.")
    return CompressedPassage(interface, tokens, RANDOM, reader.fingerprint, info={"method": RANDOM}, **made)  # type: ignore[arg-type]


def random_slots(
    reader: Reader, texts: list[str], ratio: float | None, interface: str, seed: int = 0
) -> list[CompressedPassage]:
    """A random passage for each text, at a ratio."""
    generator = torch.Generator(device=reader.device).manual_seed(seed)
    lengths = [len(ids) for ids in reader.tokenize_batch(texts)]
    return [random_passage(reader, n, slots_of(n, ratio), interface, generator) for n in lengths]
