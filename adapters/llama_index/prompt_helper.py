"""Prompt helper that counts a compressed passage as its slots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.indices.prompt_helper import DEFAULT_PADDING, PromptHelper
from llama_index.core.node_parser.text.token import TokenTextSplitter

from ..placeholders.placeholder import Found, scan

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from llama_index.core.prompts import BasePromptTemplate

    from ...compressors import Reader
    from ..openai import ServedReader

_log = logging.getLogger(__name__)
_JOINT = "\n\n"


class SlotAwareTokenizer:
    """Counts a text in reader positions: its tokens, and a genuine placeholder as its slots.

    LlamaIndex wants a function from text to a list and uses only the length of the list.
    """

    def __init__(self, reader: Reader | ServedReader) -> None:
        self.reader = reader

    def __call__(self, text: str) -> list[int]:
        """Return one id per position; slots are token 0."""
        ids: list[int] = []
        for piece in scan(text):
            ids += [0] * piece.slots if isinstance(piece, Found) else self.reader.tokenize(piece)
        return ids


class SlotAwarePromptHelper(PromptHelper):
    """A `PromptHelper` that counts placeholders as their slots, never cuts one and never repeats one.

    LlamaIndex's own helper counts a placeholder's text, which is at least about as long as the slots: safe, but fewer
    passages fit into a call. Pass this one with ``get_response_synthesizer(prompt_helper=llm.prompt_helper())`` or set
    ``Settings.prompt_helper``.

    Args:
        reader: the reader of the `CompressedContextLLM`.
        context_window: positions of a prompt and its answer.
        num_output: positions of the window kept for the answer.
        kwargs: as for `PromptHelper`; ``chunk_overlap_ratio`` is 0 by default.
    """

    def __init__(self, reader: Reader | ServedReader, context_window: int, num_output: int, **kwargs: Any) -> None:
        super().__init__(
            context_window=context_window,
            num_output=num_output,
            tokenizer=SlotAwareTokenizer(reader),
            **{"chunk_overlap_ratio": 0.0, **kwargs},
        )

    @classmethod
    def class_name(cls) -> str:
        return "SlotAwarePromptHelper"

    def repack(
        self,
        prompt: BasePromptTemplate,
        text_chunks: Sequence[str],
        padding: int = DEFAULT_PADDING,
        llm: LLM | None = None,
        tools: Any = None,
    ) -> list[str]:
        """Join chunks in order; each result fills the window with whole passages.

        Raises:
            ValueError: if a compressed passage alone does not fit.
        """
        splitter = self.get_text_splitter_given_prompt(prompt, padding=padding, llm=llm, tools=tools)
        whole = _JOINT.join(chunk.strip() for chunk in text_chunks if chunk.strip())
        if self._count(whole) <= splitter.chunk_size:
            return [whole]
        packed: list[str] = []
        room = 0
        units = (unit for chunk in text_chunks if chunk.strip() for unit in self._units(chunk.strip(), splitter))
        for unit, joint in units:
            cost = self._count(joint + unit)
            if packed and cost <= room:
                packed[-1] += joint + unit
                room -= cost
            else:
                packed.append(unit)
                room = splitter.chunk_size - self._count(unit)
        return packed

    def truncate(
        self,
        prompt: BasePromptTemplate,
        text_chunks: Sequence[str],
        padding: int = DEFAULT_PADDING,
        llm: LLM | None = None,
        tools: Any = None,
    ) -> list[str]:
        """Cut each chunk to its share of the window: text anywhere, compressed passages only as a whole.

        Raises:
            ValueError: if the first compressed passage of a chunk does not fit.
        """
        if not text_chunks:
            return []
        splitter = self.get_text_splitter_given_prompt(
            prompt, num_chunks=len(text_chunks), padding=padding, llm=llm, tools=tools
        )
        return [self._cut(chunk, splitter) for chunk in text_chunks]

    def _count(self, text: str) -> int:
        return self._token_counter.get_string_tokens(text)

    def _units(self, chunk: str, splitter: TokenTextSplitter) -> list[tuple[str, str]]:
        """Split a chunk into pieces that fit the window, each with the text that joins it to the previous piece."""
        if self._count(chunk) <= splitter.chunk_size:
            return [(chunk, _JOINT)]
        units: list[tuple[str, str]] = []
        joint = _JOINT
        for piece, is_passage in _pieces(chunk):
            if is_passage:
                self._check_fits(piece, splitter)
                units.append((piece, joint))
                joint = ""
                continue
            text = piece.strip()
            before, _, after = piece.partition(text) if text else (piece, "", "")
            joint += before
            for part in splitter.split_text(text) if text else ():
                units.append((part, joint))
                joint = " "
            joint = after if text else joint
        return units

    def _cut(self, chunk: str, splitter: TokenTextSplitter) -> str:
        if self._count(chunk) <= splitter.chunk_size:
            return chunk
        kept, room = "", splitter.chunk_size
        for piece, is_passage in _pieces(chunk):
            cost = self._count(piece)
            if cost > room:
                if is_passage and not kept.strip():
                    self._check_fits(piece, splitter)
                if not is_passage:
                    kept += self._head(piece, room)
                _log.warning(
                    "The context is larger than the window: the passages and the text at its end are left out."
                )
                break
            kept += piece
            room -= cost
        return kept.strip()

    def _head(self, piece: str, room: int) -> str:
        text = piece.lstrip()
        blank = piece[: len(piece) - len(text)]
        if (room := room - self._count(blank)) < 1:
            return ""
        splitter = TokenTextSplitter(chunk_size=room, chunk_overlap=0, tokenizer=self._token_counter.tokenizer)
        return blank + next(iter(splitter.split_text(text)), "")

    def _check_fits(self, placeholder: str, splitter: TokenTextSplitter) -> None:
        if (slots := self._count(placeholder)) > splitter.chunk_size:
            raise ValueError(
                f"A compressed passage takes {slots} slots, but the prompt has room for {splitter.chunk_size}; use smaller "
                "chunks, fewer passages, a higher compression ratio or a smaller max_new_tokens."
            )


def _pieces(chunk: str) -> list[tuple[str, bool]]:
    """Split a chunk at its placeholders; the flag marks placeholders."""
    return [(piece.spelled, True) if isinstance(piece, Found) else (piece, False) for piece in scan(chunk)]
