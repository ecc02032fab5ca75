"""LCLM checkpoints: encoder, adapter and decoder, a folder each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from ..base import Passages
from ..core.config import added, check_choices
from ..core.errors import CheckpointError
from ..encoders.small_lm import SmallLMEncoder
from ..reader.reader import Reader
from ..slots.segments import Segment, window_lengths
from ..soft.lclm import LCLMCompressor, LCLMConfig
from .layout import Source, listed, load_model_state, load_tensors, number, read_json
from .models import build_model, has_tokenizer, load_tokenizer, make_reader, model_config

PARTS = ("encoder", "adapter", "decoder")
# Settings that are understood, with the value that is supported (None: any number).
_SETTINGS: dict[str, Any] = {
    "compression_ratio": None,
    "encoder_window_size": None,
    "num_adapter_layers": None,  # of attention, which an MLP has none of
    "pooling": "mean",
    "encoder_mask_type": "causal",
    "boundary_overlap": 0,
    "adapter_type": "mlp",
}


@dataclass
class PublishedLCLMConfig(LCLMConfig):
    """Settings of LCLM as its authors' code runs it."""

    scale: Literal["matched", "none"] = added("matched", "'none': slots without an output factor")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"scale": ("matched", "none")})


@dataclass
class Window(Segment):
    """A window of the encoder.

    Attributes:
        run: tokens per slot.
    """

    run: float = 1.0


class PublishedLCLM(LCLMCompressor):
    """LCLM as its authors' code runs it: the encoder's tokens are counted, and windows and runs are full but for the last."""

    config_class: ClassVar[type[LCLMConfig]] = PublishedLCLMConfig
    config: PublishedLCLMConfig

    def __init__(
        self, config: PublishedLCLMConfig, reader: Reader, *, encoder_model: SmallLMEncoder | None = None
    ) -> None:
        super().__init__(config, reader, encoder_model=encoder_model)
        if config.scale == "none":
            self.log_scale = None

    @property
    def opening(self) -> list[int]:
        """Nothing: windows have no BOS."""
        return []

    def token_ids(self, passages: Passages) -> list[list[int]]:
        """Token ids of the passages, each tokenised as a text of its own."""
        texts = [(text, True) for text in passages.texts]
        return self.tokenizer.encode_batch(texts) if texts else passages.ids

    def cut(
        self, n_tokens: int, ratio: float | None, question_tokens: int, source_tokens: int
    ) -> list[tuple[int, int]]:
        """Windows of ``segment_tokens``, with a slot for each run of ``ratio`` tokens."""
        windows = window_lengths(n_tokens, self.config.segment_tokens)
        return [(n, len(window_lengths(n, ratio or 1.0))) for n in windows]

    def segments_of(
        self, ids: list[int], question: list[int], source_tokens: int, ratio: float | None, number: int
    ) -> list[Segment]:
        """The windows of passage ``number``."""
        found = super().segments_of(ids, question, source_tokens, ratio, number)
        return [Window(s.ids, s.slots, s.front, s.passage, ratio or 1.0) for s in found]

    def owners(self, segments: Sequence[Segment]) -> Tensor:
        """Runs of exactly ``ratio`` tokens, but for the last one of a window."""
        windows = [s for s in segments if isinstance(s, Window)]
        if len(windows) < len(segments):  # the sample that the base class measures
            return super().owners(segments)
        runs = torch.tensor([run for window in windows for run in window_lengths(len(window.ids), window.run)])
        return torch.repeat_interleave(torch.arange(len(runs)), runs)


def recognises(path: Path) -> bool:
    """Whether it has LCLM's layout."""
    return (path / "model_config.json").is_file() and all((path / part).is_dir() for part in PARTS)


def load(source: Source) -> PublishedLCLM:
    """Imports LCLM (arXiv 2606.09659): the encoder, the adapter and the decoder, which becomes the reader.

    Its prompt: `nutgraf.compressors.importers.prompts.lclm_prompt`.

    Args:
        source: the folder, with ``model_config.json`` and the folders ``encoder``, ``adapter`` and ``decoder``. A given reader
            is used for its tokenizer alone, if the folder ``decoder`` holds none.
    """
    path = source.path
    settings = _settings(path / "model_config.json")
    ratio, window = settings["compression_ratio"], settings["encoder_window_size"]
    if window % ratio:
        raise CheckpointError(f"{path}/model_config.json: encoder_window_size {window:g} is no multiple of {ratio:g}.")
    model = _model(path / "decoder", AutoModelForCausalLM)
    reader = make_reader(model, load_tokenizer(path / "decoder", source), source)
    if not has_tokenizer(path / "encoder"):
        raise CheckpointError(f"{path}/encoder holds no tokenizer.")
    body = _model(path / "encoder", AutoModel).to(source.device)
    encoder = SmallLMEncoder(body, load_tokenizer(path / "encoder", source))
    keys = source.keys(load_tensors(path / "adapter" / "adapter.safetensors"), path / "adapter")
    size, width = body.config.get_text_config().hidden_size, reader.width
    shapes = {"norm.weight": (size,), "mlp.0.weight": (width, size), "mlp.0.bias": (width,)}
    shapes |= {"mlp.2.weight": (width, width), "mlp.2.bias": (width,)}
    theirs = {"mlp.0": "fc1", "mlp.2": "fc2", "norm": "norm"}
    found = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        found[name] = keys.take(f"{theirs[module]}.{kind}", shape)
    keys.done()
    config = PublishedLCLMConfig(
        ratio=ratio, segment_tokens=int(window), encoder="encoder", adapter_width=width, scale="none"
    )
    compressor = PublishedLCLM(config, reader, encoder_model=encoder)
    with torch.no_grad():
        for name, tensor in found.items():
            compressor.get_parameter(name).copy_(tensor)
    return compressor


def _settings(path: Path) -> dict[str, float]:
    """The numbers of ``model_config.json``. Raises ``CheckpointError`` for an encoder or adapter of another kind."""
    held, numbers = read_json(path), {}
    if unknown := sorted(held.keys() - _SETTINGS.keys()):
        raise CheckpointError(f"{path} sets {listed(unknown)}, which is not known; known are {listed(_SETTINGS)}.")
    if missing := sorted(_SETTINGS.keys() - held.keys() - {"num_adapter_layers"}):
        raise CheckpointError(f"{path} lacks {listed(missing)}.")
    for name, value in held.items():
        if _SETTINGS[name] is None:
            numbers[name] = number(value, name, path)
        elif value != _SETTINGS[name]:
            raise CheckpointError(f"{path} sets {name} to {value!r}; supported is {_SETTINGS[name]!r}.")
    return numbers


def _model(folder: Path, auto: Any) -> Any:
    """The model of a folder. Raises ``CheckpointError`` if it holds LoRA adapters instead."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds LoRA adapters; merge them into their model with PEFT first.")
    return build_model(model_config(read_json(folder / "config.json"), folder), load_model_state(folder), folder, auto)
