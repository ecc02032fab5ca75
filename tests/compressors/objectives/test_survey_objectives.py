"""Objectives of the survey's methods, against their equations in plain torch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nutgraf import CompressedPassage
from nutgraf.compressors.objectives.contrast import ContrastLoss
from nutgraf.compressors.objectives.distillation import KLDistillationLoss
from nutgraf.compressors.objectives.importance import ImportantKLLoss, ImportantLMLoss, importance_weights
from nutgraf.compressors.objectives.ranking import RankingLoss
from nutgraf.compressors.objectives.registry import Scored
from nutgraf.compressors.objectives.slot_autoencoding import SlotAutoencodingLoss, sinusoids
from nutgraf.compressors.objectives.states import StateMatchingLoss
from nutgraf.compressors.objectives.teacher import TeacherLogits
from nutgraf.compressors.reader.ranking import ASK, TASK, check_rankable, rank_passages, ranking_logits, ranking_prompt

ROWS, WIDTH, VOCABULARY = 12, 6, 17


@pytest.fixture
def rows():
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    hidden, teacher, blind = (torch.randn(ROWS, WIDTH, dtype=torch.float64) for _ in range(3))
    return (
        (lambda states: states @ weight.T),
        hidden.requires_grad_(),
        teacher,
        blind,
        torch.randint(VOCABULARY, (ROWS,)),
    )


def passage(rows: torch.Tensor, reader=None) -> CompressedPassage:
    fingerprint = "reader" if reader is None else reader.fingerprint
    return CompressedPassage("embeds", len(rows), "test", fingerprint, embeds=rows)


@pytest.mark.parametrize("top_k", [None, 4])
def test_divergence_both_ways(rows, top_k):
    head, hidden, teacher, _, _ = rows
    p, q = head(teacher).softmax(-1), head(hidden).softmax(-1)
    if top_k:
        kept = p.topk(top_k).indices
        p, q = (torch.cat([x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)], -1) for x in (p, q))
    want = (0.6 * p * (p / q).log() + 0.4 * q * (q / p).log()).sum(-1).mean()
    found = KLDistillationLoss(head, top_k=top_k, chunk=5, reverse=0.4)(hidden, teacher)
    assert torch.allclose(found, want, atol=1e-10)
    assert torch.allclose(*(torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (found, want)), atol=1e-10)
    with pytest.raises(ValueError, match="reverse"):
        KLDistillationLoss(head, reverse=1.5)


def test_importance_is_a_softmax_of_clipped_gains_in_each_item(rows):
    head, hidden, teacher, blind, ids = rows
    lengths = [5, 1, 6]
    weights, start = [], 0
    for n in lengths:
        part = slice(start, start + n)
        full, alone = (head(x[part]).log_softmax(-1)[range(n), ids[part]] for x in (teacher, blind))
        gains = [min(float(g), 2.0) for g in full - alone]
        total = sum(torch.tensor(gains, dtype=torch.float64).exp())
        weights += [n * torch.tensor(g, dtype=torch.float64).exp() / total for g in gains]
        start += n
    want = torch.stack(weights)
    scored = Scored([[0] * n for n in lengths], hidden, ids, teacher, blind)
    losses = {}
    for name, cls in {"lm": ImportantLMLoss, "kl": ImportantKLLoss}.items():
        losses[name] = cls(head, chunk=5)
        losses[name].teacher_head = head
    assert torch.allclose(losses["lm"].importance(scored), want, atol=1e-6)
    nll = F.cross_entropy(head(hidden), ids, reduction="none")
    assert torch.allclose(losses["lm"].total(scored), (nll * want).sum(), atol=1e-6)
    p, q = head(teacher).log_softmax(-1), head(hidden).log_softmax(-1)
    assert torch.allclose(losses["kl"].total(scored), ((p.exp() * (p - q)).sum(-1) * want).sum(), atol=1e-6)
    even = importance_weights(torch.zeros(4), torch.zeros(4), [3, 1])
    assert torch.allclose(even, torch.ones(4))
    cached = TeacherLogits.of(teacher, head, 3)
    with pytest.raises(ValueError, match="teacher_cache"):
        losses["lm"].total(replace(scored, teacher=cached))


def test_states_are_matched_relative_to_their_deviation(rows):
    _, hidden, teacher, _, ids = rows
    want = torch.zeros((), dtype=torch.float64)
    for row, wanted in zip(hidden, teacher):
        gap = ((row - wanted) / teacher.std()).abs()
        want = want + torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
    found = StateMatchingLoss().total(Scored([[0] * ROWS], hidden, ids, teacher))
    assert torch.allclose(found, want, atol=1e-6)
    with pytest.raises(ValueError, match="teacher_cache"):
        StateMatchingLoss().total(Scored([[0] * ROWS], hidden, ids))


def test_contrast_prefers_the_questions_passage():
    torch.manual_seed(0)
    slots = [torch.randn(n, WIDTH, requires_grad=True) for n in (2, 4, 3, 1, 5, 2)]
    scored = Scored([[1, 2], [3, 4, 5]], passages=[passage(s) for s in slots], sizes=[3, 3])
    want = torch.zeros(())
    for q, p, n in (slots[:3], slots[3:]):
        near, far = (torch.cosine_similarity(q.mean(0), other.mean(0), dim=0).exp() for other in (p, n))
        want = want - torch.log(near / (near + far))
    found = ContrastLoss().total(scored)
    assert torch.allclose(found, want / 2 * 5, atol=1e-6)
    found.backward()
    assert all(s.grad.abs().max() > 0 for s in slots)
    with pytest.raises(ValueError, match="remove it from the recipe"):
        ContrastLoss()([CompressedPassage("text", 3, "test", text="a", n_tokens=1)] * 3)


def lists(reader, *counts: int) -> list[list[CompressedPassage]]:
    torch.manual_seed(1)
    rows = [[torch.randn(slots, reader.width, requires_grad=True) for slots in range(1, n + 1)] for n in counts]
    return [[passage(slots, reader) for slots in group] for group in rows]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_ranking_is_list_mle_over_mean_slots(zoo, architecture):
    reader, queries = zoo.reader(architecture), ["who signed it?", "where is the river?"]
    ranked = lists(reader, 4, 2)
    want = torch.zeros(())
    for query, passages in zip(queries, ranked):
        mixed = random.Random(query).sample(passages, len(passages))
        pieces = [TASK.format(n=len(passages), query=query)]
        for number, p in enumerate(mixed, 1):
            pieces += [f"Passage {number}: ", p.embeds, "\n"]
        rows, text = [reader.embed(torch.tensor(reader.bos_ids, dtype=torch.long))], ""
        for piece in [*pieces, ASK.format(query=query)]:  # neighbouring strings are read as one
            if isinstance(piece, str):
                text += piece
                continue
            rows += [reader.embed(torch.tensor(reader.tokenize(text))), piece]
            text = ""
        rows.append(reader.embed(torch.tensor(reader.tokenize(text))))
        vectors = torch.stack([p.embeds.mean(0) for p in passages])
        states = reader.model.get_decoder()(inputs_embeds=torch.cat([*rows, vectors])[None]).last_hidden_state[0]
        first = sum(map(len, rows)) - 1
        for t in range(len(passages)):
            scores = vectors[t:] @ states[first + t]
            want = want - scores.log_softmax(-1)[0] / len(passages)
    found = RankingLoss(reader)(queries, ranked)
    assert torch.allclose(found, want, atol=1e-4, rtol=1e-4)
    found.backward()
    assert all(p.embeds.grad.abs().max() > 0 for group in ranked for p in group)


def test_decoding_chooses_what_the_training_scores_say(zoo):
    reader = zoo.reader()
    (passages,) = lists(reader, 6)
    order = rank_passages(reader, "who?", passages)
    assert sorted(order) == list(range(6))
    with torch.no_grad():
        (logits,) = ranking_logits(reader, [ranking_prompt("who?", passages)], [[passages[i] for i in order]])
    assert [int(row[t:].argmax()) for t, row in enumerate(logits)] == [0] * 6
    windowed = rank_passages(reader, "who?", passages, window=4, stride=2)
    last = rank_passages(reader, "who?", passages[2:])
    middle = [0, 1, *(2 + i for i in last)]
    top = rank_passages(reader, "who?", [passages[i] for i in middle[:4]])
    assert windowed == [*(middle[i] for i in top), *middle[4:]]
    assert rank_passages(reader, "who?", []) == []


def test_ranking_refuses_what_it_cannot_compare(zoo):
    with pytest.raises(ValueError, match="use another reader"):
        check_rankable(zoo.reader(), torch.zeros(3, 40))
    with pytest.raises(ValueError, match="at least one slot"):
        rank_passages(zoo.reader(), "who?", [passage(torch.zeros(0, 32), zoo.reader())])
    with pytest.raises(ValueError, match="stride"):
        rank_passages(zoo.reader(), "who?", [], window=4, stride=5)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_slot_autoencoding_reads_each_slot_alone(zoo, architecture):
    reader = zoo.reader(architecture)
    loss = SlotAutoencodingLoss(reader, reader.width, chunk=4)
    slots = [torch.randn(n, reader.width, requires_grad=True) for n in (2, 1)]
    ids = [[11, 12, 13, 14, 15], [21, 22, 23]]
    runs = [[11, 12, 13], [14, 15], [21, 22, 23]]
    want = torch.zeros(())
    for z, run in zip(torch.cat(slots), runs):
        tokens = reader.embed(torch.tensor(run))
        read = torch.cat([loss.slot(z)[None], loss.ae[None], loss.tokens(tokens[:-1])])
        read = read + sinusoids(*read.shape, read)
        mask = torch.full((len(read), len(read)), float("-inf")).triu(1)
        states = loss.norm(loss.block(read[None], src_mask=mask)[0])[1:]
        want = want + F.cross_entropy(reader.head(states), torch.tensor(run), reduction="sum")
    found = loss([passage(s, reader) for s in slots], ids)
    assert torch.allclose(found, want, atol=1e-4, rtol=1e-4)
    found.backward()
    assert all(s.grad.abs().max() > 0 for s in slots)
    assert all(p.grad is not None for p in loss.parameters())


def test_slot_autoencoding_reads_the_values_of_kv_slots(zoo):
    reader = zoo.reader()
    values = tuple(torch.randn(2, 3, 8, requires_grad=True) for _ in range(3))
    kv = CompressedPassage("kv", 6, "test", reader.fingerprint, keys=values, values=values, positions=torch.arange(3))
    loss = SlotAutoencodingLoss(reader, 2 * 8 * 3)
    rows = torch.stack([torch.cat([v[:, slot].flatten() for v in values]) for slot in range(3)])
    as_embeds = loss([passage(rows, reader)], [[7, 8, 9, 10, 11, 12]])
    assert torch.allclose(loss([kv], [[7, 8, 9, 10, 11, 12]]), as_embeds, atol=1e-5)
    with pytest.raises(ValueError, match="slot_ae"):
        loss([CompressedPassage("text", 3, "test", text="a", n_tokens=1)], [[7]])
