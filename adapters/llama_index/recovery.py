"""Puts the source's words back into a response that was read from shorter texts."""

from __future__ import annotations

from llama_index.core.base.response.schema import Response

from ...compressors.text.recovery import recover
from .nodes import text_of


def recover_words(response: Response) -> Response:
    """Replace fragments of a response that compression to text made by the words of its source nodes.

    See `nutgraf.compressors.text.recovery.recover`. The response is changed and returned. Nodes that the LLM read in another
    form, or that were loaded from JSON, are left out.

    Raises:
        TypeError: for a stream, because only a finished answer can be searched.

    Example::

        response = recover_words(engine.query("Which treaty was signed in 1648?"))
    """
    if not isinstance(response, Response):
        raise TypeError(f"recover_words needs a finished Response, got {type(response).__name__}; leave streaming out.")
    found = [(text_of(scored.node), getattr(scored.node, "_passage", None)) for scored in response.source_nodes]
    pairs = [(text, passage) for text, passage in found if text is not None and passage is not None]
    if response.response:
        texts = [text for text, _ in pairs]
        response.response = recover(response.response, texts, [passage for _, passage in pairs])
    return response
