"""Copies of nodes that the LLM reads in another form, while everybody else still sees the original text."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import BaseContentBlock, TextBlock
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, Document, ImageNode, IndexNode, MetadataMode, Node, TextNode

from ..placeholders.placeholder import MARKER, Found, PlaceholderStore, scan


class _ReadAs:
    """Mixin: what the LLM gets is ``llm_text``; text, hash and all other metadata modes are the original node's.

    A node that comes back from JSON in another process, where nobody knows its placeholder any more, gives its original
    text to the LLM: nothing is lost but the compression.
    """

    llm_text: str

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """What the LLM is to read for ``MetadataMode.LLM``; otherwise the original content."""
        if metadata_mode == MetadataMode.LLM and self._readable():
            return self.llm_text
        return super().get_content(metadata_mode)  # type: ignore[misc, no-any-return]

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> list[BaseContentBlock]:
        """The same as blocks."""
        if metadata_mode == MetadataMode.LLM and self._readable():
            return [TextBlock(text=self.llm_text)]
        return super().get_content_blocks(metadata_mode)  # type: ignore[misc, no-any-return]

    def _readable(self) -> bool:
        return MARKER not in self.llm_text or any(isinstance(piece, Found) for piece in scan(self.llm_text))


_LLM_TEXT = "What the LLM reads in place of the node's content: a placeholder, or a shorter text."


class CompressedTextNode(_ReadAs, TextNode):
    """A `TextNode` whose content for the LLM is ``llm_text``."""

    llm_text: str = Field(default="", description=_LLM_TEXT)
    _store: PlaceholderStore | None = PrivateAttr(default=None)


class CompressedIndexNode(_ReadAs, IndexNode):
    """An `IndexNode` whose content for the LLM is ``llm_text``."""

    llm_text: str = Field(default="", description=_LLM_TEXT)
    _store: PlaceholderStore | None = PrivateAttr(default=None)


class CompressedDocument(_ReadAs, Document):
    """A `Document` whose content for the LLM is ``llm_text``."""

    llm_text: str = Field(default="", description=_LLM_TEXT)
    _store: PlaceholderStore | None = PrivateAttr(default=None)


class CompressedNode(_ReadAs, Node):
    """Another `Node` whose content for the LLM is ``llm_text``."""

    llm_text: str = Field(default="", description=_LLM_TEXT)
    _store: PlaceholderStore | None = PrivateAttr(default=None)


_KINDS: tuple[type[BaseNode], ...] = (CompressedIndexNode, CompressedTextNode, CompressedDocument, CompressedNode)


def text_of(node: BaseNode) -> str | None:
    """The text of a node, or ``None`` where it also holds an image, sound or a film, which no compressor reads."""
    if isinstance(node, ImageNode):
        return None
    if isinstance(node, TextNode):
        return node.text
    if isinstance(node, Node) and not (node.image_resource or node.audio_resource or node.video_resource):
        return node.get_content(MetadataMode.NONE)
    return None


def read_as(node: BaseNode, llm_text: str, store: PlaceholderStore | None = None) -> BaseNode:
    """A copy of a node that gives ``llm_text`` to the LLM and is otherwise the same; the node itself is not touched.

    Args:
        node: a text node, index node or text-only document.
        llm_text: what the LLM is to read, metadata included.
        store: the store that issued the placeholders in it, which lives as long as the copy.
    """
    kind = next(kind for kind in _KINDS if isinstance(node, kind.__bases__[-1]))
    fields: dict[str, Any] = {name: getattr(node, name) for name in kind.model_fields if name != "llm_text"}
    for name, value in fields.items():
        if isinstance(value, dict | list) and name != "embedding":
            fields[name] = value.copy()
    copy = kind.model_construct(**fields, llm_text=llm_text)
    copy._store = store  # type: ignore[attr-defined]
    return copy
