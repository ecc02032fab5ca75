"""LlamaIndex LLM whose prompts mix text and compressed passages."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW, DEFAULT_NUM_OUTPUTS
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.response_synthesizers import BaseSynthesizer, get_response_synthesizer

from ...compressors import CompressedPassage, Reader
from ...compressors.reader.checks import check_reads_slots
from ...compressors.reader.generation import stop_strings
from ..checks import check_reader
from ..openai import ServedReader
from ..placeholders import read_placeholders
from ..placeholders.placeholder import ReadingLLM
from ..threads import from_thread, in_thread
from .prompt_helper import SlotAwarePromptHelper
from .reading import Answer, ReaderCall, ReaderRefusedError, check_served

T = TypeVar("T")


class CompressedContextLLM(CustomLLM):
    """A reader as a LlamaIndex LLM that reads placeholders as compressed passages.

    Prompts without placeholders are read as usual. Async methods run the reader in a worker thread. The ``raw`` of a response
    has ``reader_tokens`` (positions of the prompt), ``slots`` and ``passages`` (compressed ones among them),
    ``source_tokens`` (length of their texts), ``ttft_ms`` (to the first text, including the layout of the prompt) and ``ms``.

    Args:
        reader: a `Reader`, or a `nutgraf.adapters.openai.ServedReader` for vLLM's completions, SGLang or ``nutgraf serve``.
        max_new_tokens: longest answer in tokens, kept free in the window. Default: 256, or a quarter of a window of less than
            1,024 positions.
        context_window: positions of a prompt and its answer; default: the reader's ``max_positions``, or what its server
            allows if that is less.
        chat: use the tokenizer's chat template and LlamaIndex's chat prompts.
        stop: a string, or strings, that end an answer; not part of it.
        generation_kwargs: passed to the reader's ``generate`` (``do_sample``, ``temperature``, ``num_beams``, ...).
        kwargs: passed to LlamaIndex's ``LLM`` (``system_prompt``, ``completion_to_prompt``, ``callback_manager``, ...).

    Raises:
        TypeError: if ``reader`` is not a reader.
        ValueError: if ``chat`` is set for a tokenizer without a chat template, a number is out of range, the reader is a
            state-space model that would misread compressed passages, or the settings of a served reader do not fit.
    """

    context_window: int = Field(gt=0, description="Positions of a prompt and its answer.")
    max_new_tokens: int = Field(gt=0, description="Longest answer in tokens.")
    chat_model: bool = Field(default=False, description="Render prompts through the chat template.")
    model_name: str = Field(description="The reader's name.")
    stop: list[str] | None = Field(default=None, description="Strings that end an answer.")
    generation_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of generation.")
    _reader: Reader | ServedReader = PrivateAttr()
    _reading: ReadingLLM = PrivateAttr()

    def __init__(
        self,
        reader: Reader | ServedReader,
        *,
        max_new_tokens: int | None = None,
        context_window: int | None = None,
        chat: bool = False,
        stop: str | Sequence[str] | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_reader(reader)
        if chat and not getattr(reader.tokenizer, "chat_template", None):
            raise ValueError(
                f"chat=True needs a chat template, and the tokenizer of {reader.name!r} has none; "
                "set tokenizer.chat_template, or use chat=False."
            )
        check_served(reader) if isinstance(reader, ServedReader) else check_reads_slots(reader)
        window = context_window or _window(reader)
        if reader.max_positions is not None and window > reader.max_positions:
            raise ValueError(
                f"context_window={window} is more than the {reader.max_positions} positions that {reader.name!r} has."
            )
        if max_new_tokens is None:
            max_new_tokens = min(DEFAULT_NUM_OUTPUTS, max(window // 4, 1))
        if max_new_tokens >= window:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a window of {window} positions."
            )
        super().__init__(
            context_window=window,
            max_new_tokens=max_new_tokens,
            chat_model=chat,
            model_name=reader.name,
            stop=stop_strings(stop) or None,
            generation_kwargs=dict(generation_kwargs or {}),
            **kwargs,
        )
        self._reader = reader
        self._reading = ReadingLLM(reader.fingerprint, window, max_new_tokens)

    @classmethod
    def class_name(cls) -> str:
        return "CompressedContextLLM"

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> CompressedContextLLM:
        """Make an LLM from a ``to_dict`` result and a reader: ``from_dict(data, reader=reader)``."""
        settings = {name: value for name, value in data.items() if name != "model_name"}
        settings["chat"] = settings.pop("chat_model", False)
        return super().from_dict(settings, **kwargs)

    @property
    def metadata(self) -> LLMMetadata:
        """Sizes and names for LlamaIndex."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_new_tokens,
            is_chat_model=self.chat_model,
            model_name=self.model_name,
        )

    def prompt_helper(self, **kwargs: Any) -> SlotAwarePromptHelper:
        """Make a `SlotAwarePromptHelper`, which counts a compressed passage as its slots."""
        return SlotAwarePromptHelper(self._reader, self.context_window, self.max_new_tokens, **kwargs)

    def response_synthesizer(self, response_mode: Any = "compact", **kwargs: Any) -> BaseSynthesizer:
        """Make LlamaIndex's response synthesizer with this LLM and its prompt helper, for ``as_query_engine(...)``."""
        return get_response_synthesizer(
            llm=self, prompt_helper=self.prompt_helper(), response_mode=response_mode, **kwargs
        )

    # -- completing ------------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt. ``kwargs`` override ``max_new_tokens``, ``stop`` and the generation options."""
        return _completion(self._completion_call(prompt, formatted, kwargs).run())

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Stream the answer to a prompt."""
        call = self._completion_call(prompt, formatted, kwargs)
        return (_completion(answer) for answer in call.stream())

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` in a worker thread; ends when the task is cancelled."""
        return _completion(
            await in_thread(lambda stopped: self._completion_call(prompt, formatted, kwargs).run(stopped))
        )

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` in a worker thread."""
        return _in_steps(lambda: self._completion_call(prompt, formatted, kwargs), _completion)

    # -- chatting --------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages, through the chat template if ``chat`` is set, else as a plain prompt."""
        return _reply(self._chat_call(messages, kwargs).run())

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Stream the answer to messages."""
        call = self._chat_call(messages, kwargs)
        return (_reply(answer) for answer in call.stream())

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` in a worker thread; ends when the task is cancelled."""
        return _reply(await in_thread(lambda stopped: self._chat_call(messages, kwargs).run(stopped)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` in a worker thread."""
        return _in_steps(lambda: self._chat_call(messages, kwargs), _reply)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def answer_logprobs(self, prompts: Sequence[str | Sequence[ChatMessage]], answer: str) -> list[float]:
        """Return the log-likelihood in nats of one answer after each prompt, summed over its tokens.

        Args:
            prompts: completion prompts or lists of messages, with or without placeholders; read one at a time.
            answer: the continuation to score.

        Raises:
            ReaderRefusedError: if the answer is empty, or prompt and answer do not fit the window.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, got one string; write [prompt].")
        calls = [
            self._completion_call(prompt, False, {}) if isinstance(prompt, str) else self._chat_call(prompt, {})
            for prompt in prompts
        ]
        return [call.logprob(answer) for call in calls]

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _completion_call(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> ReaderCall:
        if not formatted:
            prompt = self.completion_to_prompt(prompt)  # type: ignore[misc]
        return self._call(lambda: self._read(prompt), self.chat_model and not formatted, kwargs)

    def _chat_call(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> ReaderCall:
        for message in messages:
            if other := [block.block_type for block in message.blocks if not isinstance(block, TextBlock)]:
                raise ReaderRefusedError(f"The reader reads text and compressed passages, but a message holds {other}.")
        if not self.chat_model:
            prompt = self.messages_to_prompt(messages)  # type: ignore[misc]
            return self._call(lambda: self._read(prompt), False, kwargs)
        return self._call(
            lambda: [{"role": m.role.value, "content": self._read(m.content or "")} for m in messages], True, kwargs
        )

    def _read(self, text: str) -> list[str | CompressedPassage]:
        return read_placeholders(text, self._reader.fingerprint)

    def _call(self, make_prompt: Callable[[], list[Any]], chat: bool, kwargs: dict[str, Any]) -> ReaderCall:
        settings = {"max_new_tokens": self.max_new_tokens, "stop": self.stop, **self.generation_kwargs, **kwargs}
        return ReaderCall(self._reader, make_prompt, chat, settings)


def _window(reader: Reader | ServedReader) -> int:
    served = reader.served_positions() if isinstance(reader, ServedReader) else None
    return min((n for n in (reader.max_positions, served) if n is not None), default=DEFAULT_CONTEXT_WINDOW)


def _in_steps(make: Callable[[], ReaderCall], wrap: Callable[[Answer], T]) -> AsyncGenerator[T, None]:
    stopped = threading.Event()
    return from_thread(lambda: (wrap(answer) for answer in make().stream(stopped)), stopped)  # type: ignore[return-value]


def _completion(answer: Answer) -> CompletionResponse:
    return CompletionResponse(text=answer.text, delta=answer.delta, raw=answer.raw)


def _reply(answer: Answer) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=answer.text)
    return ChatResponse(message=message, delta=answer.delta, raw=answer.raw)
