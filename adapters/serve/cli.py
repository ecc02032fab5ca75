"""`nutgraf serve`: a reader behind an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import ipaddress
import math
from typing import Annotated, Any

import typer

from ...console import friendly_errors
from ..store import StoreError
from .keys import Keys


def serve(
    reader: Annotated[str, typer.Option("--reader", "-r", help="A shipped reader, a folder or a hub id.")],
    store: Annotated[
        str | None, typer.Option("--store", "-s", help="Store of compressed passages, by id; created if missing.")
    ] = None,
    compressor: Annotated[
        str | None,
        typer.Option(
            "--compressor",
            "-c",
            help="Compresses passages that come as text: shipped, a folder, a hub id, or a method without training.",
        ),
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Compression ratio; default: the compressor's own.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: the reader's name.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="NUTGRAF_API_KEY", help="Bearer token that clients must send; several: with commas between."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the reader runs: auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Prompts read together.")] = 16,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Time a prompt waits for others to join its batch.")] = 5,
    max_queue: Annotated[int, typer.Option(min=1, help="Waiting prompts; more are refused.")] = 256,
    max_streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 2048,
    max_positions: Annotated[
        int | None, typer.Option(min=2, help="Positions of a prompt and its answer; default: the reader's.")
    ] = None,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest request.")] = 64,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds until a request gives up.")] = 300,
) -> None:
    """Serve a reader to OpenAI clients: text, compressed passages, prompt embeddings; batched, streamed, bounded."""
    with friendly_errors(StoreError), contextlib.ExitStack() as opened:
        if not api_key and not is_loopback(host):
            raise ValueError(
                f"{host} can be reached from other machines: set NUTGRAF_API_KEY (or --api-key) to a token that clients must "
                "send, or listen on 127.0.0.1."
            )
        keys = [key.strip() for key in api_key.split(",")] if api_key else []
        Keys(keys)  # refuses bad ones before the reader is loaded
        if ratio is not None and compressor is None:
            raise ValueError("--ratio needs --compressor.")
        from ...compressors import Reader, load_compressor
        from .limits import Limits

        limits = Limits(
            max_body_bytes=max_body_mib * 2**20,
            max_new_tokens=max_new_tokens,
            max_positions=max_positions,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            max_queue=max_queue,
            max_streams=max_streams,
            timeout_s=timeout_s,
        )
        try:
            import uvicorn

            from .app import create_app
        except ImportError as error:
            raise ImportError(
                "Serving needs FastAPI, uvicorn and prometheus-client: pip install 'nutgraf[serve]'."
            ) from error
        passages: Any = None
        if store is not None:
            from ..store import LanceStore

            passages = opened.enter_context(LanceStore(store, create=compressor is not None))
        loaded = Reader.from_pretrained(reader, device=device, dtype=dtype)
        made = None if compressor is None else load_compressor(compressor, loaded)
        served = loaded if made is None else made.reader
        app = create_app(served, compressor=made, store=passages, ratio=ratio, name=name, limits=limits, api_key=keys)
        typer.echo(f"{name or served.name} ({served.fingerprint}) on http://{host}:{port}/v1", err=True)
        # A second signal stops at once; the first waits for answers at work.
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=math.ceil(timeout_s))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name, which may mean any address
