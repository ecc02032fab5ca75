"""Readers by the sizes of published models, with random weights.

Speed and memory do not depend on the values of weights. The answers mean nothing, and every row says so (`weights`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compressors.core.shipped import PRETRAINED
from .costs import DecoderShape, decoder_shape

if TYPE_CHECKING:
    from ...compressors import Reader

_LLAMA = {"rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _llama(
    hidden: int, mlp: int, layers: int, heads: int, kv: int, head: int, vocab: int, tied: bool
) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": _llama(2048, 8192, 16, 32, 8, 64, 128256, True),  # Llama 3.2 1B
    "llama-3b": _llama(3072, 8192, 28, 24, 8, 128, 128256, True),  # Llama 3.2 3B
    "llama-8b": _llama(4096, 14336, 32, 32, 8, 128, 128256, False),  # Llama 3.1 8B
    "llama-tiny": _llama(64, 160, 2, 4, 2, 16, 8192, True),  # for tests
    "llama-mini": _llama(256, 768, 5, 4, 2, 64, 8192, True),  # the shipped reader's
}


def shape_config(name: str) -> Any:
    """The Hugging Face config of a shape. Raises ValueError for a name that is none."""
    if name not in SHAPES:
        raise ValueError(f"There is no shape {name!r}; known are {', '.join(SHAPES)}.")
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[name], rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


def find_shape(name: str) -> DecoderShape:
    """The shape of a reader named by a shape, a shipped reader, a folder, a `config.json` or a hub id; reads no weights.

    Raises ValueError if there is no such config, or its architecture's cost is unknown.
    """
    if name in SHAPES:
        return decoder_shape(shape_config(name), name)
    from transformers import AutoConfig

    path = Path(name)
    shipped = PRETRAINED / name
    if "/" not in name and not path.exists() and (shipped / "config.json").is_file():
        path = shipped
    elif not path.exists() and name.count("/") != 1:
        raise ValueError(
            f"{name!r} is no reader: give a shape ({', '.join(SHAPES)}), a shipped reader, a folder with a config.json, "
            "such a file, or a hub id OWNER/NAME."
        )
    try:
        config = AutoConfig.from_pretrained(str(path) if path.exists() else name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The config of {name!r} cannot be read: {error}") from error
    return decoder_shape(config, path.name if path.is_dir() else name)


def random_reader(name: str, *, device: str = "cpu", dtype: str = "auto", seed: int = 0) -> Reader:
    """A reader of a shape with random weights, made on the device, with the shipped reader's tokenizer.

    `dtype` `auto` is bfloat16 on CUDA, else float32. Raises ValueError for an unknown shape or dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ...compressors import Reader, pretrained
    from ..loading import pick_device, torch_dtype

    config = shape_config(name)
    device = pick_device(device)
    kind: Any = torch.bfloat16 if dtype == "auto" and device.startswith("cuda") else torch_dtype(dtype, device)
    if not isinstance(kind, torch.dtype):
        kind = torch.float32
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
    tokenizer = AutoTokenizer.from_pretrained(pretrained("reader-small"))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{name!r} has {config.vocab_size} rows for a tokenizer of {len(tokenizer)} entries.")
    reader = Reader(model, tokenizer, name=f"{name}-random")
    # hashing gigabytes of random numbers would take longer than the timing
    vars(reader.identity_card)["fingerprint"] = f"random-{name}-{seed}"
    return reader
