"""`nutgraf play`: a page on this machine that compares answers from full text and compressed passages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from rich.console import Console
from typer import Option

from .expand import takes

EXAMPLES = 12


@dataclass(kw_only=True)
class PlaySettings:
    reader: Annotated[str, Option("--reader", "-r", help="A shipped reader, a folder or a hub id.")] = "reader-smollm2"
    compressor: Annotated[
        list[str],
        Option("--compressor", "-c", help="Compressor to offer; default: those without training and the shipped ones."),
    ] = field(default_factory=list)
    port: Annotated[int, Option(min=0, max=65535)] = 8010
    device: Annotated[str, Option(help="Where the reader runs: auto, cpu, cuda, ...")] = "auto"
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto"


@takes(PlaySettings)
def play(settings: PlaySettings) -> None:
    """Open a page on this machine: ask a question, and compare answers from full text, compressed passages and nothing."""
    try:
        import uvicorn

        from ..play.app import create_play
    except ImportError as error:
        raise ImportError("The page needs FastAPI and uvicorn: pip install 'nutgraf[serve]'.") from error
    from ...recipes.data.corpus import read_records
    from ..loading import SAMPLE_QUESTIONS, find_reader
    from ..play.comparison import Comparison

    console = Console(stderr=True)
    console.print(f"Loading {settings.reader} ...")
    comparison = Comparison(find_reader(settings.reader, settings.device, settings.dtype), settings.compressor)
    records = read_records(SAMPLE_QUESTIONS, "tune")
    examples = records[:: max(1, len(records) // EXAMPLES)][:EXAMPLES]
    app = create_play(comparison, examples)
    console.print(f"Open http://127.0.0.1:{settings.port}/ in a browser; stop with Ctrl-C.")
    uvicorn.run(app, host="127.0.0.1", port=settings.port, log_level="warning", timeout_graceful_shutdown=1)
