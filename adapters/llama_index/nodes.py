"""Node copies that give the LLM another text than everything else sees."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import BaseContentBlock, TextBlock
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.schema import BaseNode, Document, ImageNode, IndexNode, MetadataMode, Node, TextNode

from ...compressors import CompressedPassage
from ..placeholders.originals import original_of
from ..placeholders.placeholder import MARKER, Found, PlaceholderStore, is_placeholder, scan


class _ReadAs(BaseModel):
    """Mixin: the LLM gets ``llm_text``; text, hash and all other metadata modes are the original node's.

    A node loaded from JSON in another process, where its placeholder is unknown, gives the LLM its original text.
    """

    llm_text: str = Field(default="", description="What the LLM reads instead: a placeholder or a shorter text.")
    _placeholders: PlaceholderStore | None = PrivateAttr(default=None)  # held, so that it lives as long as the node
    _passage: CompressedPassage | None = PrivateAttr(default=None)  # a shorter text, for `recover_words`

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> str:
        """``llm_text`` for ``MetadataMode.LLM``, else the original content."""
        if metadata_mode == MetadataMode.LLM and self._readable():
            return self.llm_text
        return super().get_content(metadata_mode)  # type: ignore[misc, no-any-return]

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.NONE) -> list[BaseContentBlock]:
        """`get_content` as blocks."""
        if metadata_mode == MetadataMode.LLM and self._readable():
            return [TextBlock(text=self.llm_text)]
        return super().get_content_blocks(metadata_mode)  # type: ignore[misc, no-any-return]

    def _readable(self) -> bool:
        return MARKER not in self.llm_text or any(isinstance(piece, Found) for piece in scan(self.llm_text))


class CompressedTextNode(_ReadAs, TextNode):
    """A `TextNode` whose content for the LLM is ``llm_text``."""


class CompressedIndexNode(_ReadAs, IndexNode):
    """An `IndexNode` whose content for the LLM is ``llm_text``."""


class CompressedDocument(_ReadAs, Document):
    """A `Document` whose content for the LLM is ``llm_text``."""


class CompressedNode(_ReadAs, Node):
    """Another `Node` whose content for the LLM is ``llm_text``."""


_KINDS: tuple[type[BaseNode], ...] = (CompressedIndexNode, CompressedTextNode, CompressedDocument, CompressedNode)


def text_of(node: BaseNode) -> str | None:
    """Return the text of a node, or ``None`` for multimodal nodes (image, audio, video).

    The text of a node whose content is nothing but a placeholder, such as a document that LangChain's compressor made, is the
    original text in its metadata.

    Raises:
        PlaceholderError: if it has none.
    """
    if isinstance(node, ImageNode):
        return None
    text = None
    if isinstance(node, TextNode):
        text = node.text
    elif isinstance(node, Node) and not (node.image_resource or node.audio_resource or node.video_resource):
        text = node.get_content(MetadataMode.NONE)
    return original_of(text, node.metadata) if text is not None and is_placeholder(text) else text


def read_as(
    node: BaseNode,
    llm_text: str,
    placeholders: PlaceholderStore | None = None,
    passage: CompressedPassage | None = None,
) -> BaseNode:
    """Copy a text node, index node or text-only document; the copy gives ``llm_text`` to the LLM.

    The copy keeps the store of its placeholders alive, and a passage compressed to text.
    """
    kind = next(kind for kind in _KINDS if isinstance(node, kind.__bases__[-1]))
    fields: dict[str, Any] = {name: getattr(node, name) for name in kind.model_fields if name != "llm_text"}
    for name, value in fields.items():
        if isinstance(value, dict | list) and name != "embedding":
            fields[name] = value.copy()
    copy = kind.model_construct(**fields, llm_text=llm_text)
    copy._placeholders = placeholders  # type: ignore[attr-defined]
    copy._passage = passage if passage is not None and passage.interface == "text" else None  # type: ignore[attr-defined]
    return copy
