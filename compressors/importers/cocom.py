"""COCOM and PISCO v1 checkpoints: two LoRA adapters of one decoder, and its embedding rows with <MEM> tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..reader.reader import Reader
from .layout import (
    Keys,
    Source,
    check_state,
    listed,
    load_model_state,
    load_pickle,
    load_tensors,
    need,
    number,
    peek_json,
)
from .models import (
    as_prompt,
    build_model,
    fill_lora,
    graft_rows,
    has_tokenizer,
    load_tokenizer,
    lora_shape,
    make_reader,
    take_lora,
)
from .pisco import PublishedPISCO, PublishedPISCOConfig

ADAPTERS, ROWS = "adapters.pth", "decoder_first_last_layers.pth"
_TYPES = {"COCOM", "PISCO"}
_TASKS = ("<AE>", "<ENC>", "<SEP>")
QUESTIONS = "query_reasoner_adapter"
_HELD = ("encoder_adapter", "decoder_adapter", "default")


def recognises(path: Path) -> bool:
    """Whether it has the layout of COCOM or the first PISCO."""
    if not path.is_dir() or (path / "connector.pt").is_file():
        return False
    return (path / ADAPTERS).is_file() or peek_json(path / "config.json").get("model_type") in _TYPES


def load(
    source: Source,
    *,
    compr_rate: float | None = None,
    doc_max_length: int | None = None,
    different_mem_tokens: bool | None = None,
    lora_alpha: float | None = None,
) -> PublishedPISCO:
    """Imports COCOM or PISCO v1.

    Args:
        source: the folder, with ``adapters.pth`` and ``decoder_first_last_layers.pth`` or the whole decoder's weights; it needs
            the reader (the base decoder).
        compr_rate: source tokens per slot; default: the config's.
        doc_max_length: longest segment; default: the config's, or 128. If the config has it (PISCO v1 and late COCOM), every
            segment gets ``doc_max_length // compr_rate`` slots; else (the first COCOM) a segment of L tokens gets
            ``ceil(L / compr_rate)``. A longer passage becomes several segments; the authors' code cuts it off.
        different_mem_tokens: a <MEMi> per place, and all of them for every segment; default: the config's, or whether the
            tokenizer knows <MEM0>.
        lora_alpha: default: twice the rank, as in the authors' code.
    """
    if light := peek_json(source.path / "config.json").get("compr_model_name"):
        raise CheckpointError(
            f"{source.path} compresses with {light!r} (COCOM-light), which is not supported; only checkpoints whose decoder "
            "compresses are."
        )
    return build(source, compr_rate, doc_max_length, different_mem_tokens, lora_alpha)


def build(
    source: Source,
    compr_rate: float | None,
    doc_max_length: int | None,
    different_mem_tokens: bool | None,
    lora_alpha: float | None,
    held: Sequence[str] = _HELD,
) -> PublishedPISCO:
    """The compressor of a folder in this layout; arguments as of `load`.

    Args:
        held: adapters that ``adapters.pth`` may hold. A ``query_reasoner_adapter`` becomes the encoder of questions.
    """
    path = source.path
    settings = peek_json(path / "config.json")
    base = source.need_reader(f"holds no base decoder (it was trained on {settings.get('decoder_model_name')!r})")
    rate = compr_rate or settings.get("compr_rate")
    rate = number(need(rate, "compr_rate", "how many source tokens a slot stands for", path), "compr_rate", path)
    longest = int(number(doc_max_length or settings.get("doc_max_length") or 128, "doc_max_length", path))
    several = settings.get("different_mem_tokens") if different_mem_tokens is None else different_mem_tokens
    tokenizer = _tokenizer(source, base, several, int(longest // rate))
    known = tokenizer.get_vocab()
    several = "<MEM0>" in known if several is None else bool(several)
    names = [f"<MEM{i}>" for i in range(int(longest // rate))] if several else ["<MEM>"]
    if missing := [name for name in (*names, "<ENC>") if name not in known]:
        raise CheckpointError(f"{path}: the tokenizer lacks {listed(missing)}.")

    if (path / ADAPTERS).is_file():
        reader, adapters = _adapters(source, base, tokenizer, held)
    else:
        reader, adapters = _whole(source, base, tokenizer)
    encoder = adapters.get("encoder_adapter") or next(iter(adapters.values()))
    decoder = adapters.get("decoder_adapter") or next(iter(adapters.values()))
    asker = adapters.get(QUESTIONS)
    rank, targets = lora_shape({**decoder, **encoder}, path)
    ids = [known[name] for name in names]
    if max(ids) >= reader.vocab_size:
        raise CheckpointError(
            f"{path}: {names[-1]} has the id {max(ids)}, but there are {reader.vocab_size} embeddings."
        )
    tok = reader.tokenizer
    prefix = tuple(i for i in (known["<ENC>"], tok.bos_token_id) if i is not None)
    config = PublishedPISCOConfig(
        ratio=rate,
        segment_tokens=longest,
        slots="fixed" if several or settings.get("doc_max_length") else "proportional",
        memory_tokens=len(names),
        connector="none",
        scale="none",
        decoder="lora",
        r=rank,
        alpha=float(lora_alpha or 2 * rank),
        target_modules=tuple(targets),
        prefix=prefix,
        suffix=() if tok.eos_token_id is None else (tok.eos_token_id,),
        as_prompt=as_prompt(reader.prompts, prefix),
        query_encoder=asker is not None,
    )
    compressor = PublishedPISCO(config, reader)
    fill_lora(compressor.encoder, encoder, path)  # type: ignore[arg-type]
    fill_lora(compressor.decoder, decoder, path)  # type: ignore[arg-type]
    if asker is not None:
        fill_lora(compressor.query_encoder, asker, path)  # type: ignore[arg-type]
    with torch.no_grad():
        compressor.memory.copy_(reader.embed(torch.tensor(ids, device=reader.device)))
    return compressor


def _tokenizer(source: Source, base: Reader, several: bool | None, n: int) -> Any:
    """The folder's tokenizer, or the base's with the tokens that the authors' code adds."""
    if has_tokenizer(source.path):
        return load_tokenizer(source.path, source)
    if several is None:
        need(None, "different_mem_tokens", "whether there is one <MEM> token or one for each place", source.path)
    tokenizer = copy.deepcopy(base.tokenizer)
    memory = [f"<MEM{i}>" for i in range(n)] if several else ["<MEM>"]
    extra = ["<KBTC>"] if peek_json(source.path / "config.json").get("kbtc_training") else []
    tokenizer.add_tokens([*memory, *_TASKS, *extra], special_tokens=True)
    return tokenizer


def _adapters(
    source: Source, base: Reader, tokenizer: Any, known: Sequence[str]
) -> tuple[Reader, dict[str, dict[str, Tensor]]]:
    path = source.path / ADAPTERS
    held = load_pickle(path)
    if not isinstance(held, dict) or not held:
        raise CheckpointError(f"{path} must hold a dict of adapters, got {type(held).__name__}.")
    adapters = {}
    for name, state in held.items():
        if name not in known or (name == "default" and len(held) > 1):
            raise CheckpointError(f"{path} holds an adapter {name!r} that is not known; known are {listed(known)}.")
        keys = source.keys(check_state(state, path), path)
        keys.ignore(r"(embed_tokens|lm_head)\.((?!lora_)\w+\.)*weight$", f"embedding rows, which are taken from {ROWS}")
        adapters[str(name)] = take_lora(keys, r"(?:.*?\.)?(?=layers\.)")
        keys.done()
        lora_shape(adapters[str(name)], path)
    file = source.path / ROWS
    keys = source.keys(load_tensors(file), file)
    tied = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    embed, head = _row(keys, "embed_tokens"), _row(keys, "lm_head", optional=tied)
    keys.done()
    return graft_rows(base, source, embed, head, tokenizer), adapters


def _row(keys: Keys, name: str, optional: bool = False) -> Tensor | None:
    """Rows of a module; ``optional``: ``None`` if missing, because tied ones are written once."""
    found = keys.take_all(rf"(?:.*\.)?{name}\.(?=weight$)")
    if not found and not optional:
        raise CheckpointError(f"{keys.where} lacks {name}.weight.")
    return found.get("weight")


def _whole(source: Source, base: Reader, tokenizer: Any) -> tuple[Reader, dict[str, dict[str, Tensor]]]:
    """The reader from the decoder's own weights, and its LoRA."""
    keys = source.keys(load_model_state(source.path))
    names = {part for name in keys if ".lora_" in name for part in [name.split(".lora_")[1].split(".")[1]]}
    adapters = {name: take_lora(keys, r"decoder\.(?:.*?\.)?(?=layers\.)", name) for name in sorted(names)}
    if not adapters:
        raise CheckpointError(f"{source.path} holds no LoRA matrices.")
    state = {n.replace(".base_layer.", "."): t for n, t in keys.take_all(r"decoder\.(?:base_model\.model\.)?").items()}
    keys.done()
    config = copy.deepcopy(base.model.config)
    rows = next((t for n, t in state.items() if n.endswith("embed_tokens.weight")), None)
    if rows is not None:
        config.get_text_config().vocab_size = len(rows)
    return make_reader(build_model(config, state, source.path), tokenizer, source), adapters
