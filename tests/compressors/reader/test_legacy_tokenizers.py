"""Tokenizers that put a space before every text: runs inside a prompt, and the tokens around added ones."""

from __future__ import annotations

import copy
import shutil

import legacy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from legacy import CHARACTERS, MARK
from nutgraf import Reader, make_compressor
from nutgraf.compressors.importers.prompts import XRAG_TEMPLATE, slots_first, xrag_prompt
from nutgraf.compressors.importers.xrag import _with_names
from nutgraf.compressors.reader.loading import load_tokenizer, save_tokenizer
from nutgraf.compressors.reader.tokenization import PromptTokenizer, TokenIds
from transformers import PreTrainedTokenizerFast

KINDS = {kind: legacy.tokenizer(kind) for kind in legacy.KINDS if kind != "sentencepiece"}


def tokens(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", MARK).replace("Ċ", "\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from(CHARACTERS + "  "), max_size=12))
def test_a_run_inside_a_prompt_gets_no_space(kind, text):
    prompts = PromptTokenizer(KINDS[kind])
    want = text.replace(" ", MARK)
    assert tokens(KINDS[kind], prompts.encode(text)) == want
    ids, offsets = prompts.encode_with_offsets(text)
    assert ids == prompts.encode(text)
    assert "".join(text[a:b] for a, b in offsets) == text
    own = KINDS[kind](text, add_special_tokens=False)["input_ids"]
    assert prompts.encode(text, opens=True) == own
    assert prompts.encode_batch([(text, True), (text, False), (text, True)]) == [own, ids, own]


def test_special_strings_stay_text_inside_a_prompt():
    ids = PromptTokenizer(KINDS["prepend"]).encode("a</s>")
    assert KINDS["prepend"].eos_token_id not in ids


@pytest.fixture
def prepending(zoo):
    model = zoo.model(vocab_size=100)
    return Reader(model, _with_names(KINDS["prepend"], 100))


@pytest.mark.parametrize("kind", legacy.RELEASED)
def test_xrag_keeps_the_tokens_around_its_slots(zoo, kind):
    rows = len(legacy.tokenizer(kind)) + 10
    reader = Reader(zoo.model(vocab_size=rows), _with_names(legacy.tokenizer(kind), rows))
    passage = reader.identity("a")
    assert passage.slots == 1
    prompt = xrag_prompt(reader, [passage], "who?")
    text = XRAG_TEMPLATE.format(background="<xRAG>", question="who?")
    want = legacy.spelled(kind, text, tokenizer=reader.tokenizer)
    slot = reader.tokenizer.convert_tokens_to_ids("<xRAG>")
    (plan,) = reader.plan([prompt])
    assert [slot if kind == 1 else i for i, kind in zip(plan.ids, plan.kinds)] == [*reader.bos_ids, *want]
    pieces = reader.tokenizer.convert_ids_to_tokens(want)
    assert pieces[: pieces.index("<xRAG>")][-2:] == [":", MARK]  # "Background: " before the first slot


@pytest.mark.parametrize("kind", legacy.KINDS)
def test_a_saved_tokenizer_spells_as_before(tmp_path, kind):
    tokenizer = copy.deepcopy(legacy.tokenizer(kind))
    tokenizer.add_tokens(["<ENC>"], special_tokens=True)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in ("Rivers carry<ENC>sediment", "<ENC> to", "a <s>b"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_slots_first_writes_the_bos_that_the_tokenizer_names(prepending):
    assert prepending.bos_ids == []
    passage = prepending.identity("ab")
    assert slots_first(prepending, [passage], "", bos=True)[-1] == TokenIds((prepending.tokenizer.bos_token_id,))
    prepending.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="has no BOS token"):
        slots_first(prepending, [passage], "", bos=True)


def test_ids_beyond_the_table_are_refused_by_name(zoo):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=zoo.tokenizer().backend_tokenizer, eos_token="</s>")
    tokenizer.add_tokens(["<later>"], special_tokens=True)
    tokenizer.chat_template = "<later>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    last = tokenizer.convert_tokens_to_ids("<later>") - 1
    reader = Reader(zoo.model(vocab_size=last + 1), tokenizer)
    for prompt, options in (("a", {"chat": True}), ([TokenIds((last + 1,))], {}), ([TokenIds((-1,))], {})):
        with pytest.raises(ValueError, match=f"Token ids must lie in 0..{last}"):
            reader.generate([prompt], 1, **options)
    with pytest.raises(ValueError, match="<later>"):
        reader.generate(["a"], 1, chat=True)


@pytest.mark.parametrize("method", ["mean-pool", "icae", "gist", "kv-match", "llmlingua", "selective-context"])
def test_a_text_that_needs_ids_beyond_the_table_is_refused_by_every_method(zoo, method):
    tokenizer = copy.deepcopy(zoo.tokenizer())
    tokenizer.add_tokens(["treaty"])
    reader = Reader(zoo.model(vocab_size=len(tokenizer) - 1), tokenizer)
    compressor = make_compressor(method, reader).eval()
    assert compressor.compress(["Rivers carry sediment."])
    with pytest.raises(ValueError, match=rf"0\.\.{len(tokenizer) - 2}.*'treaty' the id {len(tokenizer) - 1}"):
        compressor.compress(["The treaty was signed."])
    with pytest.raises(ValueError, match="treaty"):
        reader.generate(["The treaty"], 1)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentencepiece_model_names_the_extra_or_loads(zoo, tmp_path, monkeypatch, name):
    folder = zoo.saved("llama", tmp_path / "reader")
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(b"\n\x0e\n\x07<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr("nutgraf.compressors.reader.loading._installed", lambda module: module == "sentencepiece")
    with pytest.raises(ImportError, match=r"protobuf.*nutgraf\[sentencepiece\]"):
        Reader.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(Exception, match="tokenizer"):
        load_tokenizer(str(folder))


def test_a_sentencepiece_model_is_converted(zoo, tmp_path):
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "text").write_text("\n".join(zoo.CORPUS))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm"), vocab_size=300, model_type="bpe"
    )
    folder = zoo.saved("llama", tmp_path / "reader")
    (folder / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "spm.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    reader = Reader.from_pretrained(folder)
    slow = spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    text = "The treaty was signed in 1648."
    assert reader.prompts.encode(text, opens=True) == slow.encode(text)
    assert torch.is_tensor(reader.target_logits(["a"], ["b"])[0])
