"""Response synthesizer that also scores how well each passage alone explains the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import RESPONSE_TYPE, Response
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.types import RESPONSE_TEXT_TYPE

from .llm import CompressedContextLLM

LOGPROB, GAIN = "answer_logprob", "answer_logprob_gain"


class PassageScores(BaseSynthesizer):
    """Answers in one of LlamaIndex's response modes, then scores the answer against each source node alone.

    Adds two numbers in nats to each node's entry in ``response.metadata``:

    * ``answer_logprob``: log-likelihood of the whole answer with the node as the only context, in the form in which it was
      read for the answer (text or compressed);
    * ``answer_logprob_gain``: the same minus the log-likelihood without context. Above 0, the passage supports the answer.

    Costs one pass of the reader per node plus one. The nodes' own metadata do not change.

    Args:
        llm: answers and scores.
        response_mode: as for ``get_response_synthesizer``.
        text_qa_template: prompt of answers and scores, with ``{context_str}`` and ``{query_str}``.
        kwargs: as for ``get_response_synthesizer``, without ``streaming``.

    Raises:
        TypeError: if ``llm`` is not a `CompressedContextLLM`.
        ValueError: for ``streaming``, because only a finished answer can be scored.

    Example::

        engine = index.as_query_engine(
            llm=llm,
            response_synthesizer=PassageScores(llm),
            node_postprocessors=[CompressedContextPostprocessor(compressor)],
        )
        response = engine.query("Who signed it?")
        response.metadata[response.source_nodes[0].node_id]["answer_logprob_gain"]
    """

    def __init__(
        self,
        llm: CompressedContextLLM,
        response_mode: Any = "compact",
        text_qa_template: BasePromptTemplate | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(llm, CompressedContextLLM):
            raise TypeError(f"PassageScores needs a CompressedContextLLM, which can score, got {type(llm).__name__}.")
        if kwargs.get("streaming"):
            raise ValueError("PassageScores scores whole answers and cannot stream them; leave streaming out.")
        self._template = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
        self._inner = llm.response_synthesizer(response_mode, text_qa_template=self._template, **kwargs)
        super().__init__(llm=llm, prompt_helper=self._inner._prompt_helper)
        self._scorer = llm

    def score(self, query: str, contexts: Sequence[str], answer: str) -> list[float]:
        """Return the log-likelihood in nats of an answer with each context alone; contexts may contain placeholders.

        Raises:
            ReaderRefusedError: if the answer is empty, or a prompt does not fit the window.
        """
        if isinstance(contexts, str):
            raise TypeError("contexts must be a list of contexts, got one string; write [context].")
        prompts: list[str | list[ChatMessage]] = []
        for context in contexts:
            asked: dict[str, Any] = {"llm": self._scorer, "context_str": context, "query_str": query}
            is_chat = self._scorer.metadata.is_chat_model
            prompts.append(self._template.format_messages(**asked) if is_chat else self._template.format(**asked))
        return self._scorer.answer_logprobs(prompts, answer)

    def synthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer, with the scores in the response's metadata."""
        response = self._inner.synthesize(query, nodes, additional_source_nodes, **response_kwargs)
        return self._scored(query, nodes, response)

    async def asynthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        response = await self._inner.asynthesize(query, nodes, additional_source_nodes, **response_kwargs)
        return await asyncio.to_thread(self._scored, query, nodes, response)

    def _scored(
        self, query: str | QueryBundle, nodes: Sequence[NodeWithScore], response: RESPONSE_TYPE
    ) -> RESPONSE_TYPE:
        if not nodes or not isinstance(response, Response) or not response.response:
            return response
        question = query if isinstance(query, str) else query.query_str
        contexts = ["", *(scored.node.get_content(MetadataMode.LLM) for scored in nodes)]
        without, *alone = self.score(question, contexts, response.response)
        metadata = {node_id: dict(facts) for node_id, facts in (response.metadata or {}).items()}
        for scored, logprob in zip(nodes, alone):
            metadata.setdefault(scored.node.node_id, {}).update({LOGPROB: logprob, GAIN: logprob - without})
        response.metadata = metadata
        return response

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        return self._inner.get_response(query_str, text_chunks, **response_kwargs)

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        return await self._inner.aget_response(query_str, text_chunks, **response_kwargs)

    def _get_prompts(self) -> dict[str, Any]:
        return {"scoring_template": self._template}

    def _get_prompt_modules(self) -> PromptMixinType:
        return {"response_synthesizer": self._inner}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        self._template = prompts.get("scoring_template", self._template)
