"""The fidelity gate: what it measures, how it is calibrated, and what is then read as text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import nutgraf
import pytest
import torch
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from nutgraf import CompressedPassage, Reader, load_compressor, make_compressor, pretrained
from nutgraf.adapters.llama_index import (
    CompressedContextLLM,
    CompressedContextPostprocessor,
    CompressionEvent,
    CompressPassages,
    PassageCache,
    TextForTop,
    TokenBudget,
)
from nutgraf.adapters.store import MemoryStore, keys_for
from nutgraf.benchmarks.methods import Compressed
from nutgraf.benchmarks.quality.quality import Settings
from nutgraf.benchmarks.studies import gate as suite
from nutgraf.benchmarks.studies.mixture import Mixture
from nutgraf.compressors import CheckpointError, FidelityConfig, FidelityGate, ReaderMismatchError
from nutgraf.compressors.fidelity.calibration import MonotoneLogistic
from nutgraf.compressors.fidelity.probes import fact_tokens, make_probes
from nutgraf.recipes.data.corpus import Record

TEXTS = [
    "The treaty was signed in 1648 in Westphalia, and it ended thirty years of war among the great powers of Europe.",
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics in 1903 and in chemistry in 1911.",
    "Rivers carry sediment to the sea, and the Amazon and the Yangtze are among the longest rivers on Earth.",
    "The bridge was built in 1932 by John Bradfield, and it carries trains, cars and people across the harbour.",
]
SAMPLE = Path(nutgraf.__file__).parent / "benchmarks" / "sample" / "squad_dev.jsonl"


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def compressor(reader):
    """Untrained mean-pooled windows: at ratio 1 the passage's own embeddings, above that less and less of it."""
    return make_compressor("mean-pool", reader, encoder="embeddings", ratio=4.0).eval()


@pytest.fixture(scope="module")
def measured(compressor):
    gate = FidelityGate(compressor)
    return gate.measure(compressor.compress(TEXTS), TEXTS)


@pytest.fixture
def gate(compressor, measured) -> FidelityGate:
    """Fitted so that the first passage is the worst and the last the best."""
    return fitted(FidelityGate(compressor, FidelityConfig(signals=("reconstruction",))))


def fitted(gate: FidelityGate) -> FidelityGate:
    """Calibrated on made-up numbers: the higher the signals, the better."""
    rows = [tuple(-20.0 + i + 0.1 * j for j in range(len(gate.config.signals))) for i in range(20)]
    return gate.fit(rows, [i / 19 for i in range(20)])


def with_slots(passage: CompressedPassage, slots: torch.Tensor) -> CompressedPassage:
    return replace(passage, embeds=slots)


# -- questions and facts -------------------------------------------------------------------------------------------------


def test_probes_ask_for_facts_and_are_always_the_same():
    for text in TEXTS:
        probes = make_probes(text, 3)
        assert probes == make_probes(text, 3)
        assert 1 <= len(probes) <= 3
        assert all(answer in text and answer not in question for question, answer in probes)
        assert len({answer for _, answer in probes}) == len(probes)
    assert {answer for _, answer in make_probes(TEXTS[1], 9)} >= {"Warsaw", "1903", "1911"}
    assert make_probes("nothing here", 3) == []


def test_fact_tokens_are_those_of_names_numbers_and_rare_words():
    text = "In 1903 the Paris school was so small. Electroencephalography!"
    words = [(0, 2), (2, 7), (7, 11), (11, 17), (17, 24), (24, 28), (28, 31), (31, 38), (38, 42), (42, 50), (50, 62)]
    found = fact_tokens(text, words)
    marked = {text[a:b].strip() for (a, b), fact in zip(words, found) if fact}
    assert {"1903", "Paris"} <= marked
    assert not marked & {"the", "school", "was", "so", "small."}
    assert found[-3:] == [True] * 3  # one word of three tokens


# -- calibration ---------------------------------------------------------------------------------------------------------


def test_calibration_is_monotone_and_finds_what_matters():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000, 3)) * [1.0, 5.0, 1.0] + [0.0, 7.0, 3.0]
    truth = 1 / (1 + np.exp(-(0.5 + 1.5 * (rows[:, 1] - 7) / 5 - 1.0 * (rows[:, 2] - 3))))
    targets = (rng.random(2000) < truth).astype(float)
    found = MonotoneLogistic.fit(rows, targets)
    assert found.weights[2] == 0  # it points the wrong way, so it is not used
    assert found.weights[0] < 0.2
    assert found.weights[1] > 0.9
    scores = found(rows)
    assert abs(scores.mean() - targets.mean()) < 0.01
    better = rows + np.array([0.0, 1.0, 0.0])
    assert (found(better) >= scores).all()
    missing = rows.copy()
    missing[:, 0] = np.nan
    assert np.isfinite(found(missing)).all()
    assert MonotoneLogistic.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_calibration_agrees_with_a_plain_newton_fit():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(400, 2))
    targets = 1 / (1 + np.exp(-(rows @ [1.0, 0.5] - 0.3)))
    found = MonotoneLogistic.fit(rows, targets, l2=0.05)
    z = np.hstack([np.clip((rows - rows.mean(0)) / rows.std(0), -4, 4), np.ones((400, 1))])
    soft, w, penalty = (targets * 400 + 0.5) / 401, np.zeros(3), np.diag([0.05, 0.05, 0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ w))
        hessian = z.T @ (z * (p * (1 - p))[:, None]) / 400 + penalty
        w -= np.linalg.solve(hessian, z.T @ (p - soft) / 400 + penalty @ w)
    np.testing.assert_allclose([*found.weights, found.bias], w, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "targets", "message"),
    [
        (np.zeros((3, 1)), np.zeros(3), "at least 8"),
        (np.zeros((9, 1)), np.full(9, 1.5), "from 0 to 1"),
        (np.zeros((9, 1)), np.full(9, np.nan), "from 0 to 1"),
        (np.zeros((9, 1)), np.zeros(8), "target"),
    ],
)
def test_calibration_refuses_bad_data(rows, targets, message):
    with pytest.raises(ValueError, match=message):
        MonotoneLogistic.fit(rows, targets)


def test_calibration_is_finite_where_all_is_well():
    found = MonotoneLogistic.fit(np.arange(9.0)[:, None], np.ones(9))
    assert 0.9 < found(np.array([[4.0]]))[0] < 1


# -- measuring -----------------------------------------------------------------------------------------------------------


def test_own_embeddings_lose_nothing_and_zeros_lose_much(compressor):
    gate = FidelityGate(compressor)
    own = compressor.compress(TEXTS, ratio=1.0)
    zeroed = [with_slots(p, torch.zeros_like(p.embeds)) for p in own]
    for same, worse in zip(gate.measure(own, TEXTS), gate.measure(zeroed, TEXTS)):
        same, worse = (dict(zip(gate.config.signals, values)) for values in (same, worse))
        for name in ("probe_recall", "probe_agreement", "fact_recall"):
            assert same[name] == pytest.approx(0, abs=2e-4)
        assert worse["probe_agreement"] < -0.01
        assert worse["reconstruction"] < 0


def test_signals_are_what_their_definitions_say(reader, compressor):
    config = FidelityConfig(probes=1, repeat_tokens=20)
    gate = FidelityGate(compressor, config)
    (passage,), text = compressor.compress(TEXTS[:1]), TEXTS[0]
    found = dict(zip(gate.config.signals, gate.measure([passage], [text])[0]))
    ((question, answer),) = make_probes(text, 1)
    tail, ids = config.question.replace("{question}", question), torch.tensor(reader.tokenize(" " + answer))
    q, p = (reader.target_logits([[c, tail]], [" " + answer])[0].double().log_softmax(-1) for c in (passage, text))
    recall = (q - p).gather(1, ids[:, None]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert found["probe_recall"] == pytest.approx(float(recall), abs=1e-4)
    assert found["probe_agreement"] == pytest.approx(-float(kl), abs=1e-4)
    assert found["probe_hits"] == float((q.argmax(-1) == ids).all())
    ids, offsets = reader.tokenize_with_offsets(text)
    target = torch.tensor(ids[:20])
    q, p = (
        reader.target_logits([[c, config.repeat]], [ids[:20]])[0]
        .double()
        .log_softmax(-1)
        .gather(1, target[:, None])[:, 0]
        for c in (passage, text)
    )
    facts = torch.tensor(fact_tokens(text, offsets)[:20])
    assert found["reconstruction"] == pytest.approx(float(q.mean()), abs=1e-4)
    assert found["fact_recall"] == pytest.approx(float((q - p)[facts].mean()), abs=1e-4)


def test_batches_and_neighbours_change_nothing(compressor, measured):
    gate = FidelityGate(compressor)
    passages = compressor.compress(TEXTS)
    alone = [gate.measure([p], [t], batch_size=1)[0] for p, t in zip(passages, TEXTS)]
    for one, many in zip(alone, measured):
        assert one == pytest.approx(many, abs=1e-3)


def test_what_cannot_be_measured(zoo, compressor):
    gate = fitted(FidelityGate(compressor))
    texts = ["", TEXTS[0], "so it is"]
    passages = compressor.compress(texts)
    empty, whole, dull = gate.measure(passages, texts)
    assert empty is None
    assert None not in whole
    assert dict(zip(gate.config.signals, dull))["probe_recall"] is None
    scores = gate.scores(passages, texts)
    assert scores[0] == 1
    assert all(0 < score < 1 for score in scores[1:])
    small = zoo.reader("llama", num_hidden_layers=1, max_position_embeddings=40)
    short = make_compressor("mean-pool", small, encoder="embeddings", ratio=8.0).eval()
    long = " ".join(TEXTS)
    assert FidelityGate(short).measure(short.compress([long]), [long]) == [None]  # no text of it could be read


def test_refusals(zoo, compressor):
    gate = FidelityGate(compressor)
    passages = compressor.compress(TEXTS)
    with pytest.raises(ValueError, match="not calibrated"):
        gate.scores(passages, TEXTS)
    with pytest.raises(ValueError, match="got 4 and 3"):
        gate.measure(passages, TEXTS[:3])
    other = make_compressor("mean-pool", compressor.reader, encoder="embeddings", ratio=2.0)
    with pytest.raises(ValueError, match="made by"):
        gate.measure(other.compress(TEXTS), TEXTS)
    with pytest.raises(ValueError, match="signals must be some of"):
        FidelityConfig(signals=("luck",))
    with pytest.raises(ValueError, match="probes"):
        FidelityConfig(probes=0)
    for bad in (0, 1, 1.5, True, "higher", None):
        with pytest.raises(ValueError, match="fidelity must be"):
            fitted(gate).threshold(bad)  # type: ignore[arg-type]


# -- judging -------------------------------------------------------------------------------------------------------------


def test_thresholds_leave_the_share_of_the_loss_that_they_promise(compressor):
    gate = FidelityGate(compressor, FidelityConfig(signals=("reconstruction",)))
    rng = np.random.default_rng(0)
    rows = [(float(x),) for x in rng.normal(size=300)]
    targets = [float(np.clip(0.7 + 0.2 * x + 0.1 * rng.normal(), 0, 1)) for (x,) in rows]
    gate.fit(rows, targets)
    scores, losses = np.array(gate.scores_of(rows)), 1 - np.array(targets)
    thresholds = [gate.threshold(name) for name in ("low", "medium", "high")]
    assert thresholds == sorted(thresholds)
    for threshold, left in zip(thresholds, (0.75, 0.5, 0.25)):
        kept = losses[scores >= threshold].sum() / losses.sum()
        assert left - 0.03 < kept <= left + 1e-9
    assert gate.threshold(0.4) == 0.4
    gate.fit(rows, [1.0] * 300)
    assert gate.threshold("high") < 0  # nothing is lost, so nothing is sent


def test_a_price_sends_those_first_that_lose_most_for_each_token_saved(tmp_path, compressor):
    gate = FidelityGate(compressor, FidelityConfig(signals=("reconstruction",)))
    rows = [(float(i),) for i in range(20)]
    targets, saved = [i / 19 for i in range(20)], [50 if i % 2 else 150 for i in range(20)]
    plain = np.array(gate.fit(rows, targets).scores_of(rows))
    assert gate.price is None
    priced = np.array(gate.fit(rows, targets, saved=saved).scores_of(rows, saved))
    assert gate.price == 100
    assert np.allclose(priced, 1 - (1 - plain) * 100 / np.array(saved))
    assert priced[1] < priced[0]  # as much is lost, for a third of the tokens
    losses = 1 - np.array(targets)
    for name, left in zip(("low", "medium", "high"), (0.75, 0.5, 0.25)):
        assert losses[priced >= gate.threshold(name)].sum() / losses.sum() <= left + 1e-9
    for bad in (None, saved[1:]):
        with pytest.raises(ValueError, match="give saved"):
            gate.scores_of(rows, bad)
    with pytest.raises(ValueError, match="numbers of tokens"):
        gate.fit(rows, targets, saved=saved[1:])
    gate.save_pretrained(tmp_path)
    again = FidelityGate.from_pretrained(tmp_path, compressor)
    assert again.price == gate.price
    passages = compressor.compress(TEXTS)
    assert again.scores(passages, TEXTS) == gate.scores(passages, TEXTS)
    spared = [p.source_tokens - p.slots for p in passages]
    assert again.scores(passages, TEXTS) == again.scores_of(again.measure(passages, TEXTS), spared)


def test_saved_and_loaded(zoo, tmp_path, compressor):
    gate = fitted(FidelityGate(compressor, FidelityConfig(probes=2)))
    gate.save_pretrained(tmp_path)
    again = FidelityGate.from_pretrained(tmp_path, compressor)
    passages = compressor.compress(TEXTS)
    assert again.scores(passages, TEXTS) == gate.scores(passages, TEXTS)
    assert (again.config, again.thresholds) == (gate.config, gate.thresholds)
    assert all(again.is_marked(passage) for passage in gate.mark(passages, TEXTS))
    reader = compressor.reader
    with pytest.raises(ReaderMismatchError, match="the compressor"):
        FidelityGate.from_pretrained(tmp_path, make_compressor("mean-pool", reader, encoder="embeddings", ratio=2.0))
    about = json.loads((tmp_path / "fidelity.json").read_text())
    (tmp_path / "fidelity.json").write_text(json.dumps({**about, "reader": "0" * 32}))
    with pytest.raises(ReaderMismatchError, match="the reader"):
        FidelityGate.from_pretrained(tmp_path, compressor)
    prices = (json.dumps({**about, "price": price}) for price in (0, -3.0, float("nan"), "much"))
    for broken in ("{", "[]", json.dumps({**about, "thresholds": {}}), json.dumps({**about, "version": 99}), *prices):
        (tmp_path / "fidelity.json").write_text(broken)
        with pytest.raises(CheckpointError):
            FidelityGate.from_pretrained(tmp_path, compressor)
    with pytest.raises(ValueError, match="calibrated gate"):
        FidelityGate(compressor).save_pretrained(tmp_path)


# -- reading: policy, events, store --------------------------------------------------------------------------------------


@pytest.fixture
def events():
    seen: list[CompressionEvent] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            if isinstance(event, CompressionEvent):
                seen.append(event)

    handler = Handler()
    get_dispatcher().add_event_handler(handler)
    yield seen
    get_dispatcher().event_handlers.remove(handler)


@pytest.fixture(scope="module")
def llm(reader) -> CompressedContextLLM:
    return CompressedContextLLM(reader, max_new_tokens=2)


def kinds(post: CompressedContextPostprocessor) -> str:
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]
    contents = [n.node.get_content(MetadataMode.LLM) for n in post.postprocess_nodes(nodes)]
    return "".join("c" if content.startswith("[[") else "t" for content in contents)


def test_passages_below_the_threshold_are_read_as_text(compressor, gate, llm, events):
    scores = gate.scores(compressor.compress(TEXTS), TEXTS)
    middle = float(np.mean(sorted(scores)[1:3]))
    wanted = "".join("t" if score < middle else "c" for score in scores)
    assert sorted(wanted) == list("cctt")
    post = CompressedContextPostprocessor(compressor, fidelity=middle, gate=gate, cache=PassageCache())
    assert kinds(post) == wanted
    assert (events[-1].passages, events[-1].as_text, events[-1].unfaithful, events[-1].fallbacks) == (2, 2, 2, 0)
    assert post.to_dict()["fidelity"] == middle
    post = CompressedContextPostprocessor(compressor, fidelity=middle, gate=gate, policy=TextForTop(1))
    assert kinds(post) == "t" + wanted[1:]
    assert events[-1].unfaithful == wanted[1:].count("t")
    assert kinds(CompressedContextPostprocessor(compressor)) == "cccc"
    assert events[-1].unfaithful == 0


def test_a_fidelity_that_makes_no_sense_is_refused(compressor, gate, zoo):
    for given, error, message in (
        ({"fidelity": "high"}, ValueError, "go together"),
        ({"gate": gate}, ValueError, "go together"),
        ({"fidelity": "high", "gate": "gate"}, TypeError, "must be a FidelityGate"),
        ({"fidelity": "highest", "gate": gate}, ValueError, "low, medium, high"),
        ({"fidelity": "high", "gate": FidelityGate(compressor)}, ValueError, "not calibrated"),
        ({"fidelity": "high", "gate": gate, "policy": TokenBudget(100)}, ValueError, "keeps a budget"),
        ({"fidelity": "high", "gate": gate, "query_aware": True}, ValueError, "before there is a question"),
    ):
        with pytest.raises(error, match=message):
            CompressedContextPostprocessor(compressor, **given)
    other = make_compressor("mean-pool", compressor.reader, encoder="embeddings", ratio=2.0)
    with pytest.raises(ReaderMismatchError, match="the compressor"):
        CompressedContextPostprocessor(other, fidelity="high", gate=gate)


def test_measured_once_when_indexed(compressor, gate, llm, monkeypatch):
    counted: list[int] = []
    measure = FidelityGate.measure

    def counting(self, passages, texts, **kwargs):
        counted.append(len(texts))
        return measure(self, passages, texts, **kwargs)

    monkeypatch.setattr(FidelityGate, "measure", counting)
    store, unmeasured = MemoryStore(), MemoryStore()
    nodes = [TextNode(text=text) for text in TEXTS]
    CompressPassages(compressor, store, gate=FidelityGate(compressor, gate.config))(nodes)
    assert counted == [4]
    found = store.get_many(keys_for(compressor, TEXTS))
    revived = [CompressedPassage.from_bytes(p.to_bytes()) for p in found]
    assert gate.scores(revived, TEXTS) == gate.scores(found, TEXTS)
    post = CompressedContextPostprocessor(compressor, fidelity="high", gate=gate, cache=PassageCache(), store=store)
    first = kinds(post)
    assert counted == [4]
    CompressPassages(compressor, unmeasured)(nodes)  # without a gate
    post = CompressedContextPostprocessor(
        compressor, fidelity="high", gate=gate, cache=PassageCache(), store=unmeasured
    )
    assert [kinds(post), kinds(post)] == [first, first]
    assert counted == [4, 4]


# -- the benchmark -------------------------------------------------------------------------------------------------------


def questions(n: int) -> list[Record]:
    places = ["Warsaw", "Prague", "Vienna", "Lisbon", "Dublin", "Oslo", "Athens", "Madrid"]
    return [
        Record(
            f"Where was traveller {i} born?",
            (places[i % 8],),
            (f"Traveller {i} was born in {places[i % 8]} in {1800 + i}." + " Rain fell, and more rain." * (i % 4),),
            ("",),
            0,
            "toy",
            id=str(i),
        )
        for i in range(n)
    ]


def test_the_suite_reports_the_curve_at_equal_tokens(compressor):
    settings = Settings("toy", 3, 16, progress=False)
    method = Compressed(compressor, 4.0)
    gate = suite.calibrate(method, questions(10), settings)
    lower = Compressed(compressor, 2.0)
    rows = suite.gate_rows(gate, method, questions(12), settings, shares=(0.25, 0.5), seeds=4, slots_alone=[lower])
    found = {(row["sending"], row.get("level")): row for row in rows}
    assert set(found) == {
        ("none", None), ("slots", None), ("text", None), ("gate", "curve"),
        *(
            (who, level)
            for who in ("gate", "random", "shortest")
            for level in ("0.25", "0.5", "low", "medium", "high", "budget-of-2")
        ),
    }  # fmt: skip
    slots, text = found["slots", None], found["text", None]
    assert (slots["share"], text["share"]) == (0, 1)
    for level in ("0.25", "0.5"):
        row = found["gate", level]
        assert row["share"] == float(level)
        assert slots["reader_tokens"] < row["reader_tokens"] < text["reader_tokens"]
        assert row["random_reader_tokens"] == pytest.approx(row["reader_tokens"], rel=0.1)
        assert row["random_reader_tokens"] <= row["reader_tokens"] + 1e-6
        assert row["f1_minus_random"] == pytest.approx(row["f1"] - found["random", level]["f1"], abs=1e-5)
        assert row["f1_minus_random_low"] <= row["f1_minus_random"] <= row["f1_minus_random_high"]
        short = found["shortest", level]
        assert short["reader_tokens"] <= row["reader_tokens"] + 1e-6
        assert short["share"] >= row["share"] - 1e-6
        assert row["f1_minus_shortest"] == pytest.approx(row["f1"] - short["f1"], abs=1e-5)
    row = found["gate", "budget-of-2"]
    assert row["reader_tokens"] <= row["slots_reader_tokens"]
    assert found["gate", "curve"]["f1_minus_random"] == pytest.approx(
        np.mean([found["gate", level]["f1_minus_random"] for level in ("0.25", "0.5")]), abs=1e-5
    )
    for row in rows:
        assert row["suite"] == "quality"
        assert row["test"] == "gate"
        assert row["n"] == 12
        assert {"command", "dtype", "seed", "date", "reader", "compressor"} <= set(row)


@pytest.mark.slow
def test_calibration_by_probability(reader, compressor):
    settings = Settings("toy", 3, 4, progress=False)
    method, records = Compressed(compressor, 4.0), questions(9)
    mixture = Mixture(method, records, settings)
    found = mixture.probabilities(mixture.passages)
    for record, p in zip(records, found):
        prompt = [record.passages[0], f"\n\nQuestion: {record.question}\nAnswer:"]
        ids = torch.tensor(reader.tokenize(" " + record.answers[0]))
        logits = reader.target_logits([prompt], [" " + record.answers[0]])[0].log_softmax(-1)
        assert p == pytest.approx(float(logits.gather(1, ids[:, None]).mean().exp()), rel=1e-3)
    by_probability = suite.calibrate(method, records, settings, by="probability")
    assert by_probability.price == pytest.approx(np.mean([mixture.saved[r.passages[0]] for r in records]))
    assert suite.calibrate(method, records, settings, priced=False).price is None
    assert by_probability.thresholds != suite.calibrate(method, records, settings).thresholds
    with pytest.raises(ValueError, match="by f1 or by probability"):
        suite.calibrate(method, records, settings, by="luck")


def test_a_mixture_reads_what_it_says(compressor):
    records = questions(3)
    mixture = Mixture(Compressed(compressor, 4.0), records, Settings("toy", 3, progress=False))
    sent = records[1].passages[0]
    (found,) = mixture.read([{sent}])
    reader = compressor.reader
    tail = "\n\nQuestion: {}\nAnswer:"
    pieces = [*compressor.compress([records[0].passages[0]]), sent, *compressor.compress([records[2].passages[0]])]
    lengths = [reader.length([piece, tail.format(r.question)]) for piece, r in zip(pieces, records)]
    assert found.tokens.tolist() == lengths
    assert mixture.share({sent}) == pytest.approx(1 / 3)
    other = mixture.at_random(frozenset({sent}), "seed")
    assert sum(mixture.extra[t] for t in other) <= mixture.extra[sent]


def test_intervals_resample_whole_passages():
    rng = np.random.default_rng(0)
    of_passage = rng.normal(size=50)
    values, groups = np.repeat(of_passage, 10), np.repeat(np.arange(50), 10).tolist()
    low, high = suite.clustered_interval(values, groups, 0)
    spread = of_passage.std() / np.sqrt(50)
    assert low < values.mean() < high
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.15)  # as if asked once a passage
    one_by_one = suite.clustered_interval(values, list(range(500)), 0)
    assert one_by_one[1] - one_by_one[0] < 0.5 * (high - low)


def test_auc():
    lost = np.array([True, True, False, False])
    assert suite.auc(np.array([0.1, 0.2, 0.3, 0.4]), lost) == 1
    assert suite.auc(np.array([0.4, 0.3, 0.2, 0.1]), lost) == 0
    assert suite.auc(np.ones(4), lost) == 0.5
    assert suite.auc(np.ones(4), ~lost & lost) is None


# -- the shipped models --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_true_slots_score_above_zeroed_and_foreign_ones():
    reader = Reader.from_pretrained(pretrained("reader-small"), dtype="float32")
    compressor = load_compressor(pretrained("icae-small"), reader=reader)
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    texts = list(dict.fromkeys(row["passages"][row["gold"]]["text"] for row in rows))[:8]
    passages = compressor.compress(texts, ratio=4.0)
    config = FidelityConfig(probes=3, repeat_tokens=64)
    gate = fitted(FidelityGate(compressor, config))
    true = gate.measure(passages, texts)
    zeroed = gate.measure([with_slots(p, torch.zeros_like(p.embeds)) for p in passages], texts)
    foreign = gate.measure(passages[1:] + passages[:1], texts)
    columns = np.array([true, zeroed, foreign], dtype=float).mean(1)  # the mean over passages, signal by signal
    for place, name in enumerate(gate.config.signals):
        if name != "probe_hits":
            assert columns[0, place] > columns[1:, place].max(), name
    best = gate.fit(true + zeroed + foreign, [1.0] * 8 + [0.0] * 16)
    scores = np.array(best.scores_of(true + zeroed + foreign)).reshape(3, 8)
    assert (scores[0] > scores[1:].max(0)).mean() >= 0.75
    assert suite.auc(scores.ravel(), np.repeat([False, True, True], 8)) > 0.85
