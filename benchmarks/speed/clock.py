"""Stopwatch: where the time of one answer goes, and how much memory it takes.

Every mark waits for the device, so that asynchronous work counts where it was started.
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
    """Milliseconds of one batch of requests: `ttft` = `load` + `plan` + `prefill`; `decode` for each later token."""

    load: float
    plan: float
    prefill: float
    ttft: float
    decode: float


def answer_parts(reader: Reader, prompts: Callable[[], list[Any]], tokens: int) -> Parts:
    """Answer a batch once and time its parts.

    Args:
        prompts: Makes the prompts; what it loads or compresses counts as `load`.
        tokens: Tokens to decode, whatever they are; with 1, `decode` is 0.
    """
    device = reader.device
    first = _FirstToken(device)
    start = now(device)
    asked = prompts()
    loaded = now(device)
    plans = reader.plan(asked)
    planned = time.perf_counter()
    reader.generate(plans, tokens, min_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([first]))
    end = now(device)
    if first.seen is None:
        raise RuntimeError(f"{reader.name!r} generated no token, so there is no time to the first one.")
    later = (end - first.seen) / (tokens - 1) if tokens > 1 else 0.0
    marks = (loaded - start, planned - loaded, first.seen - planned, first.seen - start, later)
    return Parts(*(1000 * mark for mark in marks))


class _FirstToken(StoppingCriteria):
    """Note when the first token is there; stop nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: float | None = None
        self.never: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.never is None:
            self.seen = now(self.device)
            self.never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self.never


def timed(device: torch.device, run: Callable[[], Any]) -> float:
    """Milliseconds of a call, waiting for the device before and after it."""
    start = now(device)
    run()
    return 1000 * (now(device) - start)


def now(device: torch.device) -> float:
    """Seconds, after waiting for the device."""
    synchronise(device)
    return time.perf_counter()


def peak_memory(device: torch.device, run: Callable[[], Any]) -> int | None:
    """Peak memory in bytes while `run` runs, weights included: of the device on CUDA, of the process on the CPU (Linux).

    None where it cannot be measured.
    """
    if not reset_peak(device):
        return None
    run()
    return read_peak(device)


def reset_peak(device: torch.device) -> bool:
    """Reset the peak to what is in use now; False where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return device.type == "cpu"


def read_peak(device: torch.device) -> int | None:
    """The peak in bytes; see `peak_memory`."""
    synchronise(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else None
