"""`ServedReader`: a reader behind an HTTP server."""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NoReturn

import httpx
import torch

from ...compressors import Reader
from ...compressors.reader.plan import Prompt, PromptPlan
from ..threads import from_thread
from .call import Call, Texts
from .checks import check_tokenizer, find_joints, find_known_bugs, list_models
from .embeddings import EmbeddingTable
from .errors import KnownBugError, KnownBugWarning, ServingError
from .payload import FORMATS, EngineFormat, Settings
from .transport import Transport

_log = logging.getLogger(__name__)
READER_HEADER = "X-Nutgraf-Reader"


class ServedReader:
    """Reads prompts of strings and compressed passages with a model behind vLLM, SGLang or ``nutgraf serve``. Thread-safe.

    Prompts are laid out and embedded in this process, as by the local `Reader`. The server must run the same weights (for a
    compressor that tunes its reader: the merged tuned weights). It can read passages of ``embeds`` and ``text``, not ``kv``.

    Args:
        base_url: the server's address, such as ``http://localhost:8000/v1``.
        model: the model's name on the server; not needed for SGLang.
        reader: the local `Reader`, or its `EmbeddingTable`, which needs little memory.
        engine: ``"vllm"`` (completions, whole prompts as embeddings; also for ``nutgraf serve``), ``"vllm-chat"`` (chat
            completions with embeddings between text parts) or ``"sglang"``.
        api_key: sent as a bearer token.
        timeout: seconds to wait for a whole answer, or for the next piece of a stream.
        retries: retries after a failed connection, 429 or 5xx.
        backoff: seconds before the first retry; doubled each time.
        concurrency: parallel requests of one `generate`; the server batches them.
        dtype: dtype of the embeddings sent; default: the embedding table's. vLLM since 0.22 casts them to its own;
            ``torch.bfloat16`` halves the request. A server in float16 cannot hold numbers above 65,504.
        fallback: ``"text"``: if the server does not answer a prompt with compressed passages, ask once more with their
            original texts, which each call must then give.
        known_bugs: ``"warn"``, ``"raise"`` or ``"ignore"`` the findings of `find_known_bugs` when passages are first sent. The
            server's tokenizer is then checked too, unless they are ignored.

    Raises:
        ValueError: if an argument is out of range.

    Example::

        reader = ServedReader("http://localhost:8000/v1", "Qwen/Qwen3-8B", EmbeddingTable.of(local_reader))
        reader.generate([[*passages, "\\nQuestion: who signed it?\\nAnswer:"]], max_new_tokens=16)
    """

    def __init__(
        self,
        base_url: str,
        model: str | None,
        reader: Reader | EmbeddingTable,
        *,
        engine: Literal["vllm", "vllm-chat", "sglang"] = "vllm",
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        concurrency: int = 16,
        dtype: torch.dtype | None = None,
        fallback: Literal["text"] | None = None,
        known_bugs: Literal["warn", "raise", "ignore"] = "warn",
    ) -> None:
        if engine not in FORMATS:
            raise ValueError(f"engine must be one of {sorted(FORMATS)}, got {engine!r}.")
        if fallback not in (None, "text") or known_bugs not in ("warn", "raise", "ignore"):
            raise ValueError(
                f"fallback is None or 'text' and known_bugs 'warn', 'raise' or 'ignore', got {fallback=}, {known_bugs=}."
            )
        if model is None and engine != "sglang":
            raise ValueError(f"engine={engine!r} needs the model's name, as the server's /v1/models lists it.")
        if timeout <= 0 or retries < 0 or backoff < 0 or concurrency < 1:
            raise ValueError(
                f"Out of range: {timeout=} (above 0), {retries=} and {backoff=} (at least 0) or {concurrency=} (at least 1)."
            )
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}.")
        self.table = reader if isinstance(reader, EmbeddingTable) else EmbeddingTable.of(reader)
        self.model = model
        self.engine = engine
        self.concurrency = concurrency
        self.fallback = fallback
        self.known_bugs = known_bugs
        self._format: EngineFormat = FORMATS[engine](self.table, dtype or self.table.dtype)
        headers = {READER_HEADER: self.table.fingerprint}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._transport = Transport(base_url.rstrip("/").removesuffix("/v1"), headers, timeout, retries, backoff)
        self._checking = threading.Lock()
        self._checked = False

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A ServedReader holds open connections and is not copied or pickled: make one there with the same arguments, or "
            "share it between threads."
        )

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model or self.table.name

    @property
    def fingerprint(self) -> str:
        """As of the local reader."""
        return self.table.fingerprint

    @property
    def tokenizer(self) -> Any:
        """As of the local reader."""
        return self.table.tokenizer

    @property
    def max_positions(self) -> int | None:
        """Positions of the model for prompt and answer; the server may allow less."""
        return self.table.max_positions

    def served_positions(self) -> int | None:
        """Ask the server for the positions of a prompt and its answer; ``None`` if it does not say."""
        found = [entry.get("max_model_len") for entry in list_models(self._transport) if entry["id"] == self.model]
        return next((n for n in found if isinstance(n, int) and n > 0), None)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text inside a prompt."""
        return self.table.prompts.encode(text)

    def plan(self, prompts: Sequence[Prompt], *, chat: bool = False, **template: Any) -> list[PromptPlan]:
        """Lay prompts out (see `EmbeddingTable.plan`) for `generate` and `stream`; not for ``vllm-chat``."""
        return self.table.plan(prompts, chat=chat, **template)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> ServedReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 32,
        *,
        chat: bool = False,
        stop: str | Sequence[str] | None = None,
        template: Mapping[str, Any] | None = None,
        texts: Sequence[Texts] | None = None,
        **options: Any,
    ) -> list[str]:
        """Return one answer per prompt, in order; greedy by default.

        Args:
            prompts: each a string, a list of strings and compressed passages or, with ``chat``, a list of messages.
            max_new_tokens: longest answer in tokens.
            chat: apply the chat template (``vllm-chat`` always does, on the server).
            stop: a string, or strings, that end an answer; not part of it. OpenAI's format takes four; further ones end the
                answer here.
            template: options of the chat template.
            texts: for each prompt, the original texts of its compressed passages; for ``fallback="text"``.
            options: ``do_sample``, ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``seed`` and penalties.

        Raises:
            ServingError: if the server gives no answer; the subclass says why.
            ReaderMismatchError: if a passage is for another reader, or the server of slots has another tokenizer.
            ValueError: if a passage cannot be sent, or an option is unknown.
        """
        calls = _calls(prompts, max_new_tokens, chat, stop, template, texts, options)
        if len(calls) <= 1:
            return [self._answer(call) for call in calls]
        with ThreadPoolExecutor(min(self.concurrency, len(calls)), "nutgraf-served") as pool:
            asked = [pool.submit(self._answer, call) for call in calls]
            try:
                return [future.result() for future in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 32,
        *,
        chat: bool = False,
        stop: str | Sequence[str] | None = None,
        template: Mapping[str, Any] | None = None,
        texts: Texts | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Stream one answer; arguments as for `generate`, with ``texts`` of this prompt.

        Raises:
            StreamCutError: if the server ends the stream early.
            ServingError, ValueError: as `generate`; the ``text`` of a ``ServingError`` is the answer so far.
        """
        call = Call(prompt, chat, template or {}, Settings.of(max_new_tokens, stop, options), texts)
        return self._stream(self._request(call), call)

    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 32,
        *,
        chat: bool = False,
        stop: str | Sequence[str] | None = None,
        template: Mapping[str, Any] | None = None,
        texts: Sequence[Texts] | None = None,
        **options: Any,
    ) -> list[str]:
        """`generate` without blocking the event loop. If the task is cancelled, its requests are closed."""
        calls = _calls(prompts, max_new_tokens, chat, stop, template, texts, options)
        free = asyncio.Semaphore(self.concurrency)

        async def answer(call: Call) -> str:
            async with free:
                return await self._aanswer(client, call)

        async with self._transport.connect() as client:
            asked = [asyncio.ensure_future(answer(call)) for call in calls]
            try:
                return list(await asyncio.gather(*asked))
            finally:
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)

    def astream(self, prompt: Prompt, max_new_tokens: int = 32, **options: Any) -> AsyncIterator[str]:
        """`stream` in a worker thread; its request is closed after the next piece when the iterator is closed."""
        return from_thread(lambda: self.stream(prompt, max_new_tokens, **options))

    async def _aanswer(self, client: httpx.AsyncClient, call: Call) -> str:
        path, post = self._format.path, self._transport.apost
        request = await asyncio.to_thread(self._request, call)
        try:
            if request is not None:
                return call.cut(self._format.answer(await post(client, path, request)))
        except ServingError as error:
            if not self._falls_back(call, error):
                raise
        plain = await asyncio.to_thread(self._body, call.as_text())
        return call.cut(self._format.answer(await post(client, path, plain, retries=0)))

    def _answer(self, call: Call) -> str:
        request = self._request(call)
        try:
            if request is not None:
                return call.cut(self._format.answer(self._transport.post(self._format.path, request)))
        except ServingError as error:
            if not self._falls_back(call, error):
                raise
        plain = self._body(call.as_text())
        return call.cut(self._format.answer(self._transport.post(self._format.path, plain, retries=0)))

    def _stream(self, request: dict[str, Any] | None, call: Call) -> Iterator[str]:
        text = ""
        try:
            if request is not None:
                for piece in call.cut_stream(self._format.pieces(self._transport.stream(self._format.path, request))):
                    text += piece
                    if piece:
                        yield piece
                return
        except ServingError as error:
            if text or not self._falls_back(call, error):  # pieces already given cannot be taken back
                error.text = text
                raise
        plain = self._body(call.as_text())
        for piece in call.cut_stream(self._format.pieces(self._transport.stream(self._format.path, plain, retries=0))):
            if piece:
                yield piece

    def _request(self, call: Call) -> dict[str, Any] | None:
        """Make the request's body; ``None`` if only the fallback to text is possible."""
        held = call.passages
        if self.fallback and held and call.texts is None:
            raise ValueError(
                "fallback='text' needs the original texts of the prompt's compressed passages: pass texts=..."
            )
        if self.fallback and any(passage.interface == "kv" for passage in held):
            _log.warning("A passage is keys and values, which cannot be sent; the prompt is read as text.")
            return None
        request = self._body(call)
        if call.has_slots:
            try:
                self._check_server()
            except KnownBugError as error:
                if not self._falls_back(call, error):
                    raise
                return None
        return request

    def _body(self, call: Call) -> dict[str, Any]:
        body = self._format.body(call.prompt, call.chat, call.template, call.settings)
        return body if self.engine == "sglang" else {"model": self.model, **body}

    def _falls_back(self, call: Call, error: ServingError) -> bool:
        if self.fallback is None or not call.passages:
            return False
        _log.warning("The compressed passages are read as text: %s", error)
        return True

    def _check_server(self) -> None:
        with self._checking:
            if self._checked or self.known_bugs == "ignore":
                return
            check_tokenizer(self._transport, self.model, self.table.tokenizer, self.table.name)
            found = find_known_bugs(self._transport, self.engine, self.model)
            if self.engine == "vllm-chat":
                found += find_joints(self._transport, self.table.tokenizer)
            if found and self.known_bugs == "raise":
                raise KnownBugError(" ".join(found))
            self._checked = True
        for sentence in found:
            warnings.warn(sentence, KnownBugWarning, stacklevel=4)


def _calls(
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    chat: bool,
    stop: str | Sequence[str] | None,
    template: Mapping[str, Any] | None,
    texts: Sequence[Texts] | None,
    options: Mapping[str, Any],
) -> list[Call]:
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got one string; write [prompt].")
    settings = Settings.of(max_new_tokens, stop, options)
    if isinstance(texts, str):
        raise TypeError("texts must be a list of lists of texts, one per prompt, got one string.")
    given = [None] * len(prompts) if texts is None else list(texts)
    if len(given) != len(prompts):
        raise ValueError(f"texts must have one list per prompt: got {len(given)} for {len(prompts)} prompts.")
    return [Call(prompt, chat, template or {}, settings, own) for prompt, own in zip(prompts, given)]
