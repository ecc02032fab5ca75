"""`ServedReader`: prompts of text and compressed passages, read by a serving engine."""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from ...compressors import CompressedPassage, Reader
from ...compressors.plan import Prompt, PromptPlan
from ..threads import from_thread
from .checks import find_known_bugs
from .embeddings import EmbeddingTable
from .errors import KnownBugError, KnownBugWarning, ServingError, StreamCutError
from .payload import FORMS, Form, Settings
from .transport import Transport

_log = logging.getLogger(__name__)
READER_HEADER = "X-Nutgraf-Reader"
Texts = Sequence[str]


class ServedReader:
    """Reads prompts of strings and compressed passages with a model that vLLM, SGLang or ``nutgraf serve`` runs.

    The prompt is laid out and embedded here, as the local `Reader` does it; the server must run the same weights (for a
    compressor that tunes its reader: the tuned weights, merged). Passages compressed to ``embeds`` and ``text`` can be read;
    keys and values cannot be sent. Safe to share by threads.

    Args:
        base_url: the server's address, as in ``http://localhost:8000/v1``.
        model: the name under which the server knows the model; SGLang needs none.
        reader: the local `Reader`, or its `EmbeddingTable`, which takes little memory.
        engine: ``"vllm"`` (completions, whole prompts as embeddings; also for ``nutgraf serve``), ``"vllm-chat"`` (chat
            completions with embeddings between text parts) or ``"sglang"``.
        api_key: sent as a bearer token.
        timeout: seconds to wait for a whole answer, or for the next piece of a stream.
        retries: further tries when a connection fails, or the server answers 429 or 5xx.
        backoff: seconds before the first of them, then twice as long each time.
        concurrency: requests of one `generate` at a time; the server batches them.
        dtype: of the embeddings that are sent; default: the embedding table's. vLLM wants the dtype that it runs in.
        fallback: ``"text"``: when the server does not answer a prompt with compressed passages, ask once more with the
            passages' own texts, which the call then has to give.
        known_bugs: ``"warn"``, ``"raise"`` or ``"ignore"`` what `find_known_bugs` finds when passages are first sent.

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
        if engine not in FORMS:
            raise ValueError(f"engine must be one of {sorted(FORMS)}, got {engine!r}.")
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
        self._form: Form = FORMS[engine](self.table, dtype or self.table.dtype)
        headers = {READER_HEADER: self.table.fingerprint}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._transport = Transport(base_url.rstrip("/").removesuffix("/v1"), headers, timeout, retries, backoff)
        self._checking = threading.Lock()
        self._checked = False

    # -- facts, as a `Reader` has them -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model or self.table.name

    @property
    def fingerprint(self) -> str:
        """The local reader's."""
        return self.table.fingerprint

    @property
    def tokenizer(self) -> Any:
        """The local reader's."""
        return self.table.tokenizer

    @property
    def max_positions(self) -> int | None:
        """The longest prompt, answer included, that the model's positions allow; the server may allow less."""
        return self.table.max_positions

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text as it stands inside a prompt."""
        return self.table.prompts.encode(text)

    def plan(self, prompts: Sequence[Prompt], *, chat: bool = False, **template: Any) -> list[PromptPlan]:
        """Lays prompts out, see `EmbeddingTable.plan`; `generate` and `stream` take the plans (not with ``vllm-chat``)."""
        return self.table.plan(prompts, chat=chat, **template)

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> ServedReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- answers -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 32,
        *,
        chat: bool = False,
        stop: Sequence[str] | None = None,
        template: Mapping[str, Any] | None = None,
        texts: Sequence[Texts] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers, one a prompt, in order; greedy unless told otherwise.

        Args:
            prompts: each a string, a list of strings and compressed passages or, with ``chat``, a list of messages.
            max_new_tokens: the longest answer, in tokens.
            chat: apply the chat template (``vllm-chat`` always does, on the server).
            stop: strings that end an answer; they are no part of it.
            template: options of the chat template.
            texts: for each prompt the original texts of its compressed passages, in order; for ``fallback="text"``.
            options: ``do_sample``, ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``seed`` and penalties.

        Raises:
            ServingError: if the server gives no answer; its subclasses say why.
            ValueError: if a passage cannot be sent, or an option is unknown.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, got one string; write [prompt].")
        settings = Settings.of(max_new_tokens, stop, options)
        given = [None] * len(prompts) if texts is None else list(texts)
        if len(given) != len(prompts):
            raise ValueError(f"texts must hold one list a prompt: got {len(given)} for {len(prompts)} prompts.")

        def answer(prompt: Prompt, own: Texts | None) -> str:
            return self._answer(prompt, chat, template or {}, settings, own)

        if len(prompts) <= 1:
            return [answer(prompt, own) for prompt, own in zip(prompts, given)]
        with ThreadPoolExecutor(min(self.concurrency, len(prompts)), "nutgraf-served") as pool:
            asked = [pool.submit(answer, prompt, own) for prompt, own in zip(prompts, given)]
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
        stop: Sequence[str] | None = None,
        template: Mapping[str, Any] | None = None,
        texts: Texts | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Pieces of one answer as they come; arguments as for `generate`, ``texts`` for this prompt.

        Raises:
            StreamCutError: if the server ends the stream early; its ``text`` is what had come.
            ServingError, ValueError: as `generate` does.
        """
        settings = Settings.of(max_new_tokens, stop, options)
        request = self._request(prompt, chat, template or {}, settings, texts)
        return self._stream(request, prompt, chat, template or {}, settings, texts)

    async def agenerate(self, prompts: Sequence[Prompt], max_new_tokens: int = 32, **options: Any) -> list[str]:
        """`generate` in a worker thread."""
        return await asyncio.to_thread(self.generate, prompts, max_new_tokens, **options)

    def astream(self, prompt: Prompt, max_new_tokens: int = 32, **options: Any) -> AsyncIterator[str]:
        """`stream` in a worker thread."""
        return from_thread(lambda: self.stream(prompt, max_new_tokens, **options))

    # -- requests ----------------------------------------------------------------------------------------------------

    def _answer(
        self, prompt: Prompt, chat: bool, template: Mapping[str, Any], settings: Settings, texts: Texts | None
    ) -> str:
        request = self._request(prompt, chat, template, settings, texts)
        try:
            if request is not None:
                return self._form.answer(self._transport.post(self._form.path, request))
        except ServingError as error:
            if not self._falls_back(prompt, error):
                raise
        plain = self._body(_with_texts(prompt, texts), chat, template, settings)
        return self._form.answer(self._transport.post(self._form.path, plain, retries=0))

    def _stream(
        self,
        request: dict[str, Any] | None,
        prompt: Prompt,
        chat: bool,
        template: Mapping[str, Any],
        settings: Settings,
        texts: Texts | None,
    ) -> Iterator[str]:
        text = ""
        try:
            if request is not None:
                for piece in self._form.pieces(self._transport.stream(self._form.path, request)):
                    text += piece
                    if piece:
                        yield piece
                return
        except StreamCutError as error:
            if text or not self._falls_back(prompt, error):
                raise StreamCutError(str(error), text) from error
        except ServingError as error:
            if text or not self._falls_back(prompt, error):  # what was given cannot be taken back
                raise
        plain = self._body(_with_texts(prompt, texts), chat, template, settings)
        for piece in self._form.pieces(self._transport.stream(self._form.path, plain, retries=0)):
            if piece:
                yield piece

    def _request(
        self, prompt: Prompt, chat: bool, template: Mapping[str, Any], settings: Settings, texts: Texts | None
    ) -> dict[str, Any] | None:
        """The request's body; ``None`` where the prompt can only be read as text and may be."""
        held = [passage for passage in _passages(prompt) if passage.interface != "text"]
        if self.fallback and held and texts is None:
            raise ValueError(
                "fallback='text' needs the original texts of the prompt's compressed passages: pass texts=..."
            )
        if self.fallback and any(passage.interface == "kv" for passage in held):
            _log.warning("A passage is keys and values, which cannot be sent; the prompt is read as text.")
            return None
        request = self._body(prompt, chat, template, settings)
        if held or (isinstance(prompt, PromptPlan) and prompt.soft):
            try:
                self._check_server()
            except KnownBugError as error:
                if not self._falls_back(prompt, error):
                    raise
                return None
        return request

    def _body(self, prompt: Prompt, chat: bool, template: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        body = self._form.body(prompt, chat, template, settings)
        return body if self.engine == "sglang" else {"model": self.model, **body}

    def _falls_back(self, prompt: Prompt, error: ServingError) -> bool:
        if self.fallback is None or not any(passage.interface != "text" for passage in _passages(prompt)):
            return False
        _log.warning("The compressed passages are read as text: %s", error)
        return True

    def _check_server(self) -> None:
        with self._checking:
            if self._checked or self.known_bugs == "ignore":
                return
            found = find_known_bugs(self._transport, self.engine, self.model)
            if found and self.known_bugs == "raise":
                raise KnownBugError(" ".join(found))
            self._checked = True
        for sentence in found:
            warnings.warn(sentence, KnownBugWarning, stacklevel=4)


def _passages(prompt: Prompt) -> list[CompressedPassage]:
    if isinstance(prompt, CompressedPassage):
        return [prompt]
    if isinstance(prompt, str | PromptPlan):
        return []
    found = []
    for atom in prompt:
        inner = atom.get("content") if isinstance(atom, dict) else atom
        for item in inner if isinstance(inner, list | tuple) else [inner]:
            if isinstance(item, CompressedPassage):
                found.append(item)
    return found


def _with_texts(prompt: Prompt, texts: Texts | None) -> Prompt:
    """The prompt with its compressed passages replaced by their original texts."""
    left = list(texts or ())
    held = [passage for passage in _passages(prompt) if passage.interface != "text"]
    if len(left) != len(held):
        raise ValueError(f"texts must hold one text a compressed passage: got {len(left)} for {len(held)} passages.")

    def swap(atom: Any) -> Any:
        if isinstance(atom, CompressedPassage) and atom.interface != "text":
            return left.pop(0)
        if isinstance(atom, dict):
            return {**atom, "content": swap(atom["content"])}
        return [swap(item) for item in atom] if isinstance(atom, list | tuple) else atom

    return swap(prompt)
