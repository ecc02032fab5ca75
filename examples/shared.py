"""Shared by the examples: passages, questions, an embedding, a plain LLM for comparison, a table of answers."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nutgraf
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMCompletionEndEvent
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.schema import TextNode
from nutgraf.adapters.llama_index import CompressionEvent, SentenceTransformerEmbedding
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

READER = "reader-smollm2"  # a shipped reader, a folder or a hub id
SOFT = "icae-smollm2"  # a compressor to soft tokens for it, where keys and values cannot be read
SAMPLE = Path(nutgraf.__file__).parent / "benchmarks" / "sample" / "squad_dev.jsonl"
N_PASSAGES, N_QUESTIONS = 12, 4


@functools.cache
def embedding() -> SentenceTransformerEmbedding:
    """The retriever's embedding, loaded once."""
    return SentenceTransformerEmbedding("all-MiniLM-L6-v2")


def _records() -> list[dict[str, Any]]:
    """One question each for evenly spaced passages of the sample."""
    found: dict[str, dict[str, Any]] = {}
    for line in SAMPLE.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["gold"] is not None:
            found.setdefault(record["passages"][record["gold"]]["text"], record)
    records = list(found.values())
    return records[:: max(len(records) // N_PASSAGES, 1)][:N_PASSAGES]


def passages() -> list[TextNode]:
    """Wikipedia paragraphs as LlamaIndex nodes."""
    return [TextNode(text=record["passages"][record["gold"]]["text"]) for record in _records()]


def questions() -> list[str]:
    """A few evenly spaced questions about the passages."""
    records = _records()
    return [record["question"] for record in records[:: max(len(records) // N_QUESTIONS, 1)]][:N_QUESTIONS]


class _FirstToken(BaseStreamer):
    """Milliseconds from now to the first token of an answer."""

    def __init__(self) -> None:
        self.start, self.puts, self.ms = time.perf_counter(), 0, 0.0

    def put(self, value: Any) -> None:
        self.puts += 1
        if self.puts == 2:
            self.ms = (time.perf_counter() - self.start) * 1e3

    def end(self) -> None:
        """Required by the interface."""


class TransformersLLM(CustomLLM):
    """A Hugging Face model as a plain LlamaIndex LLM, without compression."""

    name: str
    max_new_tokens: int = 16
    _model: Any = None
    _tokenizer: Any = None

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        loaded = nutgraf.Reader.from_pretrained(self.name)  # an adapter is merged into its base model
        self._model, self._tokenizer = loaded.model, loaded.tokenizer

    @property
    def metadata(self) -> LLMMetadata:
        window = self._model.config.max_position_embeddings
        return LLMMetadata(context_window=window, num_output=self.max_new_tokens)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        first = _FirstToken()
        inputs = self._tokenizer(prompt, return_tensors="pt")
        out = self._model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=first,
        )
        length = inputs.input_ids.shape[1]
        text = self._tokenizer.decode(out[0, length:], skip_special_tokens=True)
        return CompletionResponse(text=text, raw={"reader_tokens": length, "ttft_ms": first.ms})

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        """The answer in one piece."""
        answer = self.complete(prompt, formatted, **kwargs)
        yield answer.model_copy(update={"delta": answer.text})


@dataclass
class Asked:
    """An answer, the tokens and slots read, and the milliseconds to its first token, compression included."""

    answer: str = ""
    reader_tokens: int = 0
    ttft_ms: float = 0.0


class _Costs(BaseEventHandler):
    asked: Any

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, CompressionEvent):
            self.asked.ttft_ms += event.ms
        elif isinstance(event, LLMCompletionEndEvent):
            raw = event.response.raw
            self.asked.reader_tokens += raw["reader_tokens"] - raw.get("source_tokens", 0) + raw.get("slots", 0)
            self.asked.ttft_ms += raw["ttft_ms"]


def ask(engine: BaseQueryEngine, asked: Sequence[str]) -> list[Asked]:
    """Ask an engine the questions and record their costs from the pipeline's events."""
    answers = []
    for question in asked:
        answers.append(Asked())
        costs = _Costs(asked=answers[-1])
        get_dispatcher().add_event_handler(costs)
        try:
            answers[-1].answer = str(engine.query(question)).strip()
        finally:
            get_dispatcher().event_handlers.remove(costs)
    return answers


def show(asked: Sequence[str], **columns: Sequence[Asked]) -> None:
    """Print answers side by side."""
    table = Table("question", *(name.replace("_", " ") for name in columns))
    for i, question in enumerate(asked):
        cells = [f"{c[i].answer}\n[dim]{c[i].reader_tokens} tokens, {c[i].ttft_ms:.0f} ms[/]" for c in columns.values()]
        table.add_row(question, *cells)
    Console().print(table)
