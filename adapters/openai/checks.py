"""Check a server's settings for known bugs with prompt embeddings.

Checked settings and where they are visible:

* vLLM with LoRA adapters (``/v1/models``): prompt embeddings with ``--enable-lora`` crash some models (issue 51122).
  Merge the adapter into the weights before serving.
* SGLang with its radix cache (``/get_server_info``): ``input_embeds`` are refused. With chunked prefill, prompts longer than a
  chunk are not supported.

Not visible from outside: a vLLM before 0.22, which does not check the shape of embeddings (they are checked before sending),
and a server with other weights than the local reader's.
"""

from __future__ import annotations

from typing import Any

import httpx

from .errors import KnownBugError
from .transport import Transport


def find_known_bugs(transport: Transport, engine: str, model: str | None) -> list[str]:
    """Return one sentence per known bug that the server's settings trigger; unavailable pages are skipped.

    Raises:
        KnownBugError: if the server cannot take embeddings at all.
    """
    if engine == "sglang":
        return _sglang(transport)
    found = []
    adapters = [entry["id"] for entry in list_models(transport) if entry.get("parent")]
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
