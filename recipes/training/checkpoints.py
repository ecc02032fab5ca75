"""Atomic checkpoints.

A checkpoint is written into a hidden folder, synced to disk and renamed into place; deletion renames first too. So every
folder with a checkpoint's name is complete, even after the process was killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_NAME = re.compile(r"^(\d{2})-[A-Za-z0-9_-]+-(\d{7})$")
_HIDDEN = ".partial-"
PROGRESS = "progress.json"


@dataclass
class Progress:
    """State of a run besides weights, optimiser and random generators.

    Attributes:
        stage, step, done: index of the stage, its optimiser steps so far, whether it is finished.
        tokens, seconds: totals of the run so far.
        log_bytes: length of the log at the checkpoint; resuming truncates the log to it.
        logged_step, window: step of the stage's last log line, and metric values since then.
        hits: how many times in a row the stage's `stop_when` held.
        trained: names of the parameters trained so far.
        recipe: `Recipe.identity()` of the run.
    """

    stage: int = 0
    step: int = 0
    done: bool = False
    tokens: int = 0
    seconds: float = 0.0
    log_bytes: int = 0
    logged_step: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    hits: int = 0
    trained: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes it into a checkpoint's folder."""
        (folder / PROGRESS).write_text(json.dumps(asdict(self), allow_nan=True), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Reads it from a checkpoint's folder."""
        return cls(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


class CheckpointStore:
    """The checkpoints of one run below `root`, named `<stage index>-<stage name>-<step>`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def all(self) -> list[Path]:
        """Every complete checkpoint, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(path for path in self.root.iterdir() if _NAME.match(path.name) and (path / PROGRESS).is_file())

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return found[-1] if (found := self.all()) else None

    def clean(self) -> None:
        """Removes remains of interrupted writes and deletions."""
        for path in self.root.glob(f"{_HIDDEN}*"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes every checkpoint."""
        for path in self.all():
            self._remove(path)
        self.clean()

    def prune(self, keep: int) -> None:
        """Removes all but the newest `keep` checkpoints."""
        for path in self.all()[:-keep]:
            self._remove(path)

    def partial(self, name: str) -> Path:
        """Hidden folder in which checkpoint `name` is assembled."""
        return self.root / f"{_HIDDEN}{name}"

    def publish(self, content: Path, name: str) -> Path:
        """Syncs the folder `content` to disk and renames it to `name` atomically."""
        target = self.root / name
        sync_tree(content)
        if target.exists():
            self._remove(target)
        os.replace(content, target)
        sync_folder(self.root)
        return target

    def _remove(self, path: Path) -> None:
        doomed = self.partial(f"deleted-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def checkpoint_name(stage_index: int, stage_name: str, step: int) -> str:
    """`01-distil-0000400`: sorts by stage, then by step."""
    return f"{stage_index:02d}-{stage_name}-{step:07d}"


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to disk, on POSIX."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below `folder` to disk."""
    for place, _, files in os.walk(folder, topdown=False):
        for file in files:
            descriptor = os.open(Path(place) / file, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(place))


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `target` if the block ends without an error."""
    fresh, old = (target.with_name(f"{_HIDDEN}{kind}-{target.name}") for kind in ("new", "old"))
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    sync_tree(fresh)
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
