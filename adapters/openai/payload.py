"""Request and response formats of the three APIs that take prompt embeddings.

* vLLM, ``/v1/completions``: ``prompt_embeds`` is the base64 of a ``torch.save`` file with a ``[tokens, width]`` tensor.
* vLLM, ``/v1/chat/completions``: content parts ``{"type": "prompt_embeds", "data": <base64>}`` between text parts; the
  server applies the chat template.
* SGLang, ``/generate``: ``input_embeds``, the rows as lists of numbers.

Prompts without slots are sent as token ids if the format allows, so that they are tokenised as by the local reader.
"""

from __future__ import annotations

import base64
import io
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compressors import CompressedPassage
from ...compressors.reader.generation import stop_strings
from ...compressors.reader.plan import PromptPlan, merge_atoms
from ...compressors.reader.tokenization import check_messages, clean
from .embeddings import EmbeddingTable
from .errors import RequestRefusedError, ServerFaultError, UnexpectedAnswerError

MOST_STOP = 4  # stop strings of a request in OpenAI's format
_OWN_TEMPLATE_OPTIONS = {"add_generation_prompt", "continue_final_message"}  # vLLM's own parameters
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def encode_tensor(embeds: Tensor) -> str:
    """Encode one dense CPU tensor as the base64 of a ``torch.save`` file."""
    file = io.BytesIO()
    torch.save(embeds.detach().cpu().contiguous().clone(), file)  # a view would be saved with its whole storage
    return base64.b64encode(file.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Settings:
    """Options of an answer: longest length in tokens, stop strings, and sampling options (temperature 0: greedy)."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Mapping[str, Any]

    @property
    def late_stop(self) -> tuple[str, ...]:
        """The stop strings beyond those that OpenAI's format takes."""
        return self.stop[MOST_STOP:]

    @classmethod
    def of(cls, max_new_tokens: int, stop: str | Sequence[str] | None, options: Mapping[str, Any]) -> Settings:
        """Check the options of a call. Raises ``ValueError`` for options that serving engines do not have."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        given = {name: value for name, value in options.items() if value is not None}
        sample = given.pop("do_sample", "temperature" in given)
        if unknown := sorted(given.keys() - set(SAMPLING)):
            raise ValueError(f"A serving engine has no options {unknown}; it has do_sample and {sorted(SAMPLING)}.")
        sampling = {**given, "temperature": float(given.get("temperature", 1.0)) if sample else 0.0}
        return cls(max_new_tokens, tuple(stop_strings(stop)), sampling)


class EngineFormat(ABC):
    """Request and response format of one engine."""

    path: str

    def __init__(self, table: EmbeddingTable, dtype: torch.dtype) -> None:
        self.table = table
        self.dtype = dtype

    @abstractmethod
    def body(self, prompt: Any, chat: bool, template: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        """Make the JSON body of a request, without model and stream flag."""

    @abstractmethod
    def answer(self, reply: Any) -> str:
        """Return the text of a reply."""

    def pieces(self, events: Iterable[Any]) -> Iterator[str]:
        """Yield the pieces of text in the events of a stream."""
        for event in events:
            if event.get("choices") and _is_first(event):
                yield self.answer(event)


class VLLMCompletions(EngineFormat):
    """vLLM's completions with ``prompt_embeds``, also understood by ``nutgraf serve``."""

    path = "/v1/completions"

    def body(self, prompt: Any, chat: bool, template: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        plan = _plan(self.table, prompt, chat, template)
        body = _openai_options(settings)
        if not plan.soft:
            return {"prompt": plan.ids, **body}
        # Without "prompt": vLLM takes one, also an empty one, for a second prompt.
        return {"prompt_embeds": encode_tensor(_cast(self.table.embed(plan), self.dtype)), **body}

    def answer(self, reply: Any) -> str:
        return _text(_choice(reply).get("text"))


class VLLMChat(EngineFormat):
    """vLLM's chat completions with ``prompt_embeds`` parts.

    Each prompt with slots has a cache salt of its own, because vLLM may mix up cached prefixes of chats with embeddings (vLLM
    issue 56655). vLLM tokenises each text part, recognises special tokens in texts and, for models whose template takes
    strings, joins parts by newlines. If that matters, use completions with ``chat=True``, which apply the template here.
    """

    path = "/v1/chat/completions"

    def body(self, prompt: Any, chat: bool, template: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        if isinstance(prompt, PromptPlan):
            raise ValueError("engine='vllm-chat' takes messages, not a planned prompt; use engine='vllm'.")
        atoms: list[Any] = [prompt] if isinstance(prompt, str | CompressedPassage) else list(prompt)
        messages: list[Any] = atoms if atoms and isinstance(atoms[0], dict) else [{"role": "user", "content": atoms}]
        check_messages(messages)
        body: dict[str, Any] = {"messages": [{**m, "content": self._content(m["content"])} for m in messages]}
        options = dict(template)
        for name in _OWN_TEMPLATE_OPTIONS & options.keys():
            body[name] = options.pop(name)
        if options:
            body["chat_template_kwargs"] = options
        if any(isinstance(message["content"], list) for message in body["messages"]):  # texts alone are a string
            body["cache_salt"] = secrets.token_hex(16)
        return {**body, **_openai_options(settings)}

    def _content(self, content: Any) -> Any:
        parts: list[dict[str, Any]] = []
        for atom in merge_atoms([content] if isinstance(content, str | CompressedPassage) else content):
            if isinstance(atom, str):
                parts.append({"type": "text", "text": clean(atom)})
            elif isinstance(atom, CompressedPassage):
                self.table.check(atom)
                parts.append({"type": "prompt_embeds", "data": encode_tensor(_cast(atom.embeds, self.dtype))})
            else:
                raise TypeError(f"A message holds strings and compressed passages, got {type(atom).__name__}.")
        if not any(part["type"] == "prompt_embeds" for part in parts):
            return "".join(part["text"] for part in parts)
        return parts

    def answer(self, reply: Any) -> str:
        return _text((_choice(reply).get("message") or {}).get("content") or "")

    def pieces(self, events: Iterable[Any]) -> Iterator[str]:
        for event in events:
            if event.get("choices") and _is_first(event):
                yield _text((_choice(event).get("delta") or {}).get("content") or "")


class SGLangGenerate(EngineFormat):
    """SGLang's ``/generate`` with ``input_embeds``; the server must run with ``--disable-radix-cache``.

    ``seed`` has an effect only if it also runs with ``--enable-deterministic-inference``.
    """

    path = "/generate"

    def body(self, prompt: Any, chat: bool, template: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        plan = _plan(self.table, prompt, chat, template)
        sampling = dict(settings.sampling)
        if "seed" in sampling:
            sampling["sampling_seed"] = sampling.pop("seed")
        params: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, **sampling}
        if settings.stop:
            params["stop"] = list(settings.stop)
        if not plan.soft:
            return {"input_ids": plan.ids, "sampling_params": params}
        return {"input_embeds": _cast(self.table.embed(plan), self.dtype).float().tolist(), "sampling_params": params}

    def answer(self, reply: Any) -> str:
        if not isinstance(reply, dict):
            return _text(None)
        ended = (reply.get("meta_info") or {}).get("finish_reason")
        if isinstance(ended, dict) and ended.get("type") == "abort":  # in a stream SGLang has no other way to say it
            said, status = f"SGLang gave up: {ended.get('message')}", ended.get("status_code")
            if isinstance(status, int) and 400 <= status < 500:
                raise RequestRefusedError(said, status)
            raise ServerFaultError(said, status if isinstance(status, int) else 200)
        return _text(reply.get("text"))

    def pieces(self, events: Iterable[Any]) -> Iterator[str]:
        sent = ""  # SGLang repeats the whole text in each event
        for event in events:
            text = self.answer(event)
            if not text.startswith(sent):
                raise UnexpectedAnswerError(
                    "SGLang's stream does not repeat the text so far with each event; start the server without "
                    "--stream-output (--incremental-streaming-output)."
                )
            yield text[len(sent) :]
            sent = text


FORMATS: dict[str, type[EngineFormat]] = {
    "vllm": VLLMCompletions,
    "vllm-chat": VLLMChat,
    "sglang": SGLangGenerate,
}


def _plan(table: EmbeddingTable, prompt: Any, chat: bool, template: Mapping[str, Any]) -> PromptPlan:
    if not isinstance(prompt, PromptPlan):
        return table.plan([prompt], chat=chat, **template)[0]
    for _, passage in prompt.kv:
        table.check(passage)
    return prompt


def _cast(embeds: Any, dtype: torch.dtype) -> Tensor:
    """Convert to the dtype sent. Raises ``ValueError`` if a number is not finite then; it would spoil other answers too."""
    sent = embeds.to(dtype)
    if not torch.isfinite(sent).all():
        raise ValueError(
            f"Embeddings up to {float(embeds.abs().max()):g} do not fit {str(dtype).removeprefix('torch.')}; make the "
            "ServedReader with dtype=torch.bfloat16 or torch.float32."
        )
    return sent


def _openai_options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": settings.max_new_tokens, **settings.sampling}
    if settings.stop:
        options["stop"] = list(settings.stop[:MOST_STOP])
    return options


def _is_first(event: dict[str, Any]) -> bool:
    """Whether an event belongs to the first answer of its request."""
    return not _choice(event).get("index")


def _choice(reply: Any) -> dict[str, Any]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnexpectedAnswerError(f"The server's answer holds no choices: {reply!r:.300}.")
    return choices[0]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnexpectedAnswerError(f"The server's answer holds {value!r:.100} where its text should be.")
    return value
