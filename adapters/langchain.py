"""LangChain: a document compressor, an LLM and a chat model that read compressed passages.

`CompressedContextDocumentCompressor` (in a ``ContextualCompressionRetriever``, or called directly) replaces the documents'
``page_content``, the chain puts it into its prompt, and `CompressedContextLLM` or `CompressedContextChatModel` reads it. With
a compressor to ``text`` the content is the shorter text, for any LLM. With one to ``embeds`` or ``kv`` it is a placeholder (see
`nutgraf.adapters.placeholders`), and the LLM must be one of these two with the compressor's reader.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from itertools import chain
from typing import Any

try:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
    from langchain_core.documents import Document
    from langchain_core.documents.compressor import BaseDocumentCompressor
    from langchain_core.language_models import LLM, BaseChatModel
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage, HumanMessage, SystemMessage
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, GenerationChunk
except ImportError as error:  # an extra of the package
    raise ImportError("The LangChain adapter needs langchain-core: pip install 'nutgraf[langchain]'.") from error
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from ..compressors import Compressor
from .checks import check_reader
from .placeholders import PlaceholderStore, read_placeholders
from .placeholders.documents import TextsForReading, count_positions
from .threads import agenerate, astream

_KINDS = ((HumanMessage, "user"), (AIMessage, "assistant"), (SystemMessage, "system"))  # chunks are subclasses
_END = ("",)  # ends every stream: LangChain takes a stream without pieces for a failure, but an answer may be empty
_ROLES = {"human": "user", "ai": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class CompressedContextDocumentCompressor(BaseDocumentCompressor):
    """Compresses retrieved documents for the LLM; put it last.

    Documents keep their order, id and metadata; the original text is in ``metadata["original_text"]``, or in
    ``metadata["nutgraf_original_text"]`` if the document has an entry of its own of that name. A document that passes twice is
    compressed from its original text.

    Args:
        compressor: compresses the documents' texts.
        ratio: compression ratio L / l; default: the compressor's own.
        max_tokens: the most reader tokens of each shorter text, instead of a ratio (compressors to text).
        query_aware: pass the question to the compressor; default: the compressor's ``query_aware``.
        placeholders: default: the store that all adapters for the reader share.

    Raises:
        TypeError: if ``compressor`` is not a compressor.
        ValueError: if ``ratio`` is below 1, or ``max_tokens`` does not fit.
    """

    _texts: TextsForReading = PrivateAttr()

    def __init__(
        self,
        compressor: Compressor,
        *,
        ratio: float | None = None,
        max_tokens: int | None = None,
        query_aware: bool | None = None,
        placeholders: PlaceholderStore | None = None,
    ) -> None:
        super().__init__()
        self._texts = TextsForReading(
            compressor, ratio=ratio, max_tokens=max_tokens, query_aware=query_aware, placeholders=placeholders
        )

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return copies of the documents with compressed contents.

        Raises:
            ValueError: if the question contains a placeholder.
        """
        contents = self._texts.contents([(document.page_content, document.metadata) for document in documents], query)
        return [
            document.model_copy(update={"page_content": content, "metadata": metadata})
            for document, (content, metadata) in zip(documents, contents)
        ]


class _Reading(BaseModel):
    """Mixin of the two language models: the reader and its options."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    reader: Any = Field(exclude=True)
    max_new_tokens: int = Field(default=256, gt=0)
    options: Mapping[str, Any] = Field(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        check_reader(self.reader)

    def get_num_tokens(self, text: str) -> int:
        """Reader positions of a text; a compressed passage counts as its slots."""
        return count_positions(self.reader, text)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"reader": self.reader.fingerprint, "max_new_tokens": self.max_new_tokens, **self.options}

    def _settings(self, stop: str | list[str] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = {} if stop is None else {"stop": stop}  # a call's own comes before the model's
        return {"max_new_tokens": self.max_new_tokens, **self.options, **kwargs, **given}


class CompressedContextLLM(_Reading, LLM):
    """A reader as a LangChain LLM that reads placeholders as compressed passages.

    Args:
        reader: a `Reader` or a `nutgraf.adapters.openai.ServedReader`.
        max_new_tokens: longest answer in tokens.
        options: passed to the reader's ``generate`` (``do_sample``, ``temperature``, ...).
    """

    @property
    def _llm_type(self) -> str:
        return "nutgraf"

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        read = read_placeholders(prompt, self.reader.fingerprint)
        return self.reader.generate([read], **self._settings(stop, kwargs))[0]

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        read = read_placeholders(prompt, self.reader.fingerprint)
        for piece in chain(self.reader.stream(read, **self._settings(stop, kwargs)), _END):
            chunk = GenerationChunk(text=piece)
            if run_manager:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk

    async def _acall(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        read = read_placeholders(prompt, self.reader.fingerprint)
        return await agenerate(self.reader, read, **self._settings(stop, kwargs))

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        read = read_placeholders(prompt, self.reader.fingerprint)
        async with aclosing(_to_end(astream(self.reader, read, **self._settings(stop, kwargs)))) as pieces:
            async for piece in pieces:
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk


class CompressedContextChatModel(_Reading, BaseChatModel):
    """A reader with a chat template as a LangChain chat model that reads placeholders as compressed passages.

    Takes the arguments of `CompressedContextLLM`.
    """

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if not getattr(self.reader.tokenizer, "chat_template", None):
            raise ValueError(
                "A chat model needs a chat template, and this reader's tokenizer has none; use CompressedContextLLM."
            )

    @property
    def _llm_type(self) -> str:
        return "nutgraf-chat"

    def _settings(self, stop: str | list[str] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {"chat": True, **super()._settings(stop, kwargs)}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        text = self.reader.generate([self._read(messages)], **self._settings(stop, kwargs))[0]
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=text))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for piece in chain(self.reader.stream(self._read(messages), **self._settings(stop, kwargs)), _END):
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        text = await agenerate(self.reader, self._read(messages), **self._settings(stop, kwargs))
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=text))])

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        settings = self._settings(stop, kwargs)
        async with aclosing(_to_end(astream(self.reader, self._read(messages), **settings))) as pieces:
            async for piece in pieces:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk

    def _read(self, messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
        read = []
        for message in messages:
            content = message.content
            parts = [content] if isinstance(content, str) else list(content)
            if other := [p.get("type") for p in parts if isinstance(p, dict) and not isinstance(p.get("text"), str)]:
                raise ValueError(f"The reader reads text and compressed passages, but a message holds {other}.")
            if getattr(message, "tool_calls", None):
                raise ValueError("The reader reads text and compressed passages, but a message holds tool calls.")
            text = "".join(p if isinstance(p, str) else p["text"] for p in parts)
            read.append({"role": _role(message), "content": read_placeholders(text, self.reader.fingerprint)})
        return read


async def _to_end(pieces: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    async with aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            yield piece
    yield _END[0]


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        role = _ROLES.get(message.role.lower())
    else:
        role = next((role for kind, role in _KINDS if isinstance(message, kind)), None)
    if role is None:
        got = getattr(message, "role", message.type)
        raise ValueError(f"The reader takes messages of {sorted(set(_ROLES))}, got one of {got!r}.")
    return role
