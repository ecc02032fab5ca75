"""Prompt templates for training, evaluation and answering.

One function makes the teacher's and the student's prompt. The context is a list of pieces, each a text or a
`CompressedPassage`; the prompt is the list of the same pieces with the text around them, as `Reader` takes it.

Example:
    >>> question_prompt(["It rained in Bergen."], "Where did it rain?")
    ['It rained in Bergen.', '\\n\\nQuestion: Where did it rain?\\nAnswer:']
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...compressors import CompressedPassage

Piece = str | CompressedPassage
Prompt = list[Piece]

SEPARATOR = "\n\n"
QUESTION = "Question: {question}\nAnswer:"
REPEAT = "\nRepeat the passage:\n"
SPAN = "\nGo on with the passage from these words:\n"
INSTRUCTION = "Question:"
UNANSWERABLE = " unanswerable"
# LlamaIndex's default prompts. A test compares them with the installed llama-index, which training does not need.
LLAMA_INDEX_QA = (
    "Context information is below.\n"
    "---------------------\n"
    "{context_str}\n"
    "---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\n"
    "Query: {query_str}\n"
    "Answer: "
)
LLAMA_INDEX_REFINE = (
    "The original query is as follows: {query_str}\n"
    "We have provided an existing answer: {existing_answer}\n"
    "We have the opportunity to refine the existing answer (only if needed) with some more context below.\n"
    "------------\n"
    "{context_msg}\n"
    "------------\n"
    "Given the new context, refine the original answer to better answer the query. "
    "If the context isn't useful, return the original answer.\n"
    "Refined Answer: "
)

# Prompts between a passage and its restatement; the first one is the autoencoding prompt.
PARAPHRASE = (
    REPEAT,
    "\nIn other words:\n",
    "\nWhat this passage says:\n",
    "\nThe same, written out:\n",
    "\nThis stands for the following text:\n",
    "\nWrite down what is described above:\n",
)


def join_context(context: Sequence[Piece], separator: str = SEPARATOR) -> Prompt:
    """Joins pieces with `separator`."""
    joined: Prompt = []
    for piece in context:
        joined += [separator, piece] if joined else [piece]
    return joined


def question_prompt(context: Sequence[Piece], question: str) -> Prompt:
    """Plain format: passages, a blank line, the question, `Answer:`. Without context, only the question."""
    asked = QUESTION.format(question=question)
    return [*join_context(context), SEPARATOR + asked] if context else [asked]


def llama_index_prompt(context: Sequence[Piece], question: str) -> Prompt:
    """LlamaIndex's default question template as a completion prompt."""
    head, tail = LLAMA_INDEX_QA.split("{context_str}")
    return [head, *join_context(context), tail.replace("{query_str}", question)]


def autoencoding_prompt(piece: Piece) -> Prompt:
    """Asks for the passage itself."""
    return [piece, REPEAT]


def span_prompt(piece: Piece, lead: str) -> Prompt:
    """Asks for what follows some words of the passage (arXiv 2406.06110)."""
    return [piece, SPAN + lead]


def instruction_prompt(piece: Piece) -> Prompt:
    """Asks for the question that stands at the end of the compressed text, and its answer (arXiv 2406.06110)."""
    return [piece, SEPARATOR + INSTRUCTION]


def paraphrase_prompt(piece: Piece, which: int = 0) -> Prompt:
    """Asks for a restatement of the passage, in one of several wordings (first stage of xRAG, arXiv 2405.13792)."""
    return [piece, PARAPHRASE[which % len(PARAPHRASE)]]


def continuation_prompt(context: Sequence[Piece]) -> Prompt:
    """Only the passages; the target is the text that follows the last one."""
    return join_context(context)


QUESTION_TEMPLATES: dict[str, Callable[[Sequence[Piece], str], Prompt]] = {
    "plain": question_prompt,
    "llama_index": llama_index_prompt,
}
