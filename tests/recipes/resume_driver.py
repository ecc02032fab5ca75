"""Trains the same tiny compressor again and again in forked children, each killed at a chosen moment; see test_resume.py.

Usage: python resume_driver.py FOLDER, which holds data. Standard input gives, as JSON, for each folder of a run a list of
moments `[what, count]`: a child dies by SIGKILL at the count-th call of `what`, a key of `POINTS`; a last child runs to the
end. Imports are done once, before the children are forked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch
from nutgraf.recipes.tasks.compressor import CompressorTask
from nutgraf.recipes.tasks.module import CompressorModule
from nutgraf.recipes.training import checkpoints, progress
from nutgraf.recipes.training import stage as stage_trainer
from nutgraf.recipes.training.schema import parse_recipe
from nutgraf.recipes.training.trainer import run_recipe

STAGE = {"steps": 7, "batch_size": 2, "lr": 1e-2, "warmup": 1, "precision": "fp32", "log_every": 3, "save_every": 2}
MIX = {"objectives": {"ae": 0.5, "lm": 1.0, "kl": 1.0}, "mix": {"made": 0.5, "repeat": 0.5}, "ratios": [2, 4]}
STAGES = [
    {"name": "memory", "trainable": ["memory", "log_scale"], "accumulate": 2, **STAGE, **MIX},
    {"name": "lora", "trainable": ["lora"], "schedule": "linear", **STAGE, **MIX},
]


def half_written(path) -> None:
    """A weights file that the process died in the middle of."""
    Path(path).write_bytes(b"\x00" * 100)


# Where a child can die: (owner, attribute, what to do first with the call's arguments).
POINTS = {
    "forward": (CompressorModule, "forward", None),
    "weights": (stage_trainer, "save_file", lambda tensors, path: half_written(path)),
    "optimiser": (torch, "save", lambda value, path, *rest: half_written(path)),
    "sync": (checkpoints.os, "fsync", None),
    "rename": (checkpoints.os, "replace", None),
    "delete": (checkpoints.shutil, "rmtree", None),
    "log": (progress.RunLog, "write", lambda log, row: log.path.open("a").write('{"stage": "mem')),
}


def die_at(what: str, count: int) -> None:
    """Have this process killed at the count-th call of a point."""
    owner, name, before = POINTS[what]
    original, calls = getattr(owner, name), [0]

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            if before is not None:
                before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def run(folder: Path, out: Path) -> None:
    """Train, going on from what `out` holds."""
    spec = importlib.util.spec_from_file_location("zoo", Path(__file__).parents[1] / "zoo.py")
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    compressor = {"method": "icae", "mem_size": 8, "r": 2, "dropout": 0.2}
    data = {"dir": str(folder), "texts": ["text.txt"], "max_chars": 160, "questions_per_passage": 1}
    raw = {"name": "t", "kind": "compressor", "reader": "zoo", "compressor": compressor, "data": data, "stages": STAGES}
    recipe = parse_recipe(raw)
    run_recipe(recipe, CompressorTask(recipe, zoo.reader()), out)


def main() -> None:
    folder = Path(sys.argv[1])
    for name, moments in json.load(sys.stdin).items():
        out = folder / name
        for moment in [*moments, None]:
            if (child := os.fork()) == 0:
                if moment is not None:
                    die_at(*moment)
                run(folder, out)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            files = sorted(path.name for path in out.rglob("*"))
            print(json.dumps([name, moment, os.waitstatus_to_exitcode(status), files]), flush=True)


if __name__ == "__main__":
    main()
