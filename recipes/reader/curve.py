"""The learning curve of a reader run as result rows: `python -m nutgraf.recipes.reader.curve RUN RESULTS.jsonl`.

Each evaluation in a run's `log.jsonl` becomes one row with suite `reader`: tokens seen, held-out perplexity, copying
loss and, for each dev set, exact match and F1 with the passage and without any context.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..training.schema import load_recipe


def curve_rows(run: Path, device: str, dtype: str) -> list[dict[str, Any]]:
    """The rows of the run folder `run`, in order. ValueError when the run has no evaluation."""
    recipe = load_recipe(run / "recipe.yaml")
    written = datetime.datetime.fromtimestamp((run / "log.jsonl").stat().st_mtime, datetime.UTC)
    rows, tokens, seconds = [], 0, 0.0
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        tokens, seconds = entry.get("tokens", tokens), entry.get("seconds", seconds)
        scores = {key[5:]: round(value, 4) for key, value in entry.items() if key.startswith("eval/")}
        if scores:
            rows.append(
                {
                    "suite": "reader",
                    "command": f"nutgraf train {recipe.name}",
                    "device": device,
                    "dtype": dtype,
                    "seed": recipe.seed,
                    "date": written.date().isoformat(),
                    "stage": entry["stage"],
                    "step": entry["step"],
                    "tokens_seen": tokens,
                    "seconds": seconds,
                    "n": recipe.data.get("dev_limit"),
                    **scores,
                }
            )
    if not rows:
        raise ValueError(f"{run / 'log.jsonl'} holds no evaluation: set eval_every in the recipe's stages.")
    return rows


def parameter_count(path: Path) -> int:
    """Parameters stored in a safetensors file: of a whole model, or of an adapter."""
    with safe_open(str(path), framework="pt") as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118


def main(argv: list[str]) -> None:
    """Append the rows of a run to a results file."""
    if len(argv) != 2:
        raise SystemExit("usage: python -m nutgraf.recipes.reader.curve RUN RESULTS.jsonl")
    run, results = Path(argv[0]), Path(argv[1])
    device = f"{platform.machine()} CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    rows = curve_rows(run, device, "bfloat16 autocast")
    weights = [run / "final" / name for name in ("model.safetensors", SAFETENSORS_WEIGHTS_NAME)]
    params = next((parameter_count(file) for file in weights if file.is_file()), None)
    with results.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, "params": params} if params else row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
