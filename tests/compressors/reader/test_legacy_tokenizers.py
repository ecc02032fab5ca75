"""Tokenizers that put a space before every text: runs inside a prompt, and the tokens around added ones."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nutgraf import Reader
from nutgraf.compressors.importers.prompts import XRAG_TEMPLATE, slots_first, xrag_prompt
from nutgraf.compressors.importers.xrag import _with_names
from nutgraf.compressors.reader.loading import load_tokenizer
from nutgraf.compressors.reader.tokenization import PromptTokenizer, TokenIds
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:.?[]/\n"
MARK = "▁"


def build(kind):
    """A tokenizer of single characters with an underline for a space."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", MARK, "Ġ", "Ċ", *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    always = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    prepend = normalizers.Prepend(MARK)
    spaces = normalizers.Replace(" ", MARK)
    if kind == "metaspace":
        backend.pre_tokenizer = always
    elif kind == "metaspace in a sequence":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), always])
        backend.pre_tokenizer = pre_tokenizers.Sequence([always, pre_tokenizers.Digits()])
    elif kind == "prepend":
        backend.normalizer = normalizers.Sequence([prepend, spaces])
    elif kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS = {kind: build(kind) for kind in ("metaspace", "metaspace in a sequence", "prepend", "bytes")}


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
def legacy(zoo):
    model = zoo.model(vocab_size=100)
    return Reader(model, _with_names(KINDS["prepend"], 100))


@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
def test_xrag_keeps_the_tokens_around_its_slots(zoo, kind):
    reader = Reader(zoo.model(vocab_size=100), _with_names(KINDS[kind], 100))
    tokenizer = reader.tokenizer
    passage = reader.identity("ab")
    prompt = xrag_prompt(reader, [passage], "who?")
    held = [tokens(tokenizer, atom.ids) for atom in prompt if isinstance(atom, TokenIds)]
    background, rest = XRAG_TEMPLATE.replace(" ", MARK).replace("{question}", "who?").split("{background}")
    between = MARK if kind == "metaspace" else 2 * MARK  # a normalizer puts one before a space too
    assert held == [MARK + background, between, MARK + rest]
    spelled = XRAG_TEMPLATE.format(background="<xRAG> <xRAG>", question="who?")
    slot = tokenizer.convert_tokens_to_ids("<xRAG>")
    (plan,) = reader.plan([prompt])
    assert [slot if kind == 1 else i for i, kind in zip(plan.ids, plan.kinds)] == tokenizer(spelled)["input_ids"]


def test_slots_first_writes_the_bos_that_the_tokenizer_names(legacy):
    assert legacy.bos_ids == []
    passage = legacy.identity("ab")
    assert slots_first(legacy, [passage], "", bos=True)[-1] == TokenIds((legacy.tokenizer.bos_token_id,))
    legacy.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="has no BOS token"):
        slots_first(legacy, [passage], "", bos=True)


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
