"""The stopwatch: where the time of one answer goes, and how much memory it takes.

The device is waited for at every mark, so that asynchronous work is booked where it was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ...compressors import Reader
from ..costs.roofline import synchronise


@dataclass(frozen=True)
class Parts:
    """Milliseconds of one batch of requests: `ttft` = `load` + `plan` + `prefill`, and `decode` for each later token."""

    load: float
    plan: float
    prefill: float
    ttft: float
    decode: float


def answer_parts(reader: Reader, prompts: Callable[[], list[Any]], tokens: int) -> Parts:
    """Answer a batch once and say where the time went.

    Args:
        prompts: makes the prompts, loading or compressing what stands in them; its time is `load`.
        tokens: how many tokens are decoded, whatever they are; with 1 there is no `decode` (0).
    """
    device = reader.device
    first = _FirstToken(device)
    synchronise(device)
    start = time.perf_counter()
    asked = prompts()
    synchronise(device)
    loaded = time.perf_counter()
    plans = reader.plan(asked)
    planned = time.perf_counter()
    reader.generate(plans, tokens, min_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([first]))
    synchronise(device)
    end = time.perf_counter()
    if first.seen is None:
        raise RuntimeError(f"{reader.name!r} generated no token, so there is no time to the first one.")
    later = (end - first.seen) / (tokens - 1) if tokens > 1 else 0.0
    marks = (loaded - start, planned - loaded, first.seen - planned, first.seen - start, later)
    return Parts(*(1000 * mark for mark in marks))


class _FirstToken(StoppingCriteria):
    """Notes when the first token is there; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: float | None = None
        self.never: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.never is None:
            synchronise(self.device)
            self.seen = time.perf_counter()
            self.never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self.never


def peak_memory(device: torch.device, run: Callable[[], Any]) -> int | None:
    """Most memory in use while something runs: of the device on CUDA, of the whole process on the CPU under Linux.

    Weights and whatever else is in memory are part of it. None where it cannot be told.
    """
    if not reset_peak(device):
        return None
    run()
    return read_peak(device)


def reset_peak(device: torch.device) -> bool:
    """Set the high-water mark of memory back to what is in use now; False where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return device.type == "cpu"


def read_peak(device: torch.device) -> int | None:
    """The high-water mark in bytes; see `peak_memory`."""
    synchronise(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else None


class Clock:
    """Milliseconds of a call, waiting for the device before and after, and what the call returned."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], Any]) -> tuple[float, Any]:
        synchronise(self.device)
        start = time.perf_counter()
        result = run()
        synchronise(self.device)
        return (time.perf_counter() - start) * 1000, result
