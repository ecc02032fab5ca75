"""LLMLingua-2 checkpoints: token classifiers of any name."""

from __future__ import annotations

import json

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors import CheckpointError
from nutgraf.compressors.importers import MissingOption, import_checkpoint, import_to, recognise
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

TEXT = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


@pytest.fixture
def folder(zoo, tmp_path):
    torch.manual_seed(0)
    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=2)
    model = BertForTokenClassification(BertConfig(vocab_size=zoo.VOCAB, max_position_embeddings=256, **small)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    path = tmp_path / "some-classifier"
    model.save_pretrained(path)
    zoo.tokenizer().save_pretrained(path)
    return path


def test_any_token_classifier_is_recognised_and_its_probabilities_are_its_own(zoo, folder):
    assert recognise(folder) == "llmlingua2"
    reader = zoo.reader("llama")
    compressor = import_checkpoint("llmlingua2", folder, reader)
    model = BertForTokenClassification.from_pretrained(folder).eval()
    ids = zoo.tokenizer()(TEXT)["input_ids"]
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].softmax(-1)[1:, 1]
    ((_, found),) = compressor.words.probabilities([TEXT])
    assert torch.allclose(found, want, atol=1e-5)
    assert compressor.config.mode == "published"
    fast = import_checkpoint("llmlingua2", folder, reader, mode="fast", ratio=3.0)
    (passage,) = fast.compress([TEXT])
    assert 0 < passage.n_tokens <= passage.source_tokens / 3


def test_it_is_written_with_its_classifier(zoo, folder, tmp_path):
    reader = zoo.reader("llama")
    import_to("llmlingua2", folder, tmp_path / "out", reader, mode="fast")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()  # what was written stands by itself
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    loaded = load_compressor(moved, reader)
    assert loaded.compress([TEXT], ratio=2)[0].text
    assert loaded.fingerprint == load_compressor(moved, reader).fingerprint
    assert not (moved / "reader").exists()


def word_piece_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Letters and digits as WordPiece; the rest of the vocabulary is unused."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = sorted({*TEXT} - {" "})
    known = [*specials, *letters, *("##" + letter for letter in letters)]
    pieces = [*known, *(f"[unused{i}]" for i in range(size - len(known)))]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_the_releases_options_are_set_at_import(zoo, folder, tmp_path):
    word_piece_tokenizer(zoo.VOCAB).save_pretrained(folder)
    reader = zoo.reader("llama")
    options = {"keep": [",", "."], "keep_digits": True, "drop_consecutive": True}
    import_to("llmlingua2", folder, tmp_path / "out", reader, **options)
    loaded = load_compressor(tmp_path / "out", reader)
    assert (loaded.config.keep, loaded.config.keep_digits) == ((",", "."), True)
    assert loaded.config.published.drop_consecutive
    (passage,) = loaded.compress([TEXT], ratio=3)
    assert "1903" in passage.text
    assert "1911" in passage.text
    bare = import_checkpoint("llmlingua2", folder, reader)
    assert passage.text != bare.compress([TEXT], ratio=3)[0].text
    (fast,) = import_checkpoint("llmlingua2", folder, reader, mode="fast", keep=["Nobel"]).compress([TEXT], ratio=3)
    assert "Nobel" in fast.text
    for wrong, message in (
        ({"keep": ",."}, "keep must be a list"),
        ({"keep": ["Nobel Prizes"]}, "forces single tokens"),
        ({"drop_consecutive": True, "mode": "fast"}, "mode 'published' alone"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            import_checkpoint("llmlingua2", folder, reader, **wrong)


@pytest.mark.slow
def test_damage_is_refused_by_name(zoo, folder):
    reader = zoo.reader("llama")
    with pytest.raises(MissingOption, match="reader"):
        import_checkpoint("llmlingua2", folder)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    for change, named in (
        ({k: v for k, v in state.items() if k != "classifier.bias"}, r"missing classifier\.bias"),
        ({**state, "crf.weight": torch.zeros(1)}, r"unknown crf\.weight"),
        ({**state, "classifier.weight": torch.zeros(2, 23)}, r"classifier\.weight is \(2, 23\)"),
        ({**state, "classifier.bias": torch.full((2,), torch.nan)}, "holds NaN"),
    ):
        save_file(change, weights)
        with pytest.raises(CheckpointError, match=named):
            import_checkpoint("llmlingua2", folder, reader)
    old = {"bert.embeddings.position_ids": torch.arange(256), "bert.pooler.dense.weight": torch.zeros(24, 24)}
    save_file({**state, **old}, weights)
    import_checkpoint("llmlingua2", folder, reader)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"id2label": {"0": "A", "1": "B", "2": "C"}, "label2id": {"A": 0, "B": 1, "C": 2}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="has 3 labels"):
        import_checkpoint("llmlingua2", folder, reader)
