"""A compressor's folder: ``config.json``, and the trained tensors in ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from .errors import CheckpointError
from .files import write_atomically

if TYPE_CHECKING:
    pass

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def read_config(folder: str | Path) -> dict[str, Any]:
    """The contents of a compressor folder's ``config.json``. Raises ``CheckpointError`` if it is none."""
    path = Path(folder) / CONFIG_NAME
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(about, dict) or not {"method", "config"} <= about.keys():
        raise CheckpointError(f"{path} describes no compressor: it needs the keys 'method' and 'config'.")
    return about


def write_checkpoint(folder: str | Path, about: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes the weights, if there are any, and then ``config.json``, each atomically."""
    folder = Path(folder)
    if state:
        held = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        write_atomically(folder / WEIGHTS_NAME, save_safetensors(held, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_NAME, (json.dumps(about, indent=2) + "\n").encode())


def load_weights(folder: str | Path, wanted: Mapping[str, Tensor], owner: str) -> None:
    """Copies a folder's weights into tensors.

    Args:
        folder: the compressor's folder.
        wanted: the tensors that are to be filled, by name; for none of them nothing is read.
        owner: whose they are, for the error message.

    Raises:
        CheckpointError: with the names, if weights are missing, left over or misshapen, or the file is damaged.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not wanted:
        return
    try:
        found = load_safetensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    problems = [
        *(f"missing {name}" for name in sorted(wanted.keys() - found.keys())),
        *(f"unknown {name}" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{name} is {tuple(found[name].shape)}, wanted {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name].shape != wanted[name].shape
        ),
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit this {owner}: {'; '.join(problems)}.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


READER_FOLDER = "reader"  # beside an imported compressor: the reader that came with it


def download(hub_id: str, pickles: bool = False) -> Path:
    """A hub repository's files in a local folder: configs, tokenizers and safetensors, or what torch pickled too.

    Raises:
        CheckpointError: if it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", *(["*.bin", "*.pth", "*.pt"] if pickles else [])]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id!r} is neither a local folder nor a hub repository that can be reached: {error}"
        ) from error
