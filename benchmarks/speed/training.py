"""What a training step costs beside a bare forward and backward pass over the same tokens.

A step is everything that the trainer does between two steps: drawing the items, tokenising, compressing, reading, the
objectives, the backward pass, clipping, the optimiser, the log. After each step the bare passes over its batch are timed:
the encoder, LoRA included, over as many positions as it had to read, the reader over its prompts' positions, and the head
with cross-entropy over the target tokens, forward and backward, without padding, masks or optimiser. The teacher's own
passes are timed apart and are no part of the step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from ...compressors import Reader
from ...compressors.objectives.distillation import KLDistillationLoss
from ...compressors.objectives.language_modeling import LanguageModelingLoss
from ...compressors.reader.plan import KV
from ...recipes.tasks.compressor import CompressorTask
from ...recipes.tasks.items import NOT_READ
from ...recipes.tasks.module import POSITIONS, CompressorBatch, CompressorModule
from ...recipes.training.progress import RunBar
from ...recipes.training.run import Run
from ...recipes.training.schema import Recipe, parse_recipe
from ...recipes.training.stage import StageTrainer
from ..costs.roofline import synchronise
from ..loading import SAMPLE_ARTICLES, SAMPLE_QUESTIONS
from ..rows import Row
from .bare import encoded_lengths, encoder_body, rectangles, run_body
from .clock import peak_memory, read_peak, reset_peak

TOP_K = 64  # of the teacher's tokens that are kept
HEAD_ROWS = 512  # whose logits the bare pass holds at a time
FAMILIES: dict[str, dict[str, Any]] = {
    "ae": {"objectives": {"ae": 1.0}, "mix": {"repeat": 1.0}},
    "lm": {"objectives": {"lm": 1.0}, "mix": {"continue": 1.0}},
    "kl": {"objectives": {"kl": 1.0}, "mix": {"human": 1.0}},
    "kl-cached": {"objectives": {"kl": 1.0}, "mix": {"human": 1.0}, "teacher_top_k": TOP_K},
}


@dataclass(frozen=True)
class Wanted:
    """One row of the training account.

    Attributes:
        method: of the compressor, made with random weights. `settings` are those of its config.
        family: of objectives: `ae`, `lm`, `kl` (the teacher reads along), `kl-cached` (its logits are on disk).
        steps: timed ones; `warmup` steps come before them. Items are drawn 16 batches at a time, so a multiple of 16 counts
            the drawing as often as it happens.
    """

    method: str
    family: str
    settings: tuple[tuple[str, Any], ...] = ()
    steps: int = 32
    warmup: int = 3
    batch_size: int = 8
    ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"Objectives are {', '.join(FAMILIES)}; got {self.family!r}.")
        if self.steps < 1 or self.warmup < 1 or self.batch_size < 1:
            raise ValueError(
                f"steps, warmup and batch_size must be at least 1; got {self.steps}, {self.warmup}, {self.batch_size}."
            )

    def recipe(self, cache: Path, seed: int) -> Recipe:
        """One stage over the articles and questions that ship with the package."""
        stage = {
            "name": self.family,
            "steps": self.warmup + self.steps,
            "batch_size": self.batch_size,
            "lr": 1e-4,
            "schedule": "constant",
            "ratios": [self.ratio],
            "save_every": 10**9,
            **FAMILIES[self.family],
        }
        if self.family == "kl-cached":
            stage["teacher_cache"] = str(cache)
        data = {"dir": str(SAMPLE_ARTICLES.parent), "texts": [SAMPLE_ARTICLES.name], "max_chars": 700}
        return parse_recipe(
            {
                "name": "training-account",
                "kind": "compressor",
                "seed": seed,
                "reader": "given",
                "data": {**data, "questions": [SAMPLE_QUESTIONS.name]},
                "compressor": {"method": self.method, **dict(self.settings)},
                "stages": [stage],
            }
        )


def measure_step(
    reader: Reader, wanted: Wanted, *, seed: int = 0, timer: Callable[[], float] = time.perf_counter
) -> Row:
    """The figures of one row: milliseconds of a step, of the teacher and of the bare passes, tokens a second, memory.

    Raises:
        ValueError: for a method that has no encoder to train, or that is made with settings it does not have.
    """
    with tempfile.TemporaryDirectory(prefix="nutgraf-training-") as folder:
        recipe = wanted.recipe(Path(folder) / "teacher", seed)
        task = CompressorTask(recipe, reader)
        if encoder_body(task.compressor) is None:
            raise ValueError(f"{wanted.method!r} has no encoder that trains; choose another method.")
        run = Run(recipe, task, Path(folder) / "run", None)
        run.bar = RunBar(1, recipe.name, enabled=False)
        progress = run.prepare(False)[1]
        task.begin_stage(recipe.stages[0])
        trainer = StageTrainer(run, 0, progress)
        if wanted.family == "kl-cached":
            with trainer.autocast_context():
                _fill(task, recipe)
        watch = _Stopwatch(trainer, task.module, wanted.warmup, timer)
        trainer.add_callback(watch)
        watch.start()
        trainer.train()
    return watch.row()


def _fill(task: CompressorTask, recipe: Recipe) -> None:
    """Put everything that the stage will ask the teacher into the cache."""
    stage = recipe.stages[0]
    data, collate = task.dataset(stage), task.collator(stage)
    with torch.no_grad():
        for step in range(stage.steps):
            batch = collate([data[step * stage.batch_size + i] for i in range(stage.batch_size)])["batch"]
            task.module._teacher(batch, [i for i, r in enumerate(batch.readings) if "kl" in r.objectives])
    task.flush()


class _Stopwatch(TrainerCallback):
    """Times each step, the teacher inside it, and after it the bare passes over the same batch."""

    def __init__(
        self, trainer: StageTrainer, module: CompressorModule, warmup: int, timer: Callable[[], float]
    ) -> None:
        self.trainer, self.module, self.warmup, self.timer = trainer, module, warmup, timer
        self.device = module.compressor.base_reader.device
        self.steps: list[float] = []
        self.teacher: list[float] = []
        self.bares: list[float] = []
        self.positions: list[int] = []
        self.tokens: list[int] = []
        self.peak: int | None = None
        self._asleep = 0.0
        self._batch: CompressorBatch | None = None
        module.register_forward_pre_hook(self._see, with_kwargs=True)
        module._teacher_hidden = self._timed(module._teacher_hidden)  # type: ignore[method-assign]
        if (loss := module.losses.get("kl")) is not None:
            loss.teacher_head = self._timed(loss.teacher_head)

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = kwargs.get("batch", args[0] if args else None)

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = self._now()
            out = run(*args)
            self._asleep += self._now() - begin
            return out

        return timed

    def _now(self) -> float:
        synchronise(self.device)
        return self.timer()

    def start(self) -> None:
        """The next step begins now."""
        self._asleep = 0.0
        reset_peak(self.device)
        self._begin = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Book the step, then time the bare passes over its batch."""
        took = self._now() - self._begin
        if self._batch is None:
            raise RuntimeError("The trainer ended a step without a batch.")
        peak = read_peak(self.device)
        sizes = _sizes(self.module, self._batch)
        begin = self._now()
        _bare(self.module, *sizes, self.trainer.autocast_context)
        spent = self._now() - begin
        if state.global_step > self.warmup:
            self.steps.append(took)
            self.teacher.append(self._asleep)
            self.bares.append(spent)
            self.positions.append(sum(sizes[0]) + sum(sizes[1]))
            self.tokens.append(sizes[2])
            self.peak = max(self.peak or 0, peak or 0) or None
        self.start()

    def row(self) -> Row:
        """Sums over all timed steps, so that what happens in some of them alone is counted."""
        n, teacher, bare = len(self.steps), sum(self.teacher), sum(self.bares)
        step = sum(self.steps) - teacher
        return {
            "step_ms": 1000 * step / n,
            "bare_ms": 1000 * bare / n,
            "step_cost": step / bare,
            "teacher_ms": 1000 * teacher / n if teacher else None,
            "positions": sum(self.positions) / n,
            "target_tokens": sum(self.tokens) / n,
            "tokens_per_s": sum(self.positions) / step,
            "bare_tokens_per_s": sum(self.positions) / bare,
            "peak_bytes": self.peak,
            "precision": "bfloat16 autocast" if self.trainer.autocast else None,
        }


@torch.no_grad()
def _sizes(module: CompressorModule, batch: CompressorBatch) -> tuple[list[int], list[int], int]:
    """Lengths that the encoder and the reader run, without padding, and the number of scored target tokens."""
    compressor = module.compressor
    encoded = encoded_lengths(compressor, batch.texts, batch.ratio) if batch.texts else []
    passages = compressor.encode(batch.texts, batch.queries, batch.ratio) if batch.texts else []
    read, targets = [], 0
    for i, reading in enumerate(batch.readings):
        if reading.kind in NOT_READ:
            continue
        (plan,) = compressor.reader.plan([reading.prompt([passages[j] for j in batch.contexts[i]])])
        read.append(sum(kind != KV for kind in plan.kinds) + len(batch.targets[i]) - 1)
        targets += len(batch.targets[i])
    return encoded, read, targets


def _bare(
    module: CompressorModule,
    encoded: Sequence[int],
    read: Sequence[int],
    targets: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Forward and backward over so many positions; the gradients that it makes are dropped."""
    compressor = module.compressor
    reader = compressor.reader
    like, width = reader.model.get_input_embeddings().weight, reader.width
    encoder, decoder = encoder_body(compressor), reader.model.get_decoder()
    with autocast():
        states = [run_body(encoder, x) for x in rectangles(encoded, width, POSITIONS, like)]
    left = targets
    for embeds in rectangles(read, width, POSITIONS, like):
        with autocast():
            hidden = run_body(decoder, embeds.requires_grad_()).flatten(0, 1)
            rows = hidden[: min(left, len(hidden))]
            gradient = _head_gradient(reader, rows)
        left -= len(rows)
        hidden.backward(F.pad(gradient, (0, 0, 0, len(hidden) - len(rows))))
    if states and states[0].requires_grad:
        torch.autograd.backward(states, [torch.full_like(x, 1e-3) for x in states])
    for parameter in module.parameters():
        parameter.grad = None


def _head_gradient(reader: Reader, rows: Tensor) -> Tensor:
    """The gradient of cross-entropy in hidden states, `HEAD_ROWS` at a time."""
    found = [torch.zeros_like(rows[:0])]
    for part in rows.detach().split(HEAD_ROWS):
        part.requires_grad_()
        ids = torch.zeros(len(part), dtype=torch.long, device=part.device)
        found += torch.autograd.grad(F.cross_entropy(reader.head(part).float(), ids), part)
    return torch.cat(found)


def loss_memory(
    family: str, tokens: int, *, vocabulary: int = 128256, width: int = 64, chunk: int = 512, device: str = "cpu"
) -> Row:
    """The extra memory of an objective over so many target tokens, forward and backward, at a large vocabulary.

    Hidden states and their gradients are there before; `bound_bytes` is what the objective's documentation promises.

    Raises:
        ValueError: for a family that is not `lm` or `kl`.
    """
    if family not in ("lm", "kl"):
        raise ValueError(
            f"The losses with memory of their own are lm (and ae, which is the same) and kl; got {family!r}."
        )
    where = torch.device(device)
    weight = torch.randn(vocabulary, width, device=where)

    def head(hidden: Tensor) -> Tensor:
        return hidden @ weight.T

    hidden = torch.randn(tokens, width, device=where, requires_grad=True)
    hidden.grad = torch.zeros_like(hidden)
    loss: Any = LanguageModelingLoss(head, chunk) if family == "lm" else KLDistillationLoss(head, chunk=chunk)
    other = torch.randn(tokens, width, device=where)
    ids = torch.zeros(tokens, dtype=torch.long, device=where)
    before = peak_memory(where, lambda: None)
    most = peak_memory(where, lambda: loss(hidden, ids if family == "lm" else other).backward())
    return {
        "objective": family,
        "target_tokens": tokens,
        "vocabulary": vocabulary,
        "width": width,
        "chunk": chunk,
        "extra_bytes": None if before is None or most is None else most - before,
        "bound_bytes": (12 if family == "lm" else 24) * min(tokens, chunk) * vocabulary,
        "whole_bytes": (12 if family == "lm" else 24) * tokens * vocabulary,
    }
