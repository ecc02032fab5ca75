"""Learning-rate schedule and precision of a stage."""

from __future__ import annotations

import math

import torch

from .schema import Stage


def learning_rate(step: int, stage: Stage) -> float:
    """Share of `stage.lr` at optimiser step `step` (the first step is 0)."""
    warmup, total = stage.warmup_steps, stage.steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if stage.schedule == "constant":
        return 1.0
    start = max(warmup, total - round(stage.decay * total)) if stage.schedule == "wsd" else warmup
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    falling = 0.5 * (1 + math.cos(math.pi * done)) if stage.schedule == "cosine" else 1 - done
    return stage.min_lr + (1 - stage.min_lr) * falling


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a stage uses bfloat16 autocast; `auto`: if `device` supports it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(check() for check in checks if check is not None)
    return False
