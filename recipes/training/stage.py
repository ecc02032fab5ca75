"""Runs one stage of a recipe with `transformers.Trainer`.

The Trainer keeps its loop, optimiser, distribution over devices and resuming. `StageTrainer` replaces the learning-rate
schedule, the order of the data (item 0, 1, 2, ...), logging, and how checkpoints are written. For bit-exact resuming this
overrides private methods of Trainer; `PRIVATE` lists them, and a missing one is reported before training starts.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from .checkpoints import Progress, checkpoint_name
from .run import Run
from .schema import Stage

WEIGHTS = "model.safetensors"
# Private methods of Trainer that StageTrainer overrides, and the last, which it calls.
PRIVATE = (
    "_get_train_sampler",
    "_get_num_items_in_batch",
    "_maybe_log_save_evaluate",
    "_get_output_dir",
    "_save_checkpoint",
    "_save",
    "_load_from_checkpoint",
    "_get_learning_rate",
)


def check_trainer(trainer: type = Trainer) -> None:
    """Raises ``ImportError`` if the installed transformers lacks a method that `StageTrainer` relies on."""
    if missing := [name for name in PRIVATE if not hasattr(trainer, name)]:
        raise ImportError(
            f"transformers {transformers.__version__} has no Trainer.{missing[0]}, which nutgraf overrides to resume training "
            "exactly; install a version of transformers that nutgraf supports (see pyproject.toml)."
        )


def load_trained(module: nn.Module, folder: Path, device: str = "cpu") -> list[str]:
    """Copies a checkpoint's parameters into `module`; returns their names. ValueError if one does not fit."""
    saved = load_file(folder / WEIGHTS, device=device)
    parameters = dict(module.named_parameters())
    if foreign := sorted(set(saved) - set(parameters)):
        raise ValueError(
            f"The checkpoint {folder} holds {foreign[0]!r}, which this model does not have; nothing loaded."
        )
    with torch.no_grad():
        for name, value in saved.items():
            if parameters[name].shape != value.shape:
                want, got = tuple(parameters[name].shape), tuple(value.shape)
                raise ValueError(f"The checkpoint {folder} has {name!r} of shape {got}; this model's has shape {want}.")
            parameters[name].copy_(value)
    return sorted(saved)


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


class StageTrainer(Trainer):
    """`transformers.Trainer` for stage `index` of a run."""

    def __init__(self, run: Run, index: int, progress: Progress) -> None:
        check_trainer()
        self.run, self.index, self.stage = run, index, run.recipe.stages[index]
        self.progress = progress
        self.window: dict[str, list[Any]] = dict(progress.window)
        task, stage = run.task, self.stage
        arguments = TrainingArguments(
            output_dir=str(run.store.root),
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch_size,
            gradient_accumulation_steps=stage.accumulate,
            learning_rate=stage.lr,
            weight_decay=stage.weight_decay,
            adam_beta1=stage.betas[0],
            adam_beta2=stage.betas[1],
            max_grad_norm=stage.max_grad_norm,
            seed=(run.recipe.seed * 1009 + index) % 2**32,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            dataloader_num_workers=int(torch.cuda.is_available()),  # a GPU would wait for the items
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one process per device; use torchrun or accelerate for several
        super().__init__(
            model=task.module, args=arguments, train_dataset=task.dataset(stage), data_collator=task.collator(stage)
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.model_accepts_loss_kwargs = bool(getattr(task.module, "accepts_loss_kwargs", False))
        self.autocast = uses_bfloat16(stage.precision, self.args.device)
        self._frozen_seconds = progress.seconds
        self._started = self._window_start = time.monotonic()
        self._handled_step = progress.step
        self._grad_norm: float | None = None

    # ---- the data and the optimiser

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, self.train_dataset if train_dataset is None else train_dataset))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The stage's own schedule instead of a named one of the Trainer."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                cast(torch.optim.Optimizer, optimizer or self.optimizer), partial(learning_rate, stage=self.stage)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def autocast_context(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 autocast if the stage uses it."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16)

    def compute_loss_context_manager(self) -> Any:
        """Enters autocast here; accelerate would wrap the module's forward permanently."""
        return self.autocast_context()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Sums the collator's `num_items` over accumulation steps and processes: a number, or one per objective."""
        if not self.model_accepts_loss_kwargs or not batch_samples or "num_items" not in batch_samples[0]:
            return None
        counts = [batch.pop("num_items") for batch in batch_samples]
        if self.accelerator.num_processes > 1:
            counts = gather_object(counts)
        if not isinstance(counts[0], dict):
            return sum(counts)
        return {key: sum(count.get(key, 0) for count in counts) for key in sorted({k for c in counts for k in c})}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The module's `loss`; logs its other outputs."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        share = 1.0 if scaled else 1.0 / self.current_gradient_accumulation_steps
        self.window.setdefault("loss", []).append(loss.detach() * share)
        for key, value in outputs.items():
            if key != "loss":
                self.window.setdefault(key, []).append(value.detach() if isinstance(value, Tensor) else value)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Drops the Trainer's own summaries; see `_write_log`."""

    # ---- after each optimiser step

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step != self._handled_step:  # also called at the end of an epoch
            self._handled_step = self.state.global_step
            self._grad_norm = None if grad_norm is None else float(grad_norm)
            self._after_step()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _after_step(self) -> None:
        """Logs, evaluates, then decides whether to save and to stop."""
        stage, step = self.stage, self.state.global_step
        self.run.bar.move(self.run.steps_before(self.index) + step)
        self._check_finite("gradient's norm", self._grad_norm or 0.0)
        last = step >= stage.steps
        metrics: dict[str, float] = {}
        if step % stage.log_every == 0 or last:
            metrics |= self._write_log(step)
        if stage.eval_every and (step % stage.eval_every == 0 or last):
            metrics |= self._evaluate_task(step)
        done = last or self._past_threshold(metrics)
        reason = self._asked_to_stop()
        self.progress.stage, self.progress.step, self.progress.done = self.index, step, done
        if reason and not (done and self.index + 1 == len(self.run.recipe.stages)):
            self.run.stopped = reason
        if done or reason or step % stage.save_every == 0:
            self.control.should_save = True
        if done or reason:
            self.control.should_training_stop = True

    def _check_finite(self, what: str, value: float) -> None:
        """Raises ``FloatingPointError`` for NaN and infinity, before a checkpoint could hold weights made of them."""
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The {what} of stage {self.stage.name!r} is {value} at step {self.state.global_step}. The last checkpoint is "
                f"{self.run.store.latest() or 'none'}; lower the learning rate or max_grad_norm and train again."
            )

    def _asked_to_stop(self) -> str | None:
        reason = self.run.stop_reason()
        if self.accelerator.num_processes > 1:  # every process must leave the loop at the same step
            asked = torch.tensor([float(reason is not None)], device=self.args.device)
            if self.accelerator.reduce(asked, "sum").item() > 0:
                reason = reason or "another process was stopped"
        return reason

    def _past_threshold(self, metrics: dict[str, float]) -> bool:
        rule = self.stage.stop_when
        if rule is None or rule.metric not in metrics:
            return False
        self.progress.hits = self.progress.hits + 1 if rule.reached(metrics[rule.metric]) else 0
        return self.progress.hits >= rule.patience

    def _write_log(self, step: int) -> dict[str, float]:
        """Writes the averages since the last log line, and returns them."""
        now = time.monotonic()
        sums = {key: (sum(map(float, values)), len(values)) for key, values in self.window.items()}
        parts = gather_object([sums]) if self.accelerator.num_processes > 1 else [sums]
        metrics: dict[str, float] = {}
        tokens = 0
        for key in sorted({key for part in parts for key in part}, key=lambda key: (key != "loss", key)):
            total = sum(part.get(key, (0.0, 0))[0] for part in parts)
            count = sum(part.get(key, (0.0, 0))[1] for part in parts)
            if key == "tokens":
                tokens = int(total)
            elif key == "loss":
                metrics[key] = total / len(parts) / (step - self.progress.logged_step)
            else:
                metrics[key] = total / count
        self._check_finite("loss", metrics["loss"])
        self.progress.tokens += tokens
        row: dict[str, Any] = {"stage": self.stage.name, "stage_index": self.index, "step": step, **metrics}
        row |= {"lr": self._get_learning_rate(), "grad_norm": self._grad_norm}
        if tokens:
            row["tokens"] = self.progress.tokens
            row["tokens_per_s"] = round(tokens / max(1e-9, now - self._window_start), 1)
        row["seconds"] = round(self._frozen_seconds + now - self._started, 2)
        if self.is_world_process_zero():
            self.run.log.write(row)
        self.run.bar.show(row)
        self.window = {}
        self.progress.logged_step, self._window_start = step, now
        return metrics

    def _evaluate_task(self, step: int) -> dict[str, float]:
        """Runs the task's evaluation without changing the random state of training."""
        evaluate = getattr(self.run.task, "evaluate", None)
        if evaluate is None:
            raise ValueError(f"Stage {self.stage.name!r} sets eval_every, but its task evaluates nothing; remove it.")
        begin = time.monotonic()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), self.autocast_context():
            metrics = {f"eval/{key}": float(value) for key, value in evaluate(self.stage).items()}
        if self.is_world_process_zero():
            self.run.log.write({"stage": self.stage.name, "stage_index": self.index, "step": step, **metrics})
        self.run.bar.show({"stage": self.stage.name, "step": step, **metrics})
        self._window_start += time.monotonic() - begin
        return metrics

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        name = checkpoint_name(self.index, self.stage.name, self.state.global_step)
        return str(self.run.store.partial(name))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        begin = time.monotonic()
        name = checkpoint_name(self.index, self.stage.name, self.state.global_step)
        partial_folder = self.run.store.partial(name)
        if (flush := getattr(self.run.task, "flush", None)) is not None:
            flush()
        if self.is_world_process_zero():
            shutil.rmtree(partial_folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            content = partial_folder / f"checkpoint-{self.state.global_step}"
            self.progress.seconds = self._frozen_seconds + time.monotonic() - self._started
            self.progress.log_bytes = self.run.log.size()
            self.progress.window = {key: [float(v) for v in values] for key, values in self.window.items()}
            self.progress.recipe = self.run.recipe.identity()
            self.progress.write(content)
            self.run.store.publish(content, name)
            os.rmdir(partial_folder)
            self.run.store.prune(self.run.recipe.checkpoints.keep)
        self.accelerator.wait_for_everyone()
        self._window_start += time.monotonic() - begin

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the parameters that this or an earlier stage has trained."""
        folder = Path(output_dir or self.run.store.root)
        folder.mkdir(parents=True, exist_ok=True)
        parameters = dict(cast(nn.Module, self.model).named_parameters())
        values: Mapping[str, Tensor] = parameters if state_dict is None else state_dict
        now = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self.progress.trained = sorted(now | set(self.progress.trained))
        save_file(
            {name: values[name].detach().to("cpu").contiguous() for name in self.progress.trained}, folder / WEIGHTS
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.progress.trained = load_trained(cast(nn.Module, model or self.model), Path(resume_from_checkpoint))
