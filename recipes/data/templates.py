"""The prompts that readers are trained on, that compressors are trained with and that answers are asked for with.

One function serves teacher and student: the context is a list of pieces, each a text or a `CompressedPassage`, and the
prompt that comes out is a list of the same pieces and the text around them, as `Reader` takes it.

Example:
    >>> question_prompt(["It rained in Bergen."], "Where did it rain?")
    ['It rained in Bergen.', '\\n\\nQuestion: Where did it rain?\\nAnswer:']
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_index.core.prompts.default_prompts import DEFAULT_REFINE_PROMPT_TMPL, DEFAULT_TEXT_QA_PROMPT_TMPL

from ...compressors import CompressedPassage
from . import prompts as reader_prompts

Piece = str | CompressedPassage
Prompt = list[Piece]

SEPARATOR = reader_prompts.JOIN
QUESTION = reader_prompts.NO_CONTEXT
REPEAT = reader_prompts.REPEAT
UNANSWERABLE = " " + reader_prompts.UNANSWERABLE
LLAMAINDEX_QA = DEFAULT_TEXT_QA_PROMPT_TMPL
LLAMAINDEX_REFINE = DEFAULT_REFINE_PROMPT_TMPL

# What may stand between a passage and its restatement; the first is what `REPEAT` asks for.
PARAPHRASE = (
    REPEAT,
    "\nIn other words:\n",
    "\nWhat this passage says:\n",
    "\nThe same, written out:\n",
    "\nThis stands for the following text:\n",
    "\nWrite down what is described above:\n",
)


def join_context(context: Sequence[Piece], separator: str = SEPARATOR) -> Prompt:
    """The pieces with `separator` between them."""
    joined: Prompt = []
    for piece in context:
        joined += [separator, piece] if joined else [piece]
    return joined


def question_prompt(context: Sequence[Piece], question: str) -> Prompt:
    """The plain format: passages, a blank line, the question, `Answer:`. Without context, the question alone."""
    asked = QUESTION.format(question=question)
    return [*join_context(context), SEPARATOR + asked] if context else [asked]


def llama_index_prompt(context: Sequence[Piece], question: str) -> Prompt:
    """LlamaIndex's default question template as a completion prompt."""
    head, tail = LLAMAINDEX_QA.split("{context_str}")
    return [head, *join_context(context), tail.replace("{query_str}", question)]


def autoencoding_prompt(piece: Piece) -> Prompt:
    """Asks the reader to repeat a passage; the target is the passage."""
    return [piece, REPEAT]


def paraphrase_prompt(piece: Piece, which: int = 0) -> Prompt:
    """Asks for what a passage says, in one of several wordings; the target is the passage (xRAG's first stage)."""
    return [piece, PARAPHRASE[which % len(PARAPHRASE)]]


def continuation_prompt(context: Sequence[Piece]) -> Prompt:
    """The passages alone; the target is the text that follows the last one."""
    return join_context(context)


QUESTION_TEMPLATES: dict[str, Callable[[Sequence[Piece], str], Prompt]] = {
    "plain": question_prompt,
    "llama_index": llama_index_prompt,
}
