"""Tiny random models of many architectures and a small real tokenizer, for tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CORPUS = [
    "A nut graf is the paragraph that tells the story in a nutshell. It gives the reader the news value of the story.",
    "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe.",
    "Question: who signed it?\nAnswer: the delegates of 109 parties.\n\nContext information is below.\n",
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
    "Given the context information and not prior knowledge, answer the query. Repeat the passage: the passage is here.",
    "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth.",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB = 600

_SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GQA = dict(num_key_value_heads=2, max_position_embeddings=4096)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, **_GQA},
    "mistral": {**_SMALL, **_GQA, "sliding_window": 2048},
    "qwen3": {**_SMALL, **_GQA, "head_dim": 8},
    "gemma3_text": {
        **_SMALL,
        **_GQA,
        "head_dim": 8,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma2": {
        **_SMALL,
        **_GQA,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "sliding_window": 512,
        "attn_implementation": "eager",  # sdpa cannot cap
    },
    "phi3": {**_SMALL, **_GQA},
    "gpt_neox": {**_SMALL, "max_position_embeddings": 4096},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 24,
    },
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 2048},
    "falcon": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "max_position_embeddings": 4096,
    },
    "olmo2": {**_SMALL, **_GQA},
    "mixtral": {**_SMALL, **_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences, with BOS on every prompt and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIALS[3:],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model(architecture: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A tiny random float32 model with weights large enough that positions and slots matter."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[architecture](**{**ARCHITECTURES[architecture], **_TOKENS, **changes})
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in built.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.25 if "embed" not in name and "wte" not in name else 0.5)
    return built.eval()


def reader(architecture: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A `nutgraf.Reader` over a tiny random model."""
    from nutgraf import Reader

    return Reader.from_pretrained(model(architecture, seed, **changes), tokenizer=tokenizer())


def save_encoder(folder: Path) -> None:
    """Writes a tiny random bidirectional encoder and its tokenizer."""
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=160, **small)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def saved(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`folder`, with a tiny random model and its tokenizer in it."""
    model(architecture).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
