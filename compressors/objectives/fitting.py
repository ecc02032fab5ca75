"""Fits free slots to single passages by gradient descent, with the reader on the text as teacher."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.passage import CompressedPassage
from ..fidelity.questions import ASKED, REPEAT, make_questions
from ..reader.plan import Prompt
from ..reader.reader import Reader
from .distillation import KLDistillationLoss
from .teacher import TeacherLogits

REPEATED = 512  # tokens of a passage that the reader repeats
TOP_K = 64  # tokens of the teacher whose probabilities are kept; the others are one outcome
EVERY = 10  # steps between two checks on the held-out probes

Probe = tuple[str, list[int]]  # what the reader reads after the passage, and the tokens that follow


@dataclass
class Fit:
    """A passage that is being fitted.

    Attributes:
        slots: ``[slots, width]``, in training.
        probes, held_out: what is trained on, and what decides when to stop.
        best, lowest: the slots with the lowest divergence on ``held_out`` so far, and that divergence.
        teacher: predictions from the text, on the probes and on those held out.
        waited: checks since then.
    """

    slots: nn.Parameter
    probes: list[Probe]
    held_out: list[Probe]
    best: Tensor
    lowest: float = float("inf")
    teacher: list[TeacherLogits] = field(default_factory=list)
    waited: int = 0


def write_probes(reader: Reader, text: str, ids: list[int], count: int) -> tuple[list[Probe], list[Probe]]:
    """Probes of a passage, and those held out: every fourth question, or all probes if there are fewer than four.

    Args:
        reader: whose tokens.
        text: the passage.
        ids: its tokens, which the first probe repeats (the first `REPEATED`).
        count: rule-made questions at most.
    """
    made = make_questions(text, count, random.Random(0))
    answers = reader.tokenize_batch([f" {answer}" for _, answer in made])
    asked = [(ASKED.format(question=question), answer) for (question, _), answer in zip(made, answers)]
    rest = [probe for i, probe in enumerate(asked) if len(asked) < 4 or i % 4]
    probes = [(REPEAT, ids[:REPEATED]), *rest]
    return probes, asked[::4] if len(asked) >= 4 else probes


class SlotFitter:
    r"""Fits slots z to each passage x: minimises the divergence over the target tokens a of probes q,

    .. math:: \sum_t D_{KL}(p(\cdot \mid x, q, a_{<t}) \,\|\, p(\cdot \mid z, q, a_{<t})).

    The reader stays frozen. Passages are read together, but each has a loss, an early stop and steps of its own, so that the
    result does not depend on the others.

    Memory: as `KLDistillationLoss` over `TOP_K` tokens, and the reader's activations for all probes of all passages.

    Args:
        reader: the reader.
        steps: the most steps.
        lr: learning rate of Adafactor, relative to the root mean square of a slot.
        patience: checks without a gain, one every `EVERY` steps, after which a passage is done.
        probes: rule-made questions per passage.
    """

    def __init__(self, reader: Reader, steps: int, lr: float, patience: int, probes: int) -> None:
        self.reader, self.steps, self.lr, self.patience, self.probes = reader, steps, lr, patience, probes
        self.loss = KLDistillationLoss(reader.head)

    @torch.no_grad()
    def begin(self, text: str, ids: list[int], start: Tensor) -> Fit:
        """A passage with its probes and what the reader predicts from its text; ``start`` is ``[slots, width]``."""
        reader, top_k = self.reader, min(TOP_K, self.reader.vocab_size - 1)
        probes, held_out = write_probes(reader, text, ids, self.probes)
        fit = Fit(nn.Parameter(start.float().clone()), probes, held_out, start.float().clone())
        for which in (probes, held_out):
            found = reader.target_hidden([[text, probe] for probe, _ in which], [target for _, target in which])
            fit.teacher.append(TeacherLogits.of(found.hidden, reader.head, top_k))
        return fit

    def fit(self, fits: Sequence[Fit]) -> list[Tensor]:
        """The best slots ``[slots, width]`` of each passage."""
        running = list(fits)
        with torch.enable_grad():
            optimizer = torch.optim.Adafactor([fit.slots for fit in fits], lr=self.lr)
            for step in range(self.steps + 1):
                if step % EVERY == 0 or step == self.steps:
                    running = self._check(running)
                if step == self.steps or not running:
                    break
                optimizer.zero_grad()
                torch.stack(self.divergences(running, held_out=False)).sum().backward()
                optimizer.step()
        return [fit.best for fit in fits]

    def divergences(self, fits: Sequence[Fit], held_out: bool) -> list[Tensor]:
        """Each passage's mean divergence over its probes' tokens, differentiable in its slots."""
        reader = self.reader
        prompts: list[Prompt] = []
        targets: list[list[int]] = []
        counts = []
        for fit in fits:
            slots = fit.slots.to(reader.dtype)
            passage = CompressedPassage("embeds", len(slots), "fitting", reader.fingerprint, embeds=slots)
            which = fit.held_out if held_out else fit.probes
            prompts += [[passage, probe] for probe, _ in which]
            targets += [target for _, target in which]
            counts.append(sum(len(target) for _, target in which))
        found = reader.target_hidden(prompts, targets).hidden.split(counts)
        return [self.loss(hidden, fit.teacher[held_out]) for hidden, fit in zip(found, fits)]

    @torch.no_grad()
    def _check(self, running: list[Fit]) -> list[Fit]:
        """Remembers the best slots; returns the passages that still improve."""
        for fit, value in zip(running, map(float, self.divergences(running, held_out=True))):
            better = value < fit.lowest
            fit.waited = 0 if better else fit.waited + 1
            if better:
                fit.lowest, fit.best = value, fit.slots.detach().clone()
        return [fit for fit in running if fit.waited < self.patience]
