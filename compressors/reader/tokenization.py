"""Tokenises prompts: plain runs of text between special tokens and compressed passages.

Text of users and documents is plain: the string of a special token inside it becomes ordinary tokens. Special tokens come only
from the tokenizer's prefix (BOS) and the chat template.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..core.fingerprint import hash_json

_SURROGATES = re.compile("[\ud800-\udfff]")
_PROBE = "The 2 quick brown foxes, naïve—日本語 🦊 jump;\n\n  over\tlazy dogs' 1,234.5 tails.</s> <|x|>"


@dataclass(frozen=True)
class Special:
    """A special token in a prompt, by its id."""

    id: int


@dataclass(frozen=True)
class TokenIds:
    """Literal token ids in a prompt, for formats that text cannot express. A prompt that starts with them gets no BOS."""

    ids: tuple[int, ...]


class PromptTokenizer:
    """Tokenises the strings of a prompt with a fast Hugging Face tokenizer, which is not changed.

    Args:
        tokenizer: the tokenizer.
        rows: embeddings of the model; a text that needs more is refused with ``ValueError``.

    Raises:
        TypeError: if the tokenizer has no fast backend, which exact offsets and plain special strings need.
    """

    def __init__(self, tokenizer: Any, rows: int | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TypeError(
                f"A fast tokenizer (one with a tokenizers backend) is needed, got {type(tokenizer).__name__}; "
                "load it with AutoTokenizer, which converts most of them."
            )
        self.tokenizer = tokenizer
        known = backend.get_vocab(with_added_tokens=True).values()
        self._rows = rows if rows is not None and max(known, default=0) >= rows else None
        self._plain = Tokenizer.from_str(backend.to_str())
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True
        # A run inside a prompt is encoded after a sentinel, so that tokenizers that put a space before a text put none before
        # the run. The sentinel is random, so that no text contains it.
        self._sentinel = f"<|{secrets.token_hex(16)}|>"
        self._plain.add_tokens([AddedToken(self._sentinel, special=False, normalized=False)])
        # Other tokenizers put one after every added token too.
        self._inside = _without_prefix(self._plain)
        added = tokenizer.added_tokens_decoder
        self._specials: dict[str, int] = {str(t.content): i for i, t in added.items()}
        strip = {t.content: (r"\s*" if t.lstrip else "", r"\s*" if t.rstrip else "") for t in added.values()}
        names = sorted(self._specials, key=len, reverse=True)
        parts = (f"{strip[n][0]}(?:{re.escape(n)}){strip[n][1]}" for n in names)
        self._special_pattern = re.compile("(" + "|".join(parts) + ")") if names else None
        self.bos_ids = self._find_prefix()

    def _find_prefix(self) -> list[int]:
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return list(full[:start])
        return []

    def encode(self, text: str, opens: bool = False) -> list[int]:
        """Ids of a plain run; ``opens``: it is first in its prompt, except for BOS."""
        return self.encode_batch([(text, opens)])[0]

    def encode_batch(self, runs: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of plain runs, each with its ``opens`` flag."""
        out: list[list[int]] = [[]] * len(runs)
        for opens, backend in ((True, self._plain), (False, self._inside)):
            at = [i for i, run in enumerate(runs) if run[1] == opens]
            marked = [("" if opens else self._sentinel) + clean(runs[i][0]) for i in at]
            for i, encoding in zip(at, backend.encode_batch_fast(marked, add_special_tokens=False) if at else []):
                out[i] = self._checked(encoding.ids if opens else encoding.ids[1:])
        return out

    def _checked(self, ids: list[int]) -> list[int]:
        if self._rows is not None and (bad := next((i for i in ids if i >= self._rows), None)) is not None:
            raise ValueError(
                f"Token ids must lie in 0..{self._rows - 1}, where the model has embeddings, and the tokenizer gives "
                f"{self.tokenizer.convert_ids_to_tokens(bad)!r} the id {bad}: use the model's own tokenizer, or resize its "
                "embeddings."
            )
        return ids

    def encode_between(self, pieces: Sequence[str]) -> list[list[int]]:
        """Ids of the pieces of a prompt that stand between added tokens, as the tokenizer itself encodes them there."""
        mark = self._plain.token_to_id(self._sentinel)
        found: list[list[int]] = [[]]
        for i in self._plain.encode(self._sentinel.join(map(clean, pieces)), add_special_tokens=False).ids:
            if i == mark:
                found.append([])
            else:
                found[-1].append(i)
        return [self._checked(ids) for ids in found]

    def encode_with_offsets(self, text: str, opens: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a plain run, and the ``(start, end)`` characters of each token; ``opens`` as in `encode`."""
        if opens:
            encoding = self._plain.encode(clean(text), add_special_tokens=False)
            return self._checked(encoding.ids), encoding.offsets
        encoding = self._inside.encode(self._sentinel + clean(text), add_special_tokens=False)
        shift = len(self._sentinel)
        return self._checked(encoding.ids[1:]), [(a - shift, b - shift) for a, b in encoding.offsets[1:]]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[Any]:
        """The atoms of a chat: `Special`, ``str`` and the non-text contents of messages.

        Args:
            messages: ``{"role": str, "content": str or list of str and compressed passages}`` each.
            template: options of the chat template, such as ``enable_thinking``.

        Raises:
            ValueError: if the tokenizer has no chat template, the template drops a message, or one has no role or content.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "This reader's tokenizer has no chat template; set tokenizer.chat_template, or pass a plain prompt."
            )
        check_messages(messages)
        marks = [f"x{secrets.token_hex(12)}x" for _ in messages]
        # The spaces show whether the template trims contents.
        marked = [{**m, "content": f" {mark} "} for m, mark in zip(messages, marks)]
        options = {"add_generation_prompt": True, **template}
        rendered = self.tokenizer.apply_chat_template(marked, tokenize=False, **options)
        atoms: list[Any] = []
        for mark, message in zip(marks, messages):
            if rendered.count(mark) != 1:
                raise ValueError(
                    f"The chat template shows a {message.get('role')!r} message {rendered.count(mark)} times."
                )
            kept = f" {mark} " in rendered
            before, rendered = rendered.split(f" {mark} " if kept else mark)
            atoms += self._split_specials(before)
            content = message["content"]
            pieces = [content] if isinstance(content, str) else list(content)
            atoms += pieces if kept else _trim(pieces)
        return atoms + self._split_specials(rendered)

    def _split_specials(self, text: str) -> list[Any]:
        if self._special_pattern is None:
            return [text] if text else []
        pieces: list[Any] = []
        for piece in self._special_pattern.split(text):
            if not piece:
                continue
            found = piece if piece in self._specials else piece.strip()
            pieces.append(Special(self._specials[found]) if found in self._specials else piece)
        return pieces

    def fingerprint_parts(self) -> list[Any]:
        """Facts that determine ids: vocabulary, special tokens, ids of a probe text, and the chat template."""
        vocabulary = hash_json(sorted(self.tokenizer.get_vocab().items()))
        template = getattr(self.tokenizer, "chat_template", None)
        return [vocabulary, sorted(self._specials.items()), self.encode(_PROBE, opens=True), self.bos_ids, template]


def clean(text: str) -> str:
    """Replaces lone surrogates, which no tokenizer takes, by U+FFFD, one for one."""
    return _SURROGATES.sub("�", text)


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """The tokenizer, or a copy that puts no space before its texts if it would put one after added tokens too."""
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    parts = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    if not sum(_strip_prefix(parts, name) for name in parts):
        return backend
    copied = Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), **parts}))
    copied.encode_special_tokens = backend.encode_special_tokens
    return copied


def _strip_prefix(parts: Any, key: str | int) -> bool:
    """Takes the prefix out of the part of a tokenizer under a key, in place; returns whether there was one."""
    part = parts[key]
    if part is None:
        return False
    if part["type"] == "Sequence":
        inner = part["normalizers" if "normalizers" in part else "pretokenizers"]
        return sum(_strip_prefix(inner, i) for i in range(len(inner))) > 0  # every one, not only the first
    if part["type"] == "Prepend":
        parts[key] = {"type": "Sequence", "normalizers": []}
    elif part["type"] == "Metaspace" and part.get("prepend_scheme") == "always":
        part["prepend_scheme"] = "never"
    elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
        part["add_prefix_space"] = False
    else:
        return False
    return True


def _trim(pieces: list[Any]) -> list[Any]:
    if pieces and isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip()
    if pieces and isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return pieces


def check_messages(messages: Sequence[Any]) -> None:
    """Raises ``ValueError`` for a message of a chat without role or content."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") is None or message.get("content") is None:
            raise ValueError(f"Every message needs a role and a content; message {i} is {message!r:.200}.")
