"""The small reader's tokenizer: byte-level BPE with a chat template.

Any byte string round-trips. Line ends are tokens of their own, so prompts joined from pieces split like whole ones. Numbers
are split into groups of at most two digits from the left (` 1963` is ` 19` `63`), so a year is two frequent tokens. Text
encoded with special tokens starts with `<|begin|>`; every answer ends with `<|end|>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..data.corpus import Record, read_documents

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIALS = (BOS, EOS, PAD, *ROLES)

WORDS = r"'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+(?!\S)|[^\S\n]+"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|> ' + message['content'] + eos_token -}}
{%- elif message['role'] in ['user', 'system'] -%}
{{- '<|' + message['role'] + '|>\n' + message['content'] + '\n' -}}
{%- else -%}
{{- raise_exception('This reader knows the roles system, user and assistant, not ' + message['role'] + '.') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192, max_length: int = 4096) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; ValueError if the vocabulary cannot hold the bytes.

    `vocab_size` includes the special tokens and the 256 bytes; `max_length` is the reader's context window.
    """
    if vocab_size < 256 + len(SPECIALS):
        raise ValueError(
            f"vocab_size is {vocab_size}; it must hold 256 bytes and {len(SPECIALS)} special tokens, "
            f"so ask for at least {256 + len(SPECIALS)}."
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer=trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def tokenizer_texts(files: Iterable[Path], records: Iterable[Record], characters: int = 20_000_000) -> Iterator[str]:
    """Training texts of the tokenizer: `characters` of each text file, and every question in its prompt format.

    Questions are repeated, so that words such as `Question`, `Answer` and `Who` become single tokens.
    """
    for path in files:
        left = characters
        for document in read_documents(path):
            yield document
            left -= len(document)
            if left <= 0:
                break
    for record in records:
        yield from [f"\nQuestion: {record.question}\nAnswer:"] * 8
        yield f"{record.gold_text} {' '.join(record.answers)}"
