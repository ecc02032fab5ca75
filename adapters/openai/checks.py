"""Check a server's settings for known bugs with prompt embeddings.

Checked settings and where they are visible:

* vLLM with prefix caching (``/metrics``) and chat parts: requests that mix tokens and embeddings may share cached keys and
  values, so an answer may silently use another request's passage (vLLM issue 56655). Whole prompts as embeddings
  (``engine="vllm"``) are safe.
* vLLM with LoRA adapters (``/v1/models``): prompt embeddings with ``--enable-lora`` crash some models (issue 51122).
  Merge the adapter into the weights before serving.
* SGLang with its radix cache (``/get_server_info``): ``input_embeds`` are refused. With chunked prefill, prompts longer than a
  chunk are not supported.

Not visible from outside: a vLLM that crashes on embeddings of a wrong shape (shapes are checked before sending), and a server
with other weights than the local reader's.
"""

from __future__ import annotations

import re
from typing import Any

import httpx

from .errors import KnownBugError
from .transport import Transport

_PREFIX_CACHING = re.compile(r'vllm:cache_config_info\{[^}]*enable_prefix_caching="True"')


def find_known_bugs(transport: Transport, engine: str, model: str | None) -> list[str]:
    """Return one sentence per known bug that the server's settings trigger; unavailable pages are skipped.

    Raises:
        KnownBugError: if the server cannot take embeddings at all.
    """
    if engine == "sglang":
        return _sglang(transport)
    found = []
    adapters = [entry["id"] for entry in _models(transport) if entry.get("parent")]
    if model in adapters:
        found.append(
            f"The model {model!r} is a LoRA adapter, and vLLM with LoRA and prompt embeddings is known to crash (issue "
            "51122): merge the adapter into the weights and serve those without --enable-lora."
        )
    elif adapters:
        found.append(
            f"The server holds LoRA adapters ({', '.join(map(repr, adapters[:3]))}), and vLLM with LoRA and prompt "
            "embeddings is known to crash (issue 51122): serve the reader without --enable-lora."
        )
    metrics = transport.get("/metrics") if engine == "vllm-chat" else None
    if metrics is not None and _PREFIX_CACHING.search(metrics.text):
        found.append(
            "The server caches prefixes, and vLLM is known to mix up cached prefixes of chats with embeddings (issue 56655): "
            "start it with --no-enable-prefix-caching, or use engine='vllm', which sends whole prompts as embeddings."
        )
    return found


def _sglang(transport: Transport) -> list[str]:
    info = _json(transport.get("/get_server_info")) or _json(transport.get("/server_info")) or {}
    if info.get("disable_radix_cache") is False:
        raise KnownBugError(
            "SGLang takes input_embeds only without its radix cache: start the server with --disable-radix-cache."
        )
    chunk = info.get("chunked_prefill_size")
    if isinstance(chunk, int) and chunk > 0:
        return [
            f"SGLang prefills in chunks of {chunk} positions and does not support embeddings longer than that: start it "
            "with --chunked-prefill-size -1 unless all prompts are shorter."
        ]
    return []


def _models(transport: Transport) -> list[dict[str, Any]]:
    data = (_json(transport.get("/v1/models")) or {}).get("data")
    return [entry for entry in data or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _json(response: httpx.Response | None) -> dict[str, Any] | None:
    try:
        found = None if response is None else response.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
