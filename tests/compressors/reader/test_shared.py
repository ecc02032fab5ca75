"""Prompts that begin alike are read as if each were read whole: the same states, and the same gradient into the slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nutgraf import CompressedPassage
from nutgraf.compressors.encoders.lora_twin import LoRATwin
from nutgraf.compressors.encoders.tuned_reader import AdaptedReader
from nutgraf.compressors.reader import shared

ASKED = [
    "\n\nQuestion: who?\nAnswer:",
    "\n\nQuestion: when did it end, and why?\nAnswer:",
    "\n\nQuestion: where is it?\nAnswer:",
]
ANSWERS = [" Curie", " in 1648 at last", " Warsaw"]
NAMES = ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
NAMES += [pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "gemma2", "opt", "gpt_neox", "falcon")]


def passage(reader, slots: torch.Tensor) -> CompressedPassage:
    return CompressedPassage("embeds", 30, "test", reader.fingerprint, embeds=slots)


@pytest.fixture(autouse=True)
def worth_sharing(monkeypatch):
    monkeypatch.setattr(shared, "pass_positions", lambda device: 0)


def compare(reader, prompts, groups, slots, budget, parameters=()):
    targets = reader.tokenize_batch([ANSWERS[i % 3] for i in range(len(prompts))])
    wanted = reader.target_hidden(prompts, targets)
    got = shared.target_hidden(reader, prompts, targets, groups, budget)
    scale = float(wanted.hidden.detach().abs().max())
    assert torch.allclose(got.hidden, wanted.hidden, atol=1e-5 * scale, rtol=0)
    assert torch.equal(got.ids, wanted.ids)
    assert torch.equal(got.rows, wanted.rows)
    weight = torch.randn(wanted.hidden.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        *(torch.autograd.grad((found.hidden * weight).sum(), [*slots, *parameters]) for found in (wanted, got))
    ):
        assert torch.allclose(a, b, atol=1e-5 * float(a.abs().max()), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_states_and_gradients_equal_those_of_whole_prompts(zoo, name):
    reader = zoo.reader(name)
    slots = [torch.randn(n, reader.width).requires_grad_() for n in (5, 9)]
    made = [passage(reader, s) for s in slots]
    prompts = [["Read: ", made[i % 2], ASKED[i % 3]] for i in range(6)] + [[made[0], "\n", made[1], ASKED[0]]]
    assert shared.shares_prefixes(reader)
    for budget in (40, 4096):
        compare(reader, prompts, [0, 1, 0, 1, 0, 1, 2], slots, budget)


def test_the_common_part_runs_once_and_a_tuned_reader_gets_the_same_gradients(zoo):
    base = zoo.reader("llama")
    twin = LoRATwin(base.model, r=2, alpha=4.0)
    for p in twin.parameters():
        torch.nn.init.normal_(p, std=0.1)
    reader = AdaptedReader(base, twin)
    slots = [torch.randn(12, reader.width).requires_grad_()]
    made = passage(reader, slots[0])
    prompts = [[made, asked] for asked in ASKED]
    compare(reader, prompts, ["p"] * 3, slots, 4096, list(twin.parameters()))
    seen: list[int] = []
    handle = reader.model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"].shape[0] * k["inputs_embeds"].shape[1]), with_kwargs=True
    )
    shared.target_hidden(reader, prompts, reader.tokenize_batch(ANSWERS), ["p"] * 3, 4096)
    handle.remove()
    common = len(reader.bos_ids) + 12
    longest = max(len(reader.tokenize(a + b)) for a, b in zip(ASKED, ANSWERS))
    assert sum(seen) < 2 * common + 3 * longest


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6),
    groups=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_any_prompts_in_any_groups(zoo, parts, groups):
    reader = zoo.reader("llama")
    slots = [torch.randn(n, reader.width).requires_grad_() for n in (1, 3)]
    atoms = ["The treaty", " was signed. ", "x", *(passage(reader, s) for s in slots)]
    prompts = [[atoms[i] for i in part] for part in parts]
    prompts.append([*atoms[3:], "."])  # every slot is read
    compare(reader, prompts, [*groups[: len(parts)], 3], slots, 64)
    with torch.no_grad():
        texts = ["The treaty was" + " signed" * i for i in range(3)]
        ids = reader.tokenize_batch([" x y"] * 3)
        want = reader.target_hidden(texts, ids).hidden
        assert torch.allclose(
            shared.target_hidden(reader, texts, ids, [0, 0, 0], 64).hidden, want, atol=1e-4, rtol=1e-5
        )


def test_a_model_without_a_cache_of_keys_reads_prompts_whole(zoo, monkeypatch):
    reader = zoo.reader("llama", seed=3)
    monkeypatch.setattr(shared, "prefix_cache", lambda *a: (_ for _ in ()).throw(AttributeError("layers")))
    assert not shared.shares_prefixes(reader)
    slots = [torch.randn(4, reader.width).requires_grad_()]
    made = passage(reader, slots[0])
    compare(reader, [[made, a] for a in ASKED], [0, 0, 0], slots, 4096)
