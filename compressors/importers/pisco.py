"""PISCO checkpoints of 2026: a compressor model, a connector, and the decoder's LoRA and embedding rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel

from ..base import Passages
from ..core.batching import run_sequences
from ..core.config import added, check_choices, setting
from ..core.errors import CheckpointError
from ..core.passage import CompressedPassage
from ..encoders.lora_twin import LoRATwin
from ..encoders.small_lm import SmallLMEncoder
from ..reader.reader import Reader
from ..slots.memory_tokens import memory_rows, memory_sequences
from ..slots.segments import Segment, even_shares
from ..soft.pisco import PISCOCompressor, PISCOConfig
from .layout import Keys, Source, load_model_state, load_tensors, need, number, peek_json, read_json
from .models import build_model, graft_rows, load_tokenizer, lora_shape, merge_lora, model_config, take_lora

MEM = "<MEM>"
_FILES = ("connector.pt", "decoder_state.pt")


@dataclass
class PublishedPISCOConfig(PISCOConfig):
    """Settings of PISCO and COCOM as their authors' code runs them."""

    slots: Literal["proportional", "plus-one", "fixed"] = setting(
        "proportional",
        "'plus-one' (2026): full segments of segment_tokens, BOS counted, and a shorter last one, with floor(S / "
        "ratio) + 1 slots each; 'fixed' (2025, COCOM): segment_tokens / ratio per segment",
        kw_only=True,
    )
    scale: Literal["matched", "none"] = setting("matched", "'none': slots without an output factor", kw_only=True)
    prefix: tuple[int, ...] | None = setting(None, "ids before each segment; default: BOS", kw_only=True)
    suffix: tuple[int, ...] = setting((), "ids between each segment and its <MEM> tokens", kw_only=True)
    as_prompt: bool = setting(False, "tokenise a passage as the start of a prompt", kw_only=True)
    query_encoder: bool = added(False, "a third LoRA encodes questions, to rank passages by their slots (CLaRa)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"slots": ("proportional", "plus-one", "fixed"), "scale": ("matched", "none")})
        if self.slots == "fixed" and self.segment_tokens < self.ratio:
            raise ValueError(f"{self.segment_tokens} tokens per segment give no slot at ratio {self.ratio:g}.")
        if self.query_aware:
            raise ValueError("The released PISCO reads no question; set query_aware to false.")
        self.prefix = None if self.prefix is None else tuple(self.prefix)
        self.suffix = tuple(self.suffix)
        if self.query_encoder and (self.slots != "fixed" or self.encoder != "lora"):
            raise ValueError("query_encoder compares as many slots of the reader on both sides: slots must be 'fixed'.")


class PublishedPISCO(PISCOCompressor):
    """PISCO, COCOM and CLaRa as their authors' code runs them.

    Attributes:
        query_encoder: the `LoRATwin` that reads questions (CLaRa's query reasoner), or ``None``.
    """

    config_class: ClassVar[type[PISCOConfig]] = PublishedPISCOConfig
    config: PublishedPISCOConfig

    def __init__(
        self, config: PublishedPISCOConfig, reader: Reader, *, encoder_model: SmallLMEncoder | None = None
    ) -> None:
        super().__init__(config, reader, encoder_model=encoder_model)
        if config.scale == "none":
            self.log_scale = None
        self.query_encoder = LoRATwin(reader.model, **config.lora) if config.query_encoder else None

    @torch.no_grad()
    def relevance(self, question: str, passages: Sequence[CompressedPassage]) -> Tensor:
        """Scores passages for a question, without reading them (CLaRa, arXiv 2511.18659).

        The query encoder reads the question as if it were a passage. The score is the cosine of the question's slots and a
        segment's slots, each as one vector; a passage scores as its best segment.

        Returns:
            ``[passages]`` in float32. CLaRa reads the ``k`` highest.

        Raises:
            ValueError: if there is no query encoder, the question is empty or longer than a segment, or a passage has no slots.
        """
        if self.query_encoder is None:
            raise ValueError("This checkpoint has no query encoder, so it cannot rank passages; CLaRa-E2E has one.")
        ids = self.token_ids(Passages([question], [None], [self.base_reader.tokenize(question)]))[0]
        segments = self.segments_of(ids, [], len(ids), None, 0)
        if len(segments) != 1:
            raise ValueError(
                f"A question has 1 to {self.config.segment_tokens} tokens, this one {len(ids)}: {question!r:.200}"
            )
        if bad := [
            i for i, p in enumerate(passages) if p.embeds is None or not p.slots or p.compressor != self.fingerprint
        ]:
            raise ValueError(f"Passage {bad[0]} holds no slots of this compressor; rank what its compress() returned.")
        rows = memory_rows(self.memory, segments)
        states = run_sequences(
            self.query_encoder,
            memory_sequences(segments, rows, "append"),
            self.source.embed,
            self.base_reader.device,
            self.batch_positions,
        )[0]
        asked = states[-segments[0].slots :].float().flatten()
        found = [passage.embeds.to(asked.device).float().reshape(-1, len(asked)) for passage in passages]  # type: ignore[union-attr]
        best = [cosine_similarity(vectors, asked[None]).max() for vectors in found]
        return torch.stack(best) if best else asked.new_zeros(0)

    @property
    def prefix(self) -> list[int]:
        """Ids before each segment, or before the passage with ``slots="plus-one"``."""
        return super().opening if self.config.prefix is None else list(self.config.prefix)

    @property
    def opening(self) -> list[int]:
        """The prefix, unless it is part of the passage."""
        return [] if self.config.slots == "plus-one" else self.prefix

    @property
    def max_positions(self) -> int | None:
        """The encoder's positions, less those of the suffix."""
        limit = super().max_positions
        return None if limit is None else limit - len(self.config.suffix)

    def token_ids(self, passages: Passages) -> list[list[int]]:
        """The encoder's token ids, tokenised as the release does."""
        if not self.config.as_prompt or not passages.texts:
            return super().token_ids(passages)
        return self.tokenizer.encode_batch([(text, True) for text in passages.texts])

    def segments_of(
        self, ids: list[int], question: list[int], source_tokens: int, ratio: float | None, number: int
    ) -> list[Segment]:
        """Segments with prefix and suffix."""
        suffix = list(self.config.suffix)
        if whole := self.config.slots == "plus-one":  # prefix and suffix are the passage's own, and are cut with it
            ids = [*self.prefix, *ids, *suffix] if ids else []
        # The authors' code counts the encoder's tokens.
        source_tokens = len(ids) if self.config.as_prompt else source_tokens
        found = super().segments_of(ids, question, source_tokens, ratio, number)
        for segment in found:
            segment.ids += [] if whole else suffix
        return found

    def cut(
        self, n_tokens: int, ratio: float | None, question_tokens: int, source_tokens: int
    ) -> list[tuple[int, int]]:
        """Cuts a passage as the release does."""
        longest = self.longest_segment(None) or n_tokens
        if self.config.slots == "plus-one":
            lengths = [min(longest, n_tokens - start) for start in range(0, n_tokens, longest)]
            return [(n, int(n // (ratio or 1.0)) + 1) for n in lengths]
        if self.config.slots == "fixed":
            slots = int(self.config.segment_tokens / self.config.ratio + 1e-6)
            return [(n, slots) for n in even_shares(n_tokens, -(-n_tokens // longest))]
        return super().cut(n_tokens, ratio, question_tokens, source_tokens)


def recognises(path: Path) -> bool:
    """Whether it has the layout of 2026."""
    return (path / "compressor" / "config.json").is_file() and any((path / name).is_file() for name in _FILES)


def load(
    source: Source,
    *,
    compr_rate: float | None = None,
    segment_tokens: int = 128,
    lora_alpha: float | None = None,
) -> PublishedPISCO:
    """Imports PISCO of 2026.

    Args:
        source: the folder; it needs the reader (the base decoder).
        compr_rate: source tokens per slot; default: the config's.
        segment_tokens: longest segment, in the compressor's tokens; the release was tuned on 128.
        lora_alpha: of the decoder's LoRA; default: twice its rank, as in the authors' code.
    """
    path = source.path
    settings = peek_json(path / "config.json")
    named = settings.get("decoder_model_name")
    base = source.need_reader(f"holds no base decoder (it was trained on {named!r})")
    rate = compr_rate or settings.get("compr_rate")
    rate = number(need(rate, "compr_rate", "how many source tokens a slot stands for", path), "compr_rate", path)
    reader = _decoder(source, base, lora_alpha)
    encoder, memory = _encoder(source, path)
    keys = source.keys(load_tensors(path / "connector.pt"), path / "connector.pt")
    width = encoder.body.config.get_text_config().hidden_size
    first = keys.take("0.weight", (None, width))
    connector = {
        "0.weight": first,
        "0.bias": keys.take("0.bias", (len(first),)),
        "2.weight": keys.take("2.weight", (reader.width, len(first))),
        "2.bias": keys.take("2.bias", (reader.width,)),
    }
    keys.done()
    config = PublishedPISCOConfig(
        ratio=rate,
        segment_tokens=segment_tokens,
        slots="plus-one",
        memory_tokens=1,
        encoder=str(settings.get("compressor_model_name") or "compressor"),
        connector="mlp",
        connector_width=len(first),
        scale="none",
        decoder="none",
        suffix=_after(encoder.prompts.tokenizer),
        as_prompt=True,
    )
    compressor = PublishedPISCO(config, reader, encoder_model=encoder)
    with torch.no_grad():
        compressor.memory.copy_(memory)
        for name, parameter in compressor.connector.named_parameters():  # type: ignore[union-attr]
            parameter.copy_(connector[name])
    return compressor


def _encoder(source: Source, path: Path) -> tuple[SmallLMEncoder, Tensor]:
    """The compressor model with its tokenizer, and the <MEM> embedding ``[1, width]``."""
    folder = path / "compressor"
    config = model_config(read_json(folder / "config.json"), folder)
    keys = source.keys(load_model_state(folder), folder)
    keys.ignore(r"^lm_head\.", "the compressor's head, which nothing reads")
    state: dict[str, Tensor] = keys.take_all(r"(?:model\.)?(?=.)")
    body: Any = build_model(config, state, folder, AutoModel)
    tokenizer = load_tokenizer(path / "compressor_tokenizer", source)
    encoder = SmallLMEncoder(body.to(source.device), tokenizer)
    index = tokenizer.get_vocab().get(MEM)
    if index is None or index >= encoder.vocab_size:
        raise CheckpointError(
            f"{path}/compressor_tokenizer gives {MEM} the id {index}, but the compressor has {encoder.vocab_size} embeddings."
        )
    return encoder, encoder.embed(torch.tensor([index], device=source.device)).detach().clone()


def _decoder(source: Source, base: Reader, lora_alpha: float | None) -> Reader:
    """The reader: the base decoder with merged LoRA and the trained embedding rows."""
    path = source.path / "decoder_state.pt"
    keys: Keys = source.keys(load_tensors(path), path)
    keys.ignore(r"\.original_module\.", "the embedding rows as they were before training")
    embed, head = _rows(keys, "embed_tokens"), _rows(keys, "lm_head")
    lora = take_lora(keys, r"(?:.*?\.)?(?=layers\.)")
    keys.done()
    rank, _ = lora_shape(lora, path)
    merged = merge_lora(base, source, lora, (lora_alpha or 2 * rank) / rank)
    tokenizer = load_tokenizer(source.path / "decoder_tokenizer", source)
    return graft_rows(merged, source, embed, head, tokenizer)


def _rows(keys: Keys, name: str) -> Tensor | None:
    """Trained rows of a module, from peft's copies or directly."""
    for pattern in (rf"(?:.*\.)?{name}\.modules_to_save\.\w+\.", rf"(?:.*\.)?{name}\."):
        if found := keys.take_all(rf"{pattern}(?=weight$)"):
            return found["weight"]
    return None


def _after(tokenizer: Any) -> tuple[int, ...]:
    """Ids that a tokenizer appends to each text (an end token, for some embedding models)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return tuple(full[start + len(bare) :])
