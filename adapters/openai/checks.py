"""Check a server's settings for known bugs with prompt embeddings.

Checked settings and where they are visible:

* vLLM with LoRA adapters (``/v1/models``): prompt embeddings with ``--enable-lora`` crash some models (issue 51122).
  Merge the adapter into the weights before serving. Embeddings for an adapter itself are refused: they end the server.
* The tokenizer (``/tokenize`` of vLLM and SGLang): another one than the local reader's belongs to another model, which would
  answer with nonsense.
* vLLM's chats (``/v1/models``) join text and slots by newlines if the chat template takes a message as one string.
* SGLang (``/server_info``) with its radix cache: ``input_embeds`` are refused. In another dtype than bfloat16: it converts
  them to bfloat16. Before 0.5.13 with chunked prefill: prompts longer than a chunk are not supported (pull request 20376).

Not visible from outside: a vLLM before 0.22, which does not check the shape of embeddings (they are checked before sending);
a server with other weights than the local reader's; a SGLang that runs out of KV memory, which begins an answer to embeddings
anew and joins the two (issue 39645), so that sampled answers may be spliced.
"""

from __future__ import annotations

import re
from typing import Any

import httpx

from ...compressors import ReaderMismatchError
from .errors import KnownBugError
from .transport import Transport

_TAKES_CHUNKS = (0, 5, 13)  # SGLang from here splits embeddings into chunks
_PROBE = "The treaty of 1648: naïve café, 3.14 % — 東京 Привет\n\tdef f(x): return x"


def find_known_bugs(transport: Transport, engine: str, model: str | None) -> list[str]:
    """Return one sentence per known bug that the server's settings trigger; unavailable pages are skipped.

    Raises:
        KnownBugError: if the server cannot take embeddings at all, or would crash.
    """
    if engine == "sglang":
        return _sglang(transport)
    found = []
    adapters = [entry["id"] for entry in list_models(transport) if entry.get("parent")]
    if model in adapters:
        raise KnownBugError(
            f"The model {model!r} is a LoRA adapter, and vLLM with LoRA and prompt embeddings is known to crash (issue "
            "51122): merge the adapter into the weights and serve those without --enable-lora."
        )
    elif adapters:
        found.append(
            f"The server holds LoRA adapters ({', '.join(map(repr, adapters[:3]))}), and vLLM with LoRA and prompt "
            "embeddings is known to crash (issue 51122): serve the reader without --enable-lora."
        )
    return found


def check_tokenizer(transport: Transport, model: str | None, tokenizer: Any, name: str) -> None:
    """Compare the server's tokenizer with the local one on a probe text; a server that has no such page is not checked.

    Raises:
        ReaderMismatchError: if they differ.
    """
    body = {"prompt": _PROBE, "add_special_tokens": False} | ({} if model is None else {"model": model})
    theirs = (_json(transport.ask("/tokenize", body)) or {}).get("tokens")
    if not isinstance(theirs, list) or not all(isinstance(i, int) for i in theirs):
        return
    ours = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    bare = [i for i in theirs if i not in set(tokenizer.all_special_ids)]  # an engine that adds them anyway
    if list(ours) not in (theirs, bare):
        raise ReaderMismatchError(
            f"{transport.root} runs a model with another tokenizer than {name!r} (a probe text is {len(theirs)} tokens there, "
            f"{len(ours)} here): serve the reader's own weights, or make the ServedReader with the reader that is served."
        )


def find_joints(transport: Transport, tokenizer: Any) -> list[str]:
    """Return a sentence if the server is vLLM and joins the parts of a chat's message by newlines."""

    def render(content: Any) -> Any:
        return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    if not any(entry.get("owned_by") == "vllm" for entry in list_models(transport)):
        return []
    try:
        if render([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == render("ab"):
            return []  # the template takes parts, so vLLM leaves them alone
    except Exception:  # as templates do that take strings
        pass
    return [
        "vLLM puts newlines between text and slots in chats of this model, which changes some answers: use engine='vllm' with "
        "chat=True, which is exact."
    ]


def _sglang(transport: Transport) -> list[str]:
    info = _json(transport.get("/server_info")) or _json(transport.get("/get_server_info")) or {}
    if info.get("disable_radix_cache") is False:
        raise KnownBugError(
            "SGLang takes input_embeds only without its radix cache: start the server with --disable-radix-cache."
        )
    found = []
    dtype = info.get("dtype")
    if dtype not in (None, "auto", "bfloat16"):
        found.append(
            f"SGLang reads embeddings in bfloat16, but its model runs in {dtype}: start it with --dtype bfloat16."
        )
    chunk = info.get("chunked_prefill_size")
    if isinstance(chunk, int) and chunk > 0 and not _takes_chunks(info.get("version")):
        found.append(
            f"SGLang before 0.5.13 does not support embeddings longer than a chunk of its prefill ({chunk} positions): start "
            "it with --chunked-prefill-size -1 unless all prompts are shorter."
        )
    return found


def _takes_chunks(version: Any) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
    return numbers is not None and tuple(map(int, numbers.groups())) >= _TAKES_CHUNKS


def list_models(transport: Transport) -> list[dict[str, Any]]:
    """Return the entries of the server's list of models; none if it has none."""
    data = (_json(transport.get("/v1/models")) or {}).get("data")
    return [entry for entry in data or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _json(response: httpx.Response | None) -> dict[str, Any] | None:
    try:
        found = None if response is None else response.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
