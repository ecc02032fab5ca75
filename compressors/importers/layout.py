"""Reads published checkpoints safely and accounts for every key."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import CheckpointError
from ..reader.reader import Reader

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class MissingOption(CheckpointError):
    """A hyper-parameter that the checkpoint does not hold and the caller must give by name."""


@dataclass
class Source:
    """A checkpoint to import, with its reader and the keys left out.

    Attributes:
        path: the checkpoint's file or folder.
        reader: the reader given, or ``None``.
        device: device of models built from the checkpoint.
        ignored: keys that were left out, each with the reason.
    """

    path: Path
    reader: Reader | None = None
    device: str | torch.device = "cpu"
    ignored: dict[str, str] = field(default_factory=dict)

    def need_reader(self, why: str) -> Reader:
        """The given reader. Raises `MissingOption` if there is none."""
        if self.reader is None:
            raise MissingOption(f"{self.path} {why}; give its reader: reader=... (on the command line --reader).")
        return self.reader

    def config(self) -> dict[str, Any]:
        """The folder's ``config.json``. Raises ``CheckpointError`` if there is none."""
        return read_json(self.path / "config.json")

    def keys(self, state: Mapping[str, Tensor], where: Path | None = None) -> Keys:
        """`Keys` of a state; ignored keys are noted here."""
        return Keys(dict(state), where or self.path, self.ignored)


class Keys:
    """Tensors of a checkpoint; each must be taken or ignored once.

    Args:
        state: the tensors by name.
        where: the checkpoint's name in error messages.
        ignored: collects ignored names and reasons.
    """

    def __init__(self, state: dict[str, Tensor], where: Path, ignored: dict[str, str] | None = None) -> None:
        self._left = state
        self.where = where
        self.ignored = {} if ignored is None else ignored
        self.ignore(_FREQUENCIES, "rotary frequencies, which follow from the config")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._left))

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """One tensor by name.

        Args:
            shape: expected shape; ``None`` for a free axis.

        Raises:
            CheckpointError: if it is missing or has another shape.
        """
        if name not in self._left:
            raise CheckpointError(f"{self.where} lacks {name}.")
        tensor = self._left.pop(name)
        if shape is not None and (
            tensor.dim() != len(shape) or any(b not in (None, a) for a, b in zip(tensor.shape, shape))
        ):
            wanted = tuple("any" if n is None else n for n in shape)
            raise CheckpointError(f"{self.where}: {name} is {tuple(tensor.shape)}, wanted {wanted}.")
        return tensor

    def take_all(self, pattern: str | re.Pattern[str]) -> dict[str, Tensor]:
        """Takes the tensors whose names start with a pattern, keyed by the rest of the name."""
        pattern = re.compile(pattern)
        found = {name: m.end() for name in self._left if (m := pattern.match(name))}
        return {name[end:]: self._left.pop(name) for name, end in found.items()}

    def ignore(self, pattern: str | re.Pattern[str], reason: str) -> None:
        """Leaves out tensors whose names contain a pattern, and notes why."""
        pattern = re.compile(pattern)
        for name in [n for n in self._left if pattern.search(n)]:
            del self._left[name]
            self.ignored[name] = reason

    def done(self) -> None:
        """Raises ``CheckpointError`` if a key was neither taken nor ignored."""
        if self._left:
            raise CheckpointError(f"{self.where} holds unknown keys: {listed(self._left)}.")


def need(value: Any, name: str, what: str, path: Path) -> Any:
    """Returns the value, or raises `MissingOption` for its name."""
    if value is None:
        raise MissingOption(f"{path} does not say {what}; give {name}=... .")
    return value


def number(value: Any, name: str, path: Path, most: float = 2**20) -> float:
    """A number of a checkpoint's config. Raises ``CheckpointError`` unless it lies in 1..most."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= most:
        raise CheckpointError(f"{path} sets {name} to {value!r:.60}; a number from 1 to {most:g} is wanted.")
    return float(value)


def listed(names: Any, limit: int = 8) -> str:
    """Names for an error message: the first ones and the number of the rest."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ``CheckpointError`` if the file is missing or holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}.")
    return data


def peek_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if there is none."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def load_pickle(path: Path) -> Any:
    """Loads a torch file with ``weights_only=True``.

    Raises:
        CheckpointError: if the file is damaged, or holds pickled objects other than tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if path.is_file() and path.stat().st_size and _is_pickle(path):
            raise CheckpointError(
                f"{path} holds pickled objects other than tensors; loading them could run any code. "
                f"Save its tensors as safetensors, or with torch.save as a dict of tensors. ({_first_line(error)})"
            ) from error
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2)
    return head in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Loads the tensors of one safetensors or torch file, on the CPU.

    Raises:
        CheckpointError: if it is damaged, is no flat dict of dense tensors, or a tensor holds NaN or infinity.
    """
    if path.suffix == ".safetensors":
        try:
            state: Any = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
    else:
        state = load_pickle(path)
    return check_state(state, path)


def check_state(state: Any, where: Path) -> dict[str, Tensor]:
    """Returns a state dict of dense, finite tensors. Raises ``CheckpointError`` otherwise."""
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{where} must hold a dict of tensors by name, got {type(state).__name__}.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{where} must hold tensors by name, but {name!r} is a {type(tensor).__name__}.")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{where}: {name} is no dense tensor ({tensor.layout}); save it dense.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinite numbers; the checkpoint is damaged.")
    return dict(state)


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a Hugging Face model, safetensors preferred, sharded or whole; or none."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise CheckpointError(f"{index} names no shards.")
            if bad := [s for s in shards.values() if not isinstance(s, str) or Path(s).name != s]:
                raise CheckpointError(f"{index} names a shard outside its folder: {bad[0]!r}.")
            return [folder / shard for shard in sorted(set(shards.values()))]
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    return []


def load_model_state(folder: Path) -> dict[str, Tensor]:
    """Loads all weights of a Hugging Face folder.

    Raises:
        CheckpointError: if there are none, a shard is missing, or shards and index differ.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no model.safetensors or pytorch_model.bin, whole or sharded.")
    state: dict[str, Tensor] = {}
    for file in files:
        part = load_tensors(file)
        if twice := state.keys() & part.keys():
            raise CheckpointError(f"{file} holds {listed(twice)} a second time.")
        state |= part
    index = next(
        iter(folder.glob(f"{'model' if files[0].suffix == '.safetensors' else 'pytorch_model'}.*.index.json")), None
    )
    if index is not None:
        wanted = read_json(index)["weight_map"].keys()
        if differ := wanted ^ state.keys():
            raise CheckpointError(f"{index} and its shards differ in {listed(differ)}.")
    return state


def holds_key(path: Path, start: str) -> bool:
    """Whether a file, or the only file of a folder, holds tensors with a name that starts so."""
    try:
        file = single_file(path)
        return file.suffix in {".safetensors", *PICKLES} and any(name.startswith(start) for name in load_tensors(file))
    except CheckpointError:
        return False


def single_file(path: Path, suffixes: set[str] | None = None) -> Path:
    """The file of tensors at a path: itself, or the only one in a folder.

    Raises:
        CheckpointError: if there is none, or several.
    """
    if path.is_file():
        return path
    suffixes = suffixes or {".safetensors", *PICKLES}
    found = sorted(f for f in path.iterdir() if f.suffix in suffixes and f.is_file()) if path.is_dir() else []
    if len(found) != 1:
        held = listed(f.name for f in found) or "none"
        raise CheckpointError(f"{path} must hold one file of tensors, it holds {held}; name the file itself.")
    return found[0]
