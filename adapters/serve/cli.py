"""`nutgraf serve`: a reader behind an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

from ...console import friendly_errors


def serve(
    reader: Annotated[str, typer.Option("--reader", "-r", help="A shipped reader, a folder or a hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: the reader's name.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="NUTGRAF_API_KEY", help="Bearer token that clients must send.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the reader runs: auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Prompts read together.")] = 16,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Time a prompt waits for others to join its batch.")] = 5,
    max_queue: Annotated[int, typer.Option(min=1, help="Waiting prompts; more are refused.")] = 256,
    max_streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 2048,
    max_positions: Annotated[
        int | None, typer.Option(min=2, help="Positions of a prompt and its answer; default: the reader's.")
    ] = None,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest request.")] = 64,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds until a request gives up.")] = 300,
) -> None:
    """Serve a reader to OpenAI clients: text, token ids and prompt embeddings; batched, streamed, bounded."""
    with friendly_errors():
        from ...compressors import Reader
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
            raise ImportError("Serving needs FastAPI and uvicorn: pip install 'nutgraf[serve]'.") from error
        loaded = Reader.from_pretrained(reader, device=device, dtype=dtype)
        app = create_app(loaded, name=name, limits=limits, api_key=api_key)
        typer.echo(f"{name or loaded.name} ({loaded.fingerprint}) on http://{host}:{port}/v1", err=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
