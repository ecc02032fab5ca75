"""Reads and writes a compressor's folder: ``config.json`` and the trained tensors in ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from .errors import CheckpointError
from .files import write_atomically

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
READER_FOLDER = "reader"  # in the folder of an imported compressor: its reader


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads a compressor folder's ``config.json``. Raises ``CheckpointError`` if it is missing or invalid."""
    path = Path(folder) / CONFIG_NAME
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(about, dict) or not {"method", "config"} <= about.keys():
        raise CheckpointError(f"{path} is not a compressor's: it needs the keys 'method' and 'config'.")
    return about


def write_checkpoint(folder: str | Path, about: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes the weights, if any, and then ``config.json``, each atomically."""
    folder = Path(folder)
    if state:
        held = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        write_atomically(folder / WEIGHTS_NAME, save_safetensors(held, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_NAME, (json.dumps(about, indent=2) + "\n").encode())


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """A folder's weights by name. Raises ``CheckpointError`` if the file is missing or damaged."""
    path = Path(folder) / WEIGHTS_NAME
    try:
        return load_safetensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_weights(folder: str | Path, wanted: Mapping[str, Tensor], owner: str) -> None:
    """Copies a folder's weights into tensors.

    Args:
        folder: the compressor's folder.
        wanted: the tensors to fill, by name; if empty, nothing is read.
        owner: name of their module, for the error message.

    Raises:
        CheckpointError: with the names, if weights are missing, unknown or misshapen, or the file is damaged.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not wanted:
        return
    found = read_weights(folder)
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


def download(hub_id: str, pickles: bool = False) -> Path:
    """Downloads configs, tokenizers and safetensors of a hub repository, optionally also torch pickles.

    Raises:
        CheckpointError: if the repository cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", *(["*.bin", "*.pth", "*.pt"] if pickles else [])]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id!r} is neither a local folder nor a reachable hub repository: {error}"
        ) from error
