"""The objectives equal their definitions, their gradients are right, and their memory stays within the bound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nutgraf.compressors.objectives.autoencoding import AutoencodingLoss
from nutgraf.compressors.objectives.distillation import KLDistillationLoss
from nutgraf.compressors.objectives.language_modeling import LanguageModelingLoss
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROWS, WIDTH, VOCABULARY = 23, 6, 17


@pytest.fixture
def setup():
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)

    def head(hidden):
        return 5.0 * torch.tanh(hidden @ weight.T / 5.0)  # soft-capped, so that the head is not just a matrix

    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (ROWS,))
    weights = torch.rand(ROWS, dtype=torch.float64)
    return head, hidden, teacher, ids, weights


@pytest.mark.parametrize("loss_class", [AutoencodingLoss, LanguageModelingLoss])
@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_token_losses_equal_cross_entropy(setup, loss_class, chunk):
    head, hidden, _, ids, weights = setup
    expected = F.cross_entropy(head(hidden), ids)
    (gradient,) = torch.autograd.grad(expected, hidden)
    found = loss_class(head, chunk=chunk)(hidden, ids)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(found, hidden)[0], gradient, atol=1e-12)
    weighted = loss_class(head, chunk=chunk)(hidden, ids, weights, num_items=7)
    assert torch.allclose(weighted, (F.cross_entropy(head(hidden), ids, reduction="none") * weights).sum() / 7)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [4, 64])
def test_distillation_equals_kl(setup, temperature, chunk):
    head, hidden, teacher, _, weights = setup
    p, q = (head(x).div(temperature).softmax(-1) for x in (teacher, hidden))
    rows = (p * (p.log() - q.log())).sum(-1) * temperature**2
    found = KLDistillationLoss(head, temperature, chunk=chunk)(hidden, teacher)
    assert torch.allclose(found, rows.mean(), atol=1e-12)
    weighted = KLDistillationLoss(head, temperature, chunk=chunk)(hidden, teacher, weights)
    assert torch.allclose(weighted, (rows * weights).sum() / weights.sum(), atol=1e-12)


def test_top_k_keeps_a_proper_distribution(setup):
    head, hidden, teacher, _, _ = setup
    p, q = (head(x).softmax(-1) for x in (teacher, hidden))
    kept = p.topk(3).indices
    p, q = (torch.cat([x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)], -1) for x in (p, q))
    expected = (p * (p / q).log()).sum(-1).mean()
    found = KLDistillationLoss(head, top_k=3, chunk=4)(hidden, teacher)
    assert torch.allclose(found, expected, atol=1e-10)
    full = KLDistillationLoss(head, chunk=4)(hidden, teacher)
    assert 0 < found < full  # merging outcomes never adds divergence
    assert torch.allclose(KLDistillationLoss(head, top_k=99)(hidden, teacher), full)
    assert KLDistillationLoss(head, top_k=3)(teacher, teacher).abs() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("top_k", [None, 3])
def test_gradients_by_finite_differences(setup, chunk, top_k):
    head, hidden, teacher, ids, _ = setup
    hidden, teacher, ids = hidden.detach()[:7].requires_grad_(), teacher[:7], ids[:7]
    assert torch.autograd.gradcheck(lambda h: LanguageModelingLoss(head, chunk=chunk)(h, ids), hidden)
    assert torch.autograd.gradcheck(lambda h: KLDistillationLoss(head, 2.0, top_k, chunk)(h, teacher), hidden)


def test_a_trainable_head_gets_its_gradient(setup):
    _, hidden, _, ids, _ = setup
    head = nn.Linear(WIDTH, VOCABULARY).double()
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), ids), head.weight)[0]
    loss = AutoencodingLoss(head, chunk=4)
    assert not list(loss.parameters())
    assert torch.allclose(torch.autograd.grad(loss(hidden, ids), head.weight)[0], expected)


def test_the_head_runs_once_for_each_row_and_its_gradient(setup):
    _, hidden, _, ids, weights = setup
    weight = torch.randn(WIDTH, VOCABULARY, dtype=torch.float64)
    rows = []

    def head(states):
        rows.append(len(states))
        return states @ weight

    LanguageModelingLoss(head, chunk=5)(hidden, ids, weights).backward()
    assert sum(rows) == ROWS + 1  # one row tells whether the head is trained
    assert max(rows) == 5
    chunked, hidden.grad = hidden.grad, None
    LanguageModelingLoss(head, chunk=ROWS)(hidden, ids, weights).backward()
    assert torch.allclose(chunked, hidden.grad, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(
            LanguageModelingLoss(head, chunk=5)(hidden, ids), LanguageModelingLoss(head)(hidden, ids), atol=1e-12
        )


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, and how many of at least `size` elements live at the same time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.largest, self.alive, self.most = size, 0, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                elements = storage.nbytes() // tensor.element_size()
                self.largest = max(self.largest, elements)
                if elements >= self.size:
                    self.alive[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage)
        self.alive = {key: reference for key, reference in self.alive.items() if not reference.expired()}
        self.most = max(self.most, len(self.alive))
        return out


@pytest.mark.parametrize("kind", ["ae", "kl", "kl-top"])
def test_memory_bound(kind):
    rows, width, vocabulary, chunk = 300, 4, 501, 16
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(rows, width, requires_grad=True)
    with _Largest(chunk * vocabulary // 2) as seen:
        if kind == "ae":
            loss = AutoencodingLoss(head, chunk=chunk)(hidden, torch.randint(vocabulary, (rows,)))
        else:
            top_k = 8 if kind == "kl-top" else None
            loss = KLDistillationLoss(head, top_k=top_k, chunk=chunk)(hidden, torch.randn(rows, width))
        loss.backward()
    assert seen.largest <= chunk * vocabulary
    bytes_alive = 4 * chunk * vocabulary * seen.most
    assert bytes_alive <= (12 if kind == "ae" else 24) * chunk * vocabulary


def test_nothing_to_predict_and_wrong_shapes(setup):
    head, hidden, teacher, ids, weights = setup
    empty = AutoencodingLoss(head)(hidden[:0], ids[:0])
    assert empty.item() == 0.0
    empty.backward()
    with pytest.raises(ValueError, match="one token a row"):
        AutoencodingLoss(head)(hidden, ids[:-1])
    with pytest.raises(ValueError, match="same target positions"):
        KLDistillationLoss(head)(hidden, teacher[:-1])
    with pytest.raises(ValueError, match="one number a row"):
        LanguageModelingLoss(head)(hidden, ids, weights[:-1])
    with pytest.raises(ValueError, match="temperature"):
        KLDistillationLoss(head, temperature=0)
    with pytest.raises(ValueError, match="chunk"):
        LanguageModelingLoss(head, chunk=0)
    with pytest.raises(ValueError, match="top_k"):
        KLDistillationLoss(head, top_k=0)
