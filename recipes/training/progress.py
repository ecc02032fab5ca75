"""Training log, progress bar and stop signals."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """JSON lines, one per log step, that can be truncated to the state of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def size(self) -> int:
        """Length in bytes, after syncing to disk."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def cut(self, size: int) -> None:
        """Truncates to the first `size` bytes."""
        if self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second SIGINT interrupts.

    Does nothing outside the main thread, where handlers cannot be set.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class RunBar:
    """A progress bar for the whole run on a terminal, else one plain line per log step."""

    def __init__(self, total_steps: int, name: str, enabled: bool = True) -> None:
        self.enabled = enabled
        self.console = Console(stderr=True)
        self.live = enabled and self.console.is_terminal
        self.name = name
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self._task = self._bar.add_task(name, total=total_steps, note="")
        self._printed = 0.0

    def __enter__(self) -> RunBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def move(self, completed: int) -> None:
        """Sets the number of finished steps of the run."""
        self._bar.update(self._task, completed=completed)

    def show(self, row: dict[str, Any]) -> None:
        """Shows a log line on the bar, or prints it, at most once every two seconds."""
        keys = [key for key in row if key == "loss" or "/" in key]
        note = "  ".join(f"{key} {row[key]:.4g}" for key in keys)
        if speed := row.get("tokens_per_s"):
            note += f"  {speed:,.0f} tok/s"
        if self.live:
            self._bar.update(self._task, description=f"{self.name}: {row['stage']}", note=note)
        elif self.enabled and time.monotonic() - self._printed > 2.0:
            self._printed = time.monotonic()
            self.console.print(f"{row['stage']} {row['step']}: {note}", highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Prints a sentence above the bar."""
        if self.enabled:
            self.console.print(message, highlight=False, soft_wrap=True)
