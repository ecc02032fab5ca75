"""Salient windows: what the slots start as, where they go, and what a question changes."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import Reader, load_compressor, make_compressor
from nutgraf.compressors.slots.pooling import averaged
from nutgraf.compressors.soft.salient_pool import SalientPoolCompressor
from nutgraf.compressors.text.llmlingua2 import LLMLingua2Compressor

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
LONG = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth. " * 40


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


def tagger(reader: Reader, **settings) -> LLMLingua2Compressor:
    torch.manual_seed(0)
    made = make_compressor("llmlingua2", reader, r=2, **settings)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.eval()


@pytest.fixture(scope="module")
def plain(reader) -> LLMLingua2Compressor:
    return tagger(reader)


@pytest.fixture(scope="module")
def asking(reader) -> LLMLingua2Compressor:
    return tagger(reader, query_aware=True)


def test_values_are_carried_over_by_characters():
    values = torch.tensor([[1.0], [4.0], [7.0]])
    found, seen = averaged(values, [(0, 2), (2, 4), (5, 8)], [(0, 1), (1, 4), (4, 5), (4, 8)], 8)
    assert found[:, 0].tolist() == pytest.approx([1.0, 3.0, 0.0, 7.0])
    assert seen.tolist() == [True, True, False, True]
    found, seen = averaged(torch.zeros(0, 3), [], [(0, 1)], 1)
    assert found.tolist() == [[0, 0, 0]]
    assert not seen.any()


@pytest.mark.slow
@pytest.mark.parametrize("text", [PASSAGE, LONG])
def test_training_starts_at_the_embeddings_of_the_tokens_most_worth_keeping(reader, plain, text):
    compressor = SalientPoolCompressor(config(), reader, tagger=plain).eval()
    whole = compressor.compress([text], ratio=1)[0]
    ids = torch.tensor(reader.tokenize(text))
    assert torch.allclose(whole.embeds, reader.embed(ids), atol=1e-5)
    with torch.no_grad():
        compressor.sharpness.fill_(1e4)  # nothing but the anchors
    # the words' probabilities, carried over to the reader's tokens one by one
    pieces, values = plain.words.probabilities([text])[0]
    worth = plain.score([text])[0].nll
    owner = {c: i for i, (a, b) in enumerate(pieces.offsets) for c in range(a, b)}
    tokens = []
    for a, b in reader.tokenize_with_offsets(text)[1]:
        held = [worth[owner[c]].item() for c in range(a, b) if c in owner]
        tokens.append(sum(held) / len(held) if held else -1.0)
    for ratio in (2, 5):
        found = compressor.compress([text], ratio=ratio)[0]
        n = -(-len(ids) // ratio)
        assert found.slots == n
        kept = sorted(sorted(range(len(ids)), key=lambda t: (-round(tokens[t], 5), t))[:n])
        same = (found.embeds - reader.embed(ids[kept])).norm(dim=1) < 1e-3
        assert same.float().mean() > 0.9  # ties of rounding aside
    assert values.shape == worth.shape


def config(**settings):
    return SalientPoolCompressor.config_class(**settings)


def test_a_window_holds_what_stands_before_its_anchor(reader, plain):
    compressor = SalientPoolCompressor(config(), reader, tagger=plain).eval()
    ids, width = torch.tensor([5, 6, 7, 8, 9]), reader.width
    states, odds = torch.zeros(5, compressor.norm.normalized_shape[0]), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    with torch.no_grad():
        compressor.sharpness.fill_(0.0)  # all tokens of a window alike
        slots = compressor._slots(ids, states, odds, odds, 5 / 2)
    e = reader.embed(ids).float()
    assert slots.shape == (2, width)
    assert torch.allclose(slots[0], (e[0] + e[1]) / 2**0.5, atol=1e-5)
    assert torch.allclose(slots[1], (e[2] + e[3] + e[4]) / 3**0.5, atol=1e-5)


@pytest.mark.slow
def test_every_part_can_learn(reader, asking):
    compressor = SalientPoolCompressor(config(), reader, tagger=asking).train()
    with torch.no_grad():
        compressor.mlp[2].weight.normal_(0, 0.1)
    passages = compressor.encode([PASSAGE, "", LONG], ["Who?", "What?", "Which rivers?"], 4)
    torch.cat([p.embeds for p in passages]).square().sum().backward()
    missing = [name for name, p in compressor.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert missing == []


@pytest.mark.slow
def test_the_question_moves_the_slots_and_is_asked_for(reader, asking, plain, tmp_path):
    compressor = SalientPoolCompressor(config(ratio=3.0), reader, tagger=asking).eval()
    assert compressor.query_aware
    one, two = compressor.compress([PASSAGE] * 2, query=["Where was she born?", "Which prizes did she win?"])
    assert one.slots == two.slots
    assert not torch.allclose(one.embeds, two.embeds)
    with pytest.raises(ValueError, match="for a question"):
        compressor.compress([PASSAGE])
    with pytest.raises(ValueError, match="there is room for"):
        compressor.compress([PASSAGE], query="why " * 400)
    compressor.save_pretrained(tmp_path)
    loaded = load_compressor(tmp_path, reader)
    assert loaded.query_aware
    again = loaded.compress([PASSAGE], query="Where was she born?")[0]
    assert torch.allclose(again.embeds, one.embeds, atol=1e-4)
    unasked = SalientPoolCompressor(config(), reader, tagger=plain).eval()
    assert not unasked.query_aware
    assert torch.equal(
        unasked.compress([PASSAGE], query="Where?")[0].embeds, unasked.compress([PASSAGE], query="Who?")[0].embeds
    )


def test_only_a_tagger_that_can_be_trained_is_taken(reader):
    with pytest.raises(ValueError, match="tagger must be a loaded LLMLingua-2"):
        SalientPoolCompressor(config(), reader, tagger=make_compressor("mean-pool", reader, encoder="embeddings"))


@pytest.mark.slow
def test_llmlingua2_keeps_words_for_the_question(reader, asking):
    one, two = asking.compress([PASSAGE] * 2, query=["Where was she born?", "Which prizes did she win?"], ratio=2)
    assert one.text != two.text
    with pytest.raises(ValueError, match="for a question"):
        asking.compress([PASSAGE], ratio=2)
    with pytest.raises(ValueError, match="knows no question"):
        make_compressor("llmlingua2", reader, r=2, query_aware=True, mode="published")
    # in rows of any length each passage token is scored once, behind the question
    long = asking.words.probabilities([LONG], ["Which rivers?"])[0]
    assert len(long[0].ids) == len(long[1]) > 512
