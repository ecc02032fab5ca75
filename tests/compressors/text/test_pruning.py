"""Sentence pruners: scores and losses equal a second computation, and budgets hold."""

from __future__ import annotations

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nutgraf.compressors import COMPRESSORS, load_compressor, make_compressor
from nutgraf.compressors.core.units import split_units
from nutgraf.compressors.text.exit import HEAD, TAIL
from nutgraf.compressors.text.pruning import PruneExample, SentenceScores, sentence_spans, token_values
from nutgraf.compressors.text.scoring import TokenScores
from torch.nn.functional import binary_cross_entropy, cosine_similarity, cross_entropy
from transformers import BertConfig, BertModel

TEXT = (
    "Marie Curie was born in Warsaw. She won two Nobel Prizes, in physics (1903) and in chemistry (1911). "
    "Rivers carry sediment to the sea. The treaty was signed in 1648."
)
QUESTION = "Who signed the treaty?"
TRAINED = ("provence", "filco", "recomp")


@pytest.fixture(scope="module")
def reader():
    return zoo.reader("llama")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertModel(BertConfig(vocab_size=zoo.VOCAB, max_position_embeddings=256, **small))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return str(folder)


def build(method: str, reader, encoder: str, **changes):
    torch.manual_seed(0)
    compressor = make_compressor(method, reader, encoder=encoder, r=2, **changes)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return compressor.eval()


def sentences(text: str) -> list[str]:
    return [text[a:b] for a, b in sentence_spans(text)]


def states(compressor, query: str, text: str) -> tuple[torch.Tensor, list[int]]:
    """States of the encoder with LoRA over question and passage, and the sentence of each token of the passage."""
    words = compressor.words
    asked, pieces = words.pieces(query), words.pieces(text)
    before, after = words.pieces.before, words.pieces.after
    ids = [*before, *asked.ids, *after, *pieces.ids, *after]
    found = words.tagger.twin.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
    first = len(before) + len(asked.ids) + len(after)
    spans = sentence_spans(text)
    inside = [next(i for i, (a, b) in enumerate(spans) if a <= start < b) for start, _ in pieces.offsets]
    return found, [-1] * first + inside + [-1] * len(after)


# -- scores --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_provence_averages_token_probabilities_over_sentences(reader, encoder):
    compressor = build("provence", reader, encoder)
    (found,) = compressor.score_sentences([TEXT], [QUESTION])
    hidden, inside = states(compressor, QUESTION, TEXT)
    logits = hidden @ compressor.words.tagger.head.weight.T + compressor.words.tagger.head.bias
    probabilities = torch.sigmoid(logits)
    for i, value in enumerate(found.values):
        mean = probabilities[torch.tensor(inside) == i, 0].mean()
        assert float(value) == pytest.approx(float(mean), abs=1e-4)
    assert found.words is not None
    assert torch.allclose(found.words.nll, probabilities[torch.tensor(inside) >= 0, 1], atol=1e-4)
    assert compressor.relevance([TEXT, ""], QUESTION) == pytest.approx([float(probabilities[0, 2]), 0.0], abs=1e-4)
    # the free form: exactly the sentences above the threshold
    threshold = float(found.values.median())
    free = build("provence", reader, encoder, mode="published", threshold=threshold)
    (kept,) = free.compress([TEXT], QUESTION)
    want = [s.strip() for s, value in zip(sentences(TEXT), found.values.tolist()) if value > threshold]
    assert kept.text == " ".join(want)
    none = build("provence", reader, encoder, mode="published", threshold=1.0)
    assert none.compress([TEXT], QUESTION)[0].text == ""


@torch.no_grad()
def test_filco_scores_the_mean_state_of_each_sentence(reader, encoder):
    compressor = build("filco", reader, encoder)
    (found,) = compressor.score_sentences([TEXT], [QUESTION])
    hidden, inside = states(compressor, QUESTION, TEXT)
    means = torch.stack([hidden[torch.tensor(inside) == i].mean(0) for i in range(len(found.spans))])
    head = compressor.words.tagger.head
    assert torch.allclose(found.values, torch.sigmoid(means @ head.weight[0] + head.bias), atol=1e-4)


@torch.no_grad()
def test_recomp_scores_the_cosine_of_mean_states(reader, encoder):
    compressor = build("recomp", reader, encoder)
    (found,) = compressor.score_sentences([TEXT], [QUESTION])

    def vector(text: str) -> torch.Tensor:
        ids = [*compressor.pieces.before, *compressor.pieces(text).ids, *compressor.pieces.after]
        return compressor.twin.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)

    want = [cosine_similarity(vector(s.strip()), vector(QUESTION), dim=0) for s in sentences(TEXT)]
    assert torch.allclose(found.values, torch.stack(want), atol=1e-4)


@torch.no_grad()
def test_exit_asks_for_each_sentence(reader):
    compressor = make_compressor("exit", reader)
    (found,) = compressor.score_sentences([TEXT], [QUESTION])
    starts = {
        w: {reader.tokenize(w)[0], reader.tokenize(f" {w}")[0]} - {reader.tokenize(" ")[0]} for w in ("Yes", "No")
    }
    for sentence, value in zip(sentences(TEXT), found.values):
        prompt = HEAD.format(query=QUESTION, document=TEXT) + TAIL.format(sentence=sentence.strip())
        ids = torch.tensor([[*reader.bos_ids, *reader.tokenize(prompt)]])
        p = reader.model(input_ids=ids).logits[0, -1].softmax(-1)
        yes, no = (float(p[sorted(starts[word])].sum()) for word in ("Yes", "No"))
        assert float(value) == pytest.approx(yes / (yes + no), abs=1e-4)
    # a passage beyond the window is read in parts, each sentence once
    small = make_compressor("exit", reader, window=150)
    assert len(small.score_sentences([TEXT * 4], [QUESTION])[0].values) == len(sentence_spans(TEXT * 4))
    with pytest.raises(ValueError, match="leaves no room"):
        small.score_sentences([TEXT], ["Why? " * 80])


# -- losses --------------------------------------------------------------------------------------------------------------


def example(values, kept: int | None = None) -> PruneExample:
    words = split_units(TEXT, "word") if kept is not None else []
    marks = tuple(int(i == kept) for i in range(len(words)))
    return PruneExample(QUESTION, TEXT, tuple(sentence_spans(TEXT)), tuple(values), tuple(words), marks)


def test_provences_loss_is_that_of_its_labels(reader, encoder):
    compressor = build("provence", reader, encoder)
    values = (0.0, None, 0.0, 1.0)
    loss = compressor.loss([example(values, kept=3)])["loss"]
    hidden, inside = states(compressor, QUESTION, TEXT)
    p = torch.sigmoid(compressor.words.tagger.head(hidden))
    at = [i for i, s in enumerate(inside) if s >= 0 and values[s] is not None]
    sentence = binary_cross_entropy(p[at, 0], torch.tensor([values[inside[i]] for i in at]))
    pieces = compressor.words.pieces(TEXT)
    (a, b) = split_units(TEXT, "word")[3]
    first = next(i for i, s in enumerate(inside) if s >= 0)
    marks = torch.tensor([float(a <= start < b) for start, _ in pieces.offsets])
    word = binary_cross_entropy(p[first : first + len(marks), 1], marks)
    rank = binary_cross_entropy(p[0, 2], torch.tensor(1.0))
    assert float(loss.detach()) == pytest.approx(float(sentence + word + 0.05 * rank), abs=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in compressor.parameters())


def test_filcos_loss_is_the_cross_entropy_with_the_oracle(reader, encoder):
    compressor = build("filco", reader, encoder)
    values = (0.1, None, 0.0, 0.9)
    loss = compressor.loss([example(values), PruneExample(QUESTION, "", (), ())])["loss"]
    (found,) = compressor.score_sentences([TEXT], [QUESTION])
    known = [i for i, value in enumerate(values) if value is not None]
    want = binary_cross_entropy(found.values[known], torch.tensor([values[i] for i in known]))
    assert float(loss.detach()) == pytest.approx(float(want), abs=1e-4)
    assert float(compressor.loss([example([None] * 4)])["loss"].detach()) == 0.0


def test_recomps_loss_chooses_among_the_sentences_of_the_batch(reader, encoder):
    compressor = build("recomp", reader, encoder)
    other = PruneExample("Where do rivers lead?", "Rivers lead to the sea. It rained.", ((0, 23), (23, 34)), (1.0, 0.0))
    found = compressor.loss([example((0.0, None, 0.0, 1.0)), other, example((0.0,) * 4)])
    texts = sentences(TEXT)
    candidates = [texts[0], texts[2], texts[3], "Rivers lead to the sea.", "It rained.", *texts]
    vectors = compressor.vectors([text.strip() for text in candidates])
    asked = compressor.vectors([QUESTION, other.question])
    want = cross_entropy(20 * asked @ vectors.T, torch.tensor([2, 3]))
    assert float(found["loss"].detach()) == pytest.approx(float(want.detach()), abs=1e-4)
    assert float(compressor.loss([example((0.0,) * 4)])["loss"].detach()) == 0.0


# -- budgets -------------------------------------------------------------------------------------------------------------


class Fixed:
    """Scores that a test chooses, in place of a model's."""

    def __init__(self, compressor, values: dict[str, list[float]]) -> None:
        self.values = values
        compressor.score_sentences = self

    def __call__(self, texts, queries):
        return [SentenceScores(sentence_spans(text), torch.tensor(self.values[text])) for text in texts]


def test_whole_sentences_come_first_and_words_of_the_next_fill_the_budget(reader, encoder):
    compressor = build("provence", reader, encoder)
    Fixed(compressor, {TEXT: [0.1, 0.2, 0.3, 0.9]})
    best, second = sentences(TEXT)[3].strip(), sentences(TEXT)[2].strip()
    size = len(reader.tokenize(best))
    (exact,) = compressor.compress([TEXT], QUESTION, max_tokens=size)
    assert exact.text == best
    (more,) = compressor.compress([TEXT], QUESTION, max_tokens=size + 6)
    assert more.text.endswith(best)
    filling = more.text[: -len(best)].split()
    assert filling == second.split()[: len(filling)]
    assert filling
    whole = build("provence", reader, encoder, unit="sentence")
    Fixed(whole, {TEXT: [0.1, 0.2, 0.3, 0.9]})
    assert whole.compress([TEXT], QUESTION, max_tokens=size + 6)[0].text == best


def test_passages_of_one_question_share_their_budget(reader, encoder):
    compressor = build("provence", reader, encoder, pooled=True)
    useless = TEXT.replace("Marie", "Pierre")
    Fixed(compressor, {TEXT: [0.9, 0.8, 0.7, 0.6], useless: [0.1, 0.1, 0.1, 0.1]})
    useful, empty = compressor.compress([TEXT, useless], QUESTION, ratio=4)
    sizes = [len(reader.tokenize(text)) // 4 for text in (TEXT, useless)]
    assert sizes[0] < useful.n_tokens <= sum(sizes)
    assert empty.text == ""
    # another question has a budget of its own
    _, other = compressor.compress([TEXT, useless], [QUESTION, "Who was born?"], ratio=4)
    assert other.text


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.text(max_size=50), min_size=1, max_size=4), target=st.integers(0, 40))
def test_a_shared_budget_is_never_exceeded(method, reader, encoder, texts, target):
    compressor = build(method, reader, encoder, pooled=True)
    found = compressor.compress(texts, QUESTION, max_tokens=target)
    assert sum(p.n_tokens for p in found) <= target * len(texts)


@pytest.mark.parametrize("pooled", [False, True])
def test_several_ratios_at_once_score_once_and_are_what_each_gives_alone(reader, encoder, pooled):
    compressor = build("provence", reader, encoder, pooled=pooled)
    texts = [TEXT, "", "Rain fell. The treaty was signed by many. It was late."]
    runs: list[int] = []
    compressor.words.tagger.head.register_forward_hook(lambda *_: runs.append(1))
    found = compressor.compress_at(texts, [2, 4, None], QUESTION, batch_size=3)
    assert len(runs) == 1
    for ratio, passages in zip((2, 4, None), found):
        alone = compressor.compress(texts, QUESTION, ratio)
        assert [(p.text, p.spans, p.info) for p in passages] == [(p.text, p.spans, p.info) for p in alone]
    with pytest.raises(TypeError, match="has no options"):
        compressor.compress_at(texts, [2], QUESTION, other=1)


@pytest.mark.parametrize("method", TRAINED)
def test_a_saved_pruner_loads_with_a_shared_budget(method, reader, encoder, tmp_path):
    compressor = build(method, reader, encoder)
    compressor.save_pretrained(tmp_path)
    texts = [TEXT, "Rain fell.", "The treaty was signed by many. It was late."]
    want = build(method, reader, encoder, pooled=True).compress(texts, QUESTION, 4)
    for loaded in (
        load_compressor(tmp_path, reader, pooled=True),
        load_compressor(f"{tmp_path}:pooled=true", reader),
        load_compressor(tmp_path, reader).with_settings(pooled=True),
    ):
        assert [p.text for p in loaded.compress(texts, QUESTION, 4)] == [p.text for p in want]
    if method == "recomp":
        with pytest.raises(ValueError, match=r"with_settings takes joiner, .+; got threshold"):
            compressor.with_settings(threshold=0.3)
    else:
        free = load_compressor(tmp_path, reader, mode="published", threshold=1.0)
        assert free.compress([TEXT], QUESTION)[0].text == ""
    with pytest.raises(ValueError, match="pooled must be true or false"):
        load_compressor(tmp_path, reader, pooled=1)


def test_values_of_words_follow_their_sentence_and_then_their_own_score():
    spans = sentence_spans(TEXT)
    found = token_values(TEXT, SentenceScores(spans, torch.tensor([0.4, 0.1, 0.2, 0.3])))
    order = found.nll.argsort(descending=True, stable=True).tolist()
    first = [i for i, (a, _) in enumerate(found.offsets) if a < spans[0][1]]
    assert order[: len(first)] == first
    near = token_values(TEXT, SentenceScores(spans, torch.tensor([1e-4, 7e-4, 2e-4, 3e-4])))
    best = near.nll.argsort(descending=True, stable=True).tolist()
    second = [i for i, (a, _) in enumerate(near.offsets) if spans[1][0] <= a < spans[1][1]]
    assert best[: len(second)] == second
    words = TokenScores([1, 2], [(0, 5), (6, 11)], torch.tensor([0.0, 1.0]))
    assert token_values(TEXT, SentenceScores(spans, torch.zeros(4), words)).nll.tolist() == [0.0, 1e-9]
    assert len(token_values("", SentenceScores([], torch.zeros(0))).nll) == 0


@pytest.mark.parametrize("method", ["provence", "filco", "recomp", "exit", "token-elimination", "prompt-saw"])
def test_a_missing_question_is_asked_for(method, reader, encoder):
    trained = {"encoder": encoder, "r": 2} if method in TRAINED else {}
    compressor = make_compressor(method, reader, **trained)
    with pytest.raises(ValueError, match="got none"):
        compressor.compress([TEXT], ratio=2)


@pytest.mark.parametrize("method", ["recomp", "token-elimination", "semantic", "prompt-saw"])
def test_a_mode_that_a_method_lacks_is_refused(method):
    with pytest.raises(ValueError, match="mode='published' is not available"):
        COMPRESSORS[method].config_class(mode="published")


def test_odd_settings_are_refused():
    config = COMPRESSORS["provence"].config_class
    with pytest.raises(ValueError, match="threshold must be a number"):
        config(threshold=float("nan"))
    with pytest.raises(ValueError, match="pooled and keep exclude each other"):
        config(pooled=True, keep=["numbers"])
    with pytest.raises(ValueError, match="pooled must be true or false"):
        config(pooled=2)
    with pytest.raises(ValueError, match="pooled shares an exact budget, and mode='published' has none"):
        config(pooled=True, mode="published")
