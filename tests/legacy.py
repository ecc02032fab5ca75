"""Tokenizers that put a space before every text, of the kinds that released checkpoints come with."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import zoo
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:.,;?!()[]/\n"
MARK = "▁"
KINDS = ("metaspace", "metaspace in a sequence", "prepend", "bytes", "sentencepiece")
RELEASED = ("metaspace", "prepend", "sentencepiece")


@functools.cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of a kind: of single characters with an underline for a space, or trained by SentencePiece."""
    if kind == "sentencepiece":
        return _from_sentencepiece()
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", MARK, "Ġ", "Ċ", *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    always = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    if kind == "metaspace":
        backend.pre_tokenizer = always
    elif kind == "metaspace in a sequence":
        backend.pre_tokenizer = pre_tokenizers.Sequence([always, pre_tokenizers.Digits()])
    elif kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    elif kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@functools.cache
def sentencepiece() -> Any:
    """SentencePiece's own processor of the model behind `tokenizer("sentencepiece")`."""
    import sentencepiece as spm

    folder = Path(tempfile.mkdtemp())
    (folder / "text").write_text("\n".join(zoo.CORPUS))
    spm.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spm"),
        vocab_size=560,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_file=str(folder / "spm.model")), folder / "spm.model"


def spelled(kind: str, text: str, *, tokenizer: Any = None) -> list[int]:
    """Ids of a text, with its special tokens as such: by SentencePiece itself each part between them, spelled on its own.

    ``tokenizer`` is one of the kind with more special tokens.
    """
    found = tokenizer or globals()["tokenizer"](kind)
    if kind != "sentencepiece":
        return found(text, add_special_tokens=False)["input_ids"]
    processor, specials = sentencepiece()[0], sorted(found.get_added_vocab())
    parts = re.split("(" + "|".join(map(re.escape, specials)) + ")", text)
    return [
        i
        for part in parts
        if part
        for i in ([found.convert_tokens_to_ids(part)] if part in specials else processor.encode(part))
    ]


@functools.cache
def _from_sentencepiece() -> Any:
    from nutgraf.compressors.reader.loading import load_tokenizer

    folder = Path(tempfile.mkdtemp())
    shutil.copy(sentencepiece()[1], folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    return load_tokenizer(str(folder))
