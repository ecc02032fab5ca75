"""The two rates that bound every computation on a device: operations per second and bytes per second.

F operations that move B bytes take at least max(F / matrix rate, B / bandwidth), the roofline. Both rates are the best of
several sizes and repeats. A model that fits into the processor's cache can beat it, as it is that of main memory.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .costs import Work

if TYPE_CHECKING:
    import torch

MATRIX_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192, 12288)}
COPY_BYTES = {"cpu": (1 << 26, 1 << 28), "cuda": (1 << 28, 1 << 30)}


@dataclass(frozen=True)
class Roofline:
    """A device's rates.

    Attributes:
        flops: Floating-point operations per second in matrix products of `dtype`.
        bandwidth: Bytes per second between memory and chip, read and written together.
        source: `measured` or `given`.
    """

    flops: float
    bandwidth: float
    dtype: str
    source: str = "measured"

    def __post_init__(self) -> None:
        for key, value in (("TFLOP/s", self.flops / 1e12), ("GB/s", self.bandwidth / 1e9)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"A device's {key} must be a positive number, got {value:g}.")

    def seconds(self, work: Work) -> float:
        """Least time for some work."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


@functools.cache
def measure(device: str, dtype: str, seconds: float = 3.0) -> Roofline:
    """Measure a device once per process, in about `seconds`.

    Raises ValueError for a dtype that is not floating, or a device that does not exist.
    """
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {error}") from error
    return Roofline(_matrix_rate(where, kind, seconds / 2), _copy_rate(where, seconds / 2), dtype)


def _matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    import torch

    sizes = MATRIX_SIZES["cuda" if device.type == "cuda" else "cpu"]
    best = 0.0
    for size in sizes:
        if best and 6 * size**3 / best > seconds:
            break  # a slow device: three products of this size would take all the time there is
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        run = functools.partial(torch.matmul, a, b, out=out)
        best = max(best, 2 * size**3 / fastest(run, device, seconds / len(sizes)))
    return best


def _copy_rate(device: torch.device, seconds: float) -> float:
    import torch

    sizes = COPY_BYTES["cuda" if device.type == "cuda" else "cpu"]
    best = 0.0
    for size in sizes:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        run = functools.partial(target.copy_, source)
        best = max(best, 2 * size / fastest(run, device, seconds / len(sizes)))
    return best


def fastest(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of at least two calls, after one that warms up."""
    synchronise(device)
    run()
    synchronise(device)
    best, calls, end = math.inf, 0, time.perf_counter() + seconds
    while calls < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def synchronise(device: torch.device) -> None:
    """Wait for a device's pending work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
