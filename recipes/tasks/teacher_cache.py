"""Cache of teacher logits on disk, by prompt and target.

A folder holds `about.json`, which identifies the teacher, and files of many entries, each written atomically. Entries that a
killed process has not written are recomputed. Several processes may write to one folder.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...compressors.core.files import write_atomically
from ...compressors.objectives.teacher import TeacherLogits

ABOUT = "about.json"
FORMAT = 1


class TeacherCache:
    """Stores `TeacherLogits` by prompt and target, in ``8 k + 4`` bytes per target token.

    Args:
        folder: its folder, created if needed.
        teacher: fingerprint of the teacher.
        top_k, temperature: of the distillation; see `KLDistillationLoss`.
        rows: target tokens that are buffered before they are written.

    Attributes:
        hits, misses: entries found and not found by this object.

    Raises:
        ValueError: if the folder holds the logits of another teacher, top_k or temperature, or a damaged file.
    """

    def __init__(
        self, folder: str | Path, *, teacher: str, top_k: int, temperature: float = 1.0, rows: int = 16384
    ) -> None:
        self.folder, self.top_k, self.rows = Path(folder), top_k, rows
        self.hits = self.misses = 0
        self._claim({"format": FORMAT, "teacher": teacher, "top_k": top_k, "temperature": float(temperature)})
        self._files: list[Any] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}  # file, first row, row after the last
        self._pending: dict[bytes, TeacherLogits] = {}
        self._held = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    @staticmethod
    def key(prompt: str, target: Sequence[int], dtype: str) -> bytes:
        """Key of an entry: the teacher's prompt, the target's ids and the teacher's dtype."""
        content = json.dumps([prompt, list(target), dtype], ensure_ascii=True)
        return hashlib.blake2b(content.encode(), digest_size=16).digest()

    def get(self, keys: Sequence[bytes]) -> list[TeacherLogits | None]:
        """Entries of keys, on the CPU; None for missing ones."""
        found = [self._read(key) for key in keys]
        self.misses += (missing := sum(entry is None for entry in found))
        self.hits += len(found) - missing
        return found

    def put(self, key: bytes, entry: TeacherLogits) -> None:
        """Adds an entry unless its key exists; writes the buffer when it is full."""
        if entry.ids.shape[1] != self.top_k:
            raise ValueError(f"This cache keeps {self.top_k} tokens a position, got {entry.ids.shape[1]}.")
        if key in self._pending or key in self._places:
            return
        self._pending[key] = TeacherLogits(entry.ids.to("cpu", torch.int32), entry.logprobs.to("cpu", torch.float32))
        self._held += len(entry)
        if self._held >= self.rows:
            self.flush()

    def flush(self) -> None:
        """Writes the buffer as one file."""
        if not self._pending:
            return
        entries = list(self._pending.values())
        ends = torch.tensor([len(entry) for entry in entries]).cumsum(0)
        whole = TeacherLogits.join(entries)
        keys = torch.tensor([list(key) for key in self._pending], dtype=torch.uint8)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        tensors = {"keys": keys, "ends": ends, "ids": whole.ids, "logprobs": whole.logprobs}
        write_atomically(path, save(tensors))
        self._pending, self._held = {}, 0
        self._index(path)

    def _claim(self, about: dict[str, Any]) -> None:
        """Writes `about.json`, or refuses a folder of another teacher."""
        path = self.folder / ABOUT
        if not path.exists():
            if next(self.folder.glob("*.safetensors"), None) is not None:
                raise ValueError(f"{self.folder} holds files but no {ABOUT}; give an empty folder for teacher_cache.")
            write_atomically(path, (json.dumps(about, indent=2) + "\n").encode())
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete the folder, or give another one.") from error
        if found != about:
            name = next((key for key in about if not isinstance(found, dict) or found.get(key) != about[key]), "format")
            got = found.get(name) if isinstance(found, dict) else found
            raise ValueError(
                f"{self.folder} holds the logits of another teacher: {name} is {got!r} there and {about[name]!r} here. Give "
                "another folder for teacher_cache, or delete this one."
            )

    def _index(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            keys, ends = file.get_tensor("keys"), file.get_tensor("ends").tolist()
            shape = tuple(file.get_slice("ids").get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and its entries are made again.") from error
        if shape != (ends[-1] if ends else 0, self.top_k) or keys.shape != (len(ends), 16):
            raise ValueError(f"{path} holds tensors of other shapes than its index; delete it.")
        number = len(self._files)
        self._files.append(file)
        for key, first, last in zip(keys, [0, *ends], ends):
            self._places.setdefault(bytes(key.tolist()), (number, first, last))

    def _read(self, key: bytes) -> TeacherLogits | None:
        if key in self._pending:
            return self._as_read(self._pending[key].ids, self._pending[key].logprobs)
        if key not in self._places:
            return None
        number, first, last = self._places[key]
        file = self._files[number]
        return self._as_read(file.get_slice("ids")[first:last], file.get_slice("logprobs")[first:last])

    @staticmethod
    def _as_read(ids: Tensor, logprobs: Tensor) -> TeacherLogits:
        return TeacherLogits(ids.long(), logprobs)
