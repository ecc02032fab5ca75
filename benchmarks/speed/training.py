"""Cost of a training step next to a bare forward and backward pass over the same tokens.

A step is everything the trainer does between two steps: items, tokenising, compressing, reading, objectives, backward pass,
clipping, optimiser, log. After each step the bare passes over its batch are timed: the encoder with LoRA, the reader and the
head with cross-entropy over as many positions, without padding, masks or optimiser. The teacher counts apart. Positions are
those of every prompt read whole, although a step reads what the questions about one passage have in common once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
from ...recipes.training.schema import Recipe, load_recipe, parse_recipe, recipe_names
from ...recipes.training.stage import StageTrainer
from ..loading import SAMPLE_ARTICLES, SAMPLE_QUESTIONS
from ..rows import Row
from .clock import now, peak_memory, read_peak, reset_peak, timed
from .compressing import encoded_lengths, rectangles, run_body

TOP_K = 64  # teacher's tokens that are kept
HEAD_ROWS = 512  # rows of logits that the bare pass holds at a time
FAMILIES: dict[str, dict[str, Any]] = {
    "ae": {"objectives": {"ae": 1.0}, "mix": {"repeat": 1.0}},
    "lm": {"objectives": {"lm": 1.0}, "mix": {"continue": 1.0}},
    "answers": {"objectives": {"lm": 1.0}, "mix": {"made": 1.0}},
    "kl": {"objectives": {"kl": 1.0}, "mix": {"human": 1.0}},
    "kl-cached": {"objectives": {"kl": 1.0}, "mix": {"human": 1.0}, "teacher_top_k": TOP_K},
}


@dataclass(frozen=True)
class Wanted:
    """One row: a method with random weights and `settings` of its config, trained by one family of objectives.

    Attributes:
        family: `ae`, `lm` (continuations), `answers` (to questions made by rule), `kl` (human questions, live teacher) or
            `kl-cached` (the teacher's logits are on disk).
        questions: questions per passage, for the last three.
        steps: Timed steps, after `warmup` steps. Items are drawn 16 batches at a time, so use a multiple of 16.
    """

    method: str
    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 32
    warmup: int = 3
    batch_size: int = 8
    ratio: float = 4.0
    questions: int = 3

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"Objectives are {', '.join(FAMILIES)}; got {self.family!r}.")
        counts = {
            "steps": self.steps,
            "warmup": self.warmup,
            "batch_size": self.batch_size,
            "questions": self.questions,
        }
        if bad := {name: n for name, n in counts.items() if n < 1}:
            raise ValueError(f"{', '.join(counts)} must be at least 1; got {bad}.")

    def recipe(self, cache: Path, seed: int) -> Recipe:
        """One stage over the articles and questions that ship with the package."""
        stage = {"name": self.family, "steps": self.warmup + self.steps, "batch_size": self.batch_size, "lr": 1e-4}
        stage |= {"schedule": "constant", "ratios": [self.ratio], "save_every": 10**9, **FAMILIES[self.family]}
        stage |= {"teacher_cache": str(cache)} if self.family == "kl-cached" else {}
        texts = {"dir": str(SAMPLE_ARTICLES.parent), "texts": [SAMPLE_ARTICLES.name], "max_chars": 700}
        return parse_recipe(
            {
                "name": "training-account",
                "kind": "compressor",
                "seed": seed,
                "reader": "given",
                "data": {**texts, "questions": [SAMPLE_QUESTIONS.name], "questions_per_passage": self.questions},
                "compressor": {"method": self.method, **self.settings},
                "stages": [stage],
            }
        )


def recipe_settings(method: str) -> dict[str, Any]:
    """Settings of a method in its first shipped recipe; empty without one."""
    for name in recipe_names():
        found = load_recipe(name)
        if found.kind == "compressor" and (found.compressor or {}).get("method") == method:
            return {key: value for key, value in (found.compressor or {}).items() if key != "method"}
    return {}


def measure_step(reader: Reader, wanted: Wanted, *, seed: int = 0) -> Row:
    """Milliseconds of a step, of the teacher and of the bare passes, tokens per second, memory.

    Raises ValueError for a method without an encoder that trains, or with settings that it does not have.
    """
    with tempfile.TemporaryDirectory(prefix="nutgraf-training-") as folder:
        recipe = wanted.recipe(Path(folder) / "teacher", seed)
        task = CompressorTask(recipe, reader)
        body = task.compressor.encoder_body()
        if body is None or not any(parameter.requires_grad for parameter in body.parameters()):
            raise ValueError(f"{wanted.method!r} has no encoder that trains; choose another method.")
        run = Run(recipe, task, Path(folder) / "run", None)
        run.bar = RunBar(1, recipe.name, enabled=False)
        progress = run.prepare(False)[1]
        task.begin_stage(recipe.stages[0])
        trainer = StageTrainer(run, 0, progress)
        if wanted.family == "kl-cached":
            with trainer.autocast_context():
                _fill(task, recipe)
        watch = _Stopwatch(trainer, task.module, wanted.warmup)
        trainer.add_callback(watch)
        watch.start()
        with task.running(trainer.autocast):
            trainer.train()
    return watch.row()


def _fill(task: CompressorTask, recipe: Recipe) -> None:
    """Fill the cache with all that the stage will ask the teacher."""
    stage = recipe.stages[0]
    data, collate = task.dataset(stage), task.collator(stage)
    with torch.no_grad():
        for step in range(stage.steps):
            batch = collate([data[step * stage.batch_size + i] for i in range(stage.batch_size)])["batch"]
            task.module.teacher(batch, [i for i, r in enumerate(batch.readings) if "kl" in r.objectives])
    task.flush()


class _Stopwatch(TrainerCallback):
    """Time each step, the teacher within it, and then the bare passes over the same batch."""

    def __init__(self, trainer: StageTrainer, module: CompressorModule, warmup: int) -> None:
        self.trainer, self.module, self.warmup = trainer, module, warmup
        self.device = module.compressor.base_reader.device
        # step, teacher, bare, processor time in ms; positions, target tokens, peak bytes, prompts
        self.taken: list[tuple[float, ...]] = []
        self.teacher = 0.0
        self.batch: CompressorBatch | None = None
        module.register_forward_pre_hook(self._see, with_kwargs=True)
        module.teacher_hidden = self._timed(module.teacher_hidden)  # type: ignore[method-assign]
        if (loss := module.losses.get("kl")) is not None:
            loss.teacher_head = self._timed(loss.teacher_head)

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batch = kwargs.get("batch", args[0] if args else None)

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed_run(*args: Any) -> Any:
            begin = now(self.device)
            out = run(*args)
            self.teacher += 1000 * (now(self.device) - begin)
            return out

        return timed_run

    def start(self) -> None:
        """Begin the next step."""
        self.teacher = 0.0
        reset_peak(self.device)
        self.begin, self.cpu = now(self.device), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step, then time the bare passes over its batch."""
        took, peak = 1000 * (now(self.device) - self.begin), read_peak(self.device)
        cpu = 1000 * (time.process_time() - self.cpu)
        if self.batch is None:
            raise RuntimeError("The trainer ended a step without a batch.")
        encoded, read, targets = batch_positions(self.module, self.batch)
        bare = timed(self.device, lambda: bare_step(self.module, encoded, read, targets, self.trainer.autocast_context))
        if state.global_step > self.warmup:
            self.taken.append((took, self.teacher, bare, cpu, sum(encoded) + sum(read), targets, peak or 0, len(read)))
        self.start()

    def row(self) -> Row:
        """Figures from sums over all timed steps, so that work done only in some of them counts."""
        whole, teacher, bare, cpu, positions, targets, _, prompts = map(sum, zip(*self.taken))
        step, n = whole - teacher, len(self.taken)
        return {
            "step_ms": step / n,
            "bare_ms": bare / n,
            "step_cost": step / bare,
            "teacher_ms": teacher / n if teacher else None,
            # with the teacher; other programs on a shared machine lengthen it less than `step_ms`
            "cpu_ms": cpu / n if self.device.type == "cpu" else None,
            "prompts": prompts / n,
            "positions": positions / n,
            "target_tokens": targets / n,
            "tokens_per_s": 1000 * positions / step,
            "prompts_per_s": 1000 * prompts / step,
            "bare_tokens_per_s": 1000 * positions / bare,
            "peak_bytes": max(peak for *_, peak, _ in self.taken) or None,
            "precision": "bfloat16 autocast" if self.trainer.autocast else None,
        }


@torch.no_grad()
def batch_positions(module: CompressorModule, batch: CompressorBatch) -> tuple[list[int], list[int], int]:
    """Lengths that encoder and reader run, without padding, and the number of target tokens."""
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


def bare_step(
    module: CompressorModule,
    encoded: Sequence[int],
    read: Sequence[int],
    targets: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run forward and backward over as many positions; drop the gradients."""
    compressor, reader = module.compressor, module.compressor.reader
    like, width, left = reader.model.get_input_embeddings().weight, reader.width, targets
    with autocast():
        states = [run_body(compressor.encoder_body(), x) for x in rectangles(encoded, width, POSITIONS, like)]
    for embeds in rectangles(read, width, POSITIONS, like):
        with autocast():
            hidden = run_body(reader.model.get_decoder(), embeds.requires_grad_()).flatten(0, 1)
            gradients = [torch.zeros_like(hidden)]
            for part in hidden.detach()[:left].split(HEAD_ROWS):
                loss = F.cross_entropy(reader.head(part.requires_grad_()).float(), torch.zeros_like(part[:, 0]).long())
                gradients += torch.autograd.grad(loss, part)
        rows = sum(map(len, gradients[1:]))
        left -= rows
        hidden.backward(torch.cat([*gradients[1:], gradients[0][rows:]]))
    if states and states[0].requires_grad:
        torch.autograd.backward(states, [torch.full_like(x, 1e-3) for x in states])
    for parameter in module.parameters():
        parameter.grad = None


def loss_memory(
    family: str, tokens: int, *, vocabulary: int = 128256, width: int = 64, chunk: int = 512, device: str = "cpu"
) -> Row:
    """Extra memory of an objective over `tokens` target tokens, forward and backward, at a large vocabulary.

    Hidden states and their gradients exist before; `bound_bytes` is the objective's documented bound. Raises ValueError for
    another family than `lm` and `kl`.
    """
    if family not in ("lm", "kl"):
        raise ValueError(
            f"The losses with memory of their own are lm (and ae, which is the same) and kl; got {family!r}."
        )
    where = torch.device(device)
    weight, other = torch.randn(vocabulary, width, device=where), torch.randn(tokens, width, device=where)
    hidden = torch.randn(tokens, width, device=where, requires_grad=True)
    hidden.grad = torch.zeros_like(hidden)

    def head(states: Tensor) -> Tensor:
        return states @ weight.T

    loss: Any = LanguageModelingLoss(head, chunk) if family == "lm" else KLDistillationLoss(head, chunk=chunk)
    target = torch.zeros(tokens, dtype=torch.long, device=where) if family == "lm" else other
    before = peak_memory(where, lambda: None)
    most = peak_memory(where, lambda: loss(hidden, target).backward())
    bytes_per_logit = 12 if family == "lm" else 24
    return {
        "objective": family,
        "target_tokens": tokens,
        "vocabulary": vocabulary,
        "width": width,
        "chunk": chunk,
        "extra_bytes": None if before is None or most is None else most - before,
        "bound_bytes": bytes_per_logit * min(tokens, chunk) * vocabulary,
        "whole_bytes": bytes_per_logit * tokens * vocabulary,
    }
