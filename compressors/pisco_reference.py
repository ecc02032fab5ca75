"""PISCO and COCOM as their authors' code reads: the chat prompts around the slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from .tokenization import TokenIds

if TYPE_CHECKING:
    from .passage import CompressedPassage
    from .reader import Reader

SYSTEM = (
    "You are a helpful assistant. Your task is to extract relevant information from provided documents "
    "and to answer to questions as briefly as possible."
)
SEPARATOR = "<SEP>"


def pisco_prompt(
    reader: Reader,
    passages: Sequence[CompressedPassage],
    question: str,
    *,
    form: Literal["2025", "2026"] = "2026",
    system: str | None = SYSTEM,
    **template: Any,
) -> list[Any]:
    """The prompt of the authors' code, as `Reader` takes it (no ``chat=True``: the chat template is applied here).

    ==========  ==========================================================================================
    form        user message
    ==========  ==========================================================================================
    ``"2026"``  ``"\\n\\nBackground:Document 0:[slots]Document 1:[slots]...\\n Question: [question]"``
    ``"2025"``  ``"Background:\\n[slots]<SEP>[slots]<SEP>...\\n\\nQuestion:[question]"`` (PISCO v1 and COCOM)
    ==========  ==========================================================================================

    Args:
        reader: the compressor's reader.
        passages: the documents.
        question: the question.
        form: of the authors' code.
        system: the system message, or ``None``; a template that knows none gets it in front of the user's message.
        template: options of the chat template (``enable_thinking`` is off unless given).

    Raises:
        ValueError: for another form, or a tokenizer without chat template.
    """
    content: list[Any]
    if form == "2026":
        content = ["\n\nBackground:"]
        for i, passage in enumerate(passages):
            content += [f"Document {i}:", passage]
        content.append(f"\n Question: {question}")
    elif form == "2025":
        separator = reader.tokenizer.get_vocab().get(SEPARATOR)
        content = ["Background:\n"]
        for passage in passages:
            content += [passage] if separator is None else [passage, TokenIds((separator,))]
        content.append(f"\n\nQuestion:{question}")
    else:
        raise ValueError(f"form must be '2025' or '2026', got {form!r}.")
    options = {"enable_thinking": False, **template}
    try:
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [system]})
        atoms = reader.prompts.render_chat(messages, **options)
    except Exception as error:  # templates raise errors of their own
        if system is None or "role" not in str(error):
            raise
        atoms = reader.prompts.render_chat([{"role": "user", "content": [f"{system}\n", *content]}], **options)
    return [TokenIds(()), *atoms]  # the template writes BOS itself, where there is one
