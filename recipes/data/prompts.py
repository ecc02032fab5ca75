"""The prompts the small reader is trained on, cut into a shared head, a context and a tail for each question.

A group is one context that many questions share: `head + context` is read once, and every tail (a question and its
answer) sees that context and itself. The texts are those of the PLAIN and CHAT formats and LlamaIndex's default
question and refine templates, taken from llama_index itself, so that what is trained is what is served.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_index.core.prompts.default_prompts import DEFAULT_REFINE_PROMPT_TMPL, DEFAULT_TEXT_QA_PROMPT_TMPL

JOIN = "\n\n"
NO_CONTEXT = "Question: {question}\nAnswer:"
PLAIN_TAIL = JOIN + NO_CONTEXT
REPEAT = "\nRepeat the passage:\n"
UNANSWERABLE = "unanswerable"
QA_HEAD, QA_TAIL = DEFAULT_TEXT_QA_PROMPT_TMPL.replace("{query_str}", "{question}").split("{context_str}")
REFINE = DEFAULT_REFINE_PROMPT_TMPL


@dataclass(frozen=True)
class Format:
    """One prompt format: text before the context, text after it (with `{question}`), and whether it is a chat turn."""

    name: str
    head: str
    tail: str
    chat: bool = False


FORMATS = {
    "plain": Format("plain", "", PLAIN_TAIL),
    "llama_index": Format("llama_index", QA_HEAD, QA_TAIL),
    "chat": Format("chat", "", PLAIN_TAIL, chat=True),
    "chat_llama_index": Format("chat_llama_index", QA_HEAD, QA_TAIL, chat=True),
}


@dataclass
class Branch:
    """A tail that reads the context: `prompt` carries no loss, `answer` does; `kind` says which loss it is logged as."""

    prompt: str
    answer: str
    kind: str = "answer"  # answer | copy


@dataclass
class Group:
    """One context and the branches that read it. `context_kind` is the loss of the context itself (None: no loss)."""

    context: str
    branches: list[Branch] = field(default_factory=list)
    format: Format = FORMATS["plain"]
    context_kind: str | None = None


def refine_prompt(question: str, existing: str, context: str) -> str:
    """LlamaIndex's refine prompt as one string."""
    return REFINE.format(query_str=question, existing_answer=existing, context_msg=context)
