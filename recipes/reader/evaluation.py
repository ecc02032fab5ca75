"""Scores of a reader during training: greedy answers with and without passages, held-out perplexity, copying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..data.answer_scores import exact_match, f1
from ..data.corpus import Record
from ..data.templates import QUESTION, SEPARATOR


def prompt_of(record: Record, context: bool = True) -> str:
    """Plain prompt of a record, with all of its passages or none."""
    if not context:
        return QUESTION.format(question=record.question)
    return SEPARATOR.join([*record.passages, QUESTION.format(question=record.question)])


@torch.no_grad()
def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int = 16,
    batch_size: int = 25,
) -> tuple[list[str], float]:
    """Greedy answers in the order of the prompts, and the share that ended with EOS."""
    model.eval()
    generate: Any = model.generate
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, ended = [""] * len(prompts), 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True).to(model.device)
        out = generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]
        for i, ids in zip(chosen, out.tolist(), strict=True):
            ended += tokenizer.eos_token_id in ids
            answers[i] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return answers, ended / max(1, len(prompts))


def question_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, records: Sequence[Record], context: bool = True
) -> dict[str, float]:
    """`em`, `f1` (percent) and `ended` (share) over the records."""
    answers, ended = answer_prompts(model, tokenizer, [prompt_of(record, context) for record in records])
    pairs = [
        (exact_match(answer, record.answers), f1(answer, record.answers))
        for answer, record in zip(answers, records, strict=True)
    ]
    count = max(1, len(pairs))
    return {
        "em": 100 * sum(exact for exact, _ in pairs) / count,
        "f1": 100 * sum(f1 for _, f1 in pairs) / count,
        "ended": ended,
    }


@torch.no_grad()
def heldout_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], window: int = 512
) -> float:
    """Perplexity per token over the first `window` tokens of each document."""
    model.eval()
    total = count = 0.0
    for document in documents:
        ids = tokenizer(document, return_tensors="pt", truncation=True, max_length=window)["input_ids"].to(model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / max(1.0, count))


@torch.no_grad()
def copy_loss(model: PreTrainedModel, vocabulary: int, span: int = 24, rows: int = 32, seed: int = 0) -> float:
    """Nats per token on the second copy of a random segment, without its first token."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    segment = torch.randint(8, vocabulary, (rows, span), generator=generator)
    ids = torch.cat([segment, segment], 1).to(model.device)
    logits = model(input_ids=ids).logits[:, span:-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, span + 1 :].flatten()).item()
