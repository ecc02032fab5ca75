"""Activation Beacon checkpoints: the whole model, with full projections of their own for the beacons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.batching import SoftSequence
from ..core.config import added, check_choices
from ..core.errors import CheckpointError
from ..core.hidden import hide
from ..encoders.lora_twin import Twin, share
from ..kv.beacon import BeaconCompressor, BeaconConfig
from ..reader.kv import layer_list
from ..reader.reader import Reader
from ..slots.memory_tokens import interleaved
from ..slots.segments import Segment, window_lengths
from .layout import Keys, Source, listed, load_model_state, number, peek_json
from .models import build_model, load_tokenizer, make_reader, model_config

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Settings that are understood, with the value that is supported (None: any).
_SETTINGS: dict[str, Any] = {
    "beacon_window": None,
    "beacon_stride": None,
    "beacon_sink_size": None,
    "beacon_param": None,
    "beacon_attn": "full-coverage",
    "beacon_pos": "interleave",
    "beacon_attend_prev": True,
    "beacon_parallel_window": 1,
    "beacon_ratio": None,  # what training drew from
    "beacon_ratio_mix": None,
    "beacon_embed_init": None,
}


@dataclass
class PublishedBeaconConfig(BeaconConfig):
    """Settings of Activation Beacon as its authors' code runs it."""

    projections: Literal["lora", "full"] = added("lora", "'full': beacons have whole projections instead of LoRA")
    sink: bool = added(True, "later windows see the prompt's BOS; false: BOS is the passage's first token")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"projections": ("lora", "full")})


@dataclass
class Window(Segment):
    """A window of a passage.

    Attributes:
        run: tokens before each beacon.
        counted: tokens of its front that belong to the first run.
    """

    run: float = 1.0
    counted: int = 0


class FullProjections(Twin):
    """A model that has other query, key and value projections for some tokens. They start as copies of its own.

    Attributes:
        projections: weights and biases by their path in the decoder, with ``/`` instead of dots.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        lm = share(model)
        hide(self, "lm", lm.eval())
        unused = f"{len(layer_list(self.decoder)[1]) - 1}.self_attn.q_proj"  # no key or value depends on it
        self.projections = nn.ParameterDict()
        for path, module in self.decoder.named_modules():
            if path.endswith(_PROJECTIONS) and not path.endswith(unused):
                for kind, parameter in module.named_parameters():
                    self.projections[f"{path}.{kind}".replace(".", "/")] = nn.Parameter(parameter.detach().clone())

    @contextlib.contextmanager
    def only_at(self, where: Tensor) -> Iterator[None]:
        """Within it, the tokens in the ``[batch, time]`` bool mask pass through the other projections."""

        def hook(path: str) -> Any:
            weight, bias = (self.projections.get(f"{path}/{kind}") for kind in ("weight", "bias"))
            return lambda module, given, out: torch.where(where[..., None], F.linear(given[0], weight, bias), out)

        paths = [key.removesuffix("/weight") for key in self.projections if key.endswith("/weight")]
        handles = [
            self.decoder.get_submodule(path.replace("/", ".")).register_forward_hook(hook(path)) for path in paths
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PublishedBeacon(BeaconCompressor):
    """Activation Beacon as its authors' code runs it: full windows and runs but for the last, and whole projections.

    The release compresses full windows only, and keeps the tokens after them; here the last window is compressed, too.
    """

    config_class: ClassVar[type[BeaconConfig]] = PublishedBeaconConfig
    config: PublishedBeaconConfig

    def __init__(self, config: PublishedBeaconConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        if config.projections == "full":
            self.encoder = FullProjections(reader.model)

    @property
    def opening(self) -> list[int]:
        """BOS, if later windows see it."""
        return super().opening if self.config.sink else []

    def segments_of(
        self, ids: list[int], question: list[int], source_tokens: int, ratio: float | None, number: int
    ) -> list[Segment]:
        """The windows of passage ``number``; BOS is the first token of the first one."""
        found: list[Segment] = []
        bos, run, start = self.base_reader.bos_ids, ratio or 1.0, 0
        raw = [*bos, *ids]
        for n in window_lengths(len(raw), self.config.segment_tokens) if ids else []:
            counted = len(bos) if self.config.sink and not start else 0
            slots = len(window_lengths(n, run))
            found.append(Window(raw[start + counted : start + n], slots, self.opening, number, run, counted))
            start += n
        return found

    def sequences(self, segments: Sequence[Segment]) -> list[SoftSequence]:
        """A beacon after every ``run`` tokens of a window."""
        owners = []
        for window in segments:
            if not isinstance(window, Window):
                return super().sequences(segments)
            runs = torch.tensor(window_lengths(window.counted + len(window.ids), window.run))
            owners.append(torch.repeat_interleave(torch.arange(len(runs)), runs)[window.counted :])
        return interleaved(segments, self.beacon, owners)


def recognises(path: Path) -> bool:
    """Whether it has Activation Beacon's layout."""
    return path.is_dir() and "beacon_window" in peek_json(path / "config.json")


def load(source: Source, *, ratio: float = 4.0) -> PublishedBeacon:
    """Imports Activation Beacon (arXiv 2401.03462): the model, which becomes the reader, and its beacons.

    Args:
        source: the folder of the whole model.
        ratio: tokens per beacon if none is asked for; the release was trained on several.
    """
    path, settings = source.path, source.config()
    own = {name: value for name, value in settings.items() if name.startswith("beacon_")}
    window = _check(own, path)
    keys = source.keys(load_model_state(path))
    row = keys.take("model.beacon_embed_tokens.weight", (1, None))
    taken = keys.take_all(r"model\.(?=.*\.beacon_\w+_proj\.)")
    held = {name.replace(".beacon_", "."): tensor for name, tensor in taken.items()}
    state = keys.take_all(r"(?=model\.|lm_head\.)")
    keys.done()
    model = build_model(model_config(settings, path, drop=own), state, path)
    reader = make_reader(model, load_tokenizer(path, source), source)
    sink = bool(own.get("beacon_sink_size"))
    if sink and not reader.bos_ids:
        raise CheckpointError(f"{path} keeps the first token in sight, and its tokenizer puts no BOS before a text.")
    config = PublishedBeaconConfig(segment_tokens=window, ratio=ratio, projections="full", sink=sink)
    compressor = PublishedBeacon(config, reader)
    projections = Keys(held, path, source.ignored)
    projections.ignore(
        rf"^layers\.{len(layer_list(model.get_decoder())[1]) - 1}\.self_attn\.q_proj\.",
        "queries of the last layer's beacons, on which no key or value depends",
    )
    with torch.no_grad():
        for name, parameter in compressor.encoder.projections.items():  # type: ignore[union-attr, operator]
            parameter.copy_(projections.take(name.replace("/", "."), tuple(parameter.shape)))
        compressor.beacon.copy_(row)
    projections.done()
    return compressor


def _check(own: Mapping[str, Any], path: Path) -> int:
    """The window of a checkpoint's settings. Raises ``CheckpointError`` for beacons of another kind."""
    window = int(number(own.get("beacon_window"), "beacon_window", path / "config.json"))
    if unknown := sorted(own.keys() - _SETTINGS.keys()):
        raise CheckpointError(f"{path}/config.json sets {listed(unknown)}, which is not known.")
    wanted = {name: value for name, value in _SETTINGS.items() if value is not None}
    for name, value in {**wanted, "beacon_stride": window}.items():
        if own.get(name, value) != value:
            raise CheckpointError(f"{path}/config.json sets {name} to {own[name]!r:.60}; supported is {value!r}.")
    sink, parts = own.get("beacon_sink_size", 0), own.get("beacon_param", "qkv")
    if sink not in (0, 1) or not isinstance(parts, str | list) or sorted(map(str, parts)) != ["k", "q", "v"]:
        raise CheckpointError(
            f"{path}/config.json sets beacon_sink_size to {sink!r:.60} and beacon_param to {parts!r:.60}; supported are 0 or "
            "1, and q, k and v."
        )
    return window
