"""Imports LLMLingua-2 checkpoints: any Hugging Face token classifier of two labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from transformers import AutoModelForTokenClassification

from ..core.errors import CheckpointError
from ..core.textfiles import check_strings
from ..reader.loading import save_tokenizer
from ..reader.quiet import quiet_loading
from ..text.llmlingua2 import CLASSIFIER_FOLDER, LLMLingua2Compressor, LLMLingua2Config, LLMLingua2Options
from .layout import MissingOption, Source, load_model_state, peek_json
from .models import build_model, has_tokenizer, load_tokenizer, model_config


def recognises(path: Path) -> bool:
    """Whether the folder holds a token classifier."""
    names = peek_json(path / "config.json").get("architectures") or []
    return any(str(name).endswith("ForTokenClassification") for name in names)


def load(
    source: Source,
    *,
    mode: Literal["fast", "published"] = "published",
    merge: Literal["mean", "first"] = "mean",
    ratio: float = 2.0,
    keep: Sequence[str] = (),
    keep_digits: bool = False,
    drop_consecutive: bool = False,
) -> LLMLingua2Compressor:
    """Imports LLMLingua-2.

    Args:
        source: the folder of a token classifier with its tokenizer; its reader counts the kept tokens.
        mode: ``"published"``: the released threshold per chunk; ``"fast"``: an exact budget over the whole passage.
        merge: a word's probability: the ``"mean"`` of its tokens', or that of its ``"first"``.
        ratio: compression ratio if a call gives none.
        keep: strings that stay, a list (the release's ``force_tokens``); in mode ``"published"`` each is one token.
        keep_digits: words with a digit stay (``force_reserve_digit``).
        drop_consecutive: of adjacent kept strings only the first stays (``"published"``).
    """
    if drop_consecutive and mode != "published":
        raise ValueError(f"drop_consecutive works in mode 'published' alone, got mode={mode!r}.")
    path = source.path
    reader = source.need_reader("is a token classifier, and kept tokens are counted in a reader's")
    if not has_tokenizer(path):
        raise MissingOption(f"{path} holds no tokenizer; put the classifier's tokenizer files beside its weights.")
    settings = source.config()
    config = model_config(settings, path)
    if config.num_labels != 2:
        raise CheckpointError(f"{path} has {config.num_labels} labels; LLMLingua-2 has two, drop and keep.")
    keys = source.keys(load_model_state(path))
    keys.ignore(r"(^|\.)position_ids$", "position ids, which are counted")
    keys.ignore(r"(^|\.)pooler\.", "the pooler, which token classification does not use")
    model = build_model(config, keys.take_all(r""), path, AutoModelForTokenClassification).float().to(source.device)
    chosen = LLMLingua2Config(
        classifier=path.name,
        mode=mode,
        merge=merge,
        ratio=ratio,
        keep=tuple(check_strings("keep", keep)),
        keep_digits=keep_digits,
        published=LLMLingua2Options(drop_consecutive=drop_consecutive),
    )
    try:
        made = LLMLingua2Compressor(chosen, reader, classifier=(model, load_tokenizer(path, source)))
        if keep and mode == "published":
            _ = made.published  # refuses strings of several tokens
        return made
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def write_extras(compressor: LLMLingua2Compressor, folder: Path) -> None:
    """Saves the classifier in the compressor's folder."""
    model, tokenizer = compressor.words.frozen, compressor.words.pieces.tokenizer
    with quiet_loading():
        model.save_pretrained(folder / CLASSIFIER_FOLDER)
        save_tokenizer(tokenizer, folder / CLASSIFIER_FOLDER)
