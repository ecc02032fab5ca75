"""Our end of the pipe to the released `llmlingua` package, which runs under an interpreter of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from .selection_models import MODELS

SCRIPT = Path(__file__).with_name("selection_peer.py")


class PeerError(ValueError):
    """The package, or the interpreter it runs under, failed."""


class Peer:
    """A process that compresses with the package; a context manager.

    Args:
        python: an interpreter with llmlingua 0.2.2, transformers 4.44 and numpy below 2.
        threads: of torch and of the tokenizers.

    Attributes:
        name: package and version, as rows say it.

    Raises:
        PeerError: if the interpreter does not start or has no such package.
    """

    def __init__(self, python: str | Path, threads: int) -> None:
        self.threads = threads
        self._loaded: set[str] = set()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "RAYON_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "true",
            "HF_HUB_OFFLINE": "1",
        }
        if (tables := _token_tables()) is not None:
            environment["TIKTOKEN_CACHE_DIR"] = str(tables)
        try:
            # -P: this file's own folder is no place to import from.
            self._process = subprocess.Popen(
                [str(python), "-P", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise PeerError(f"{python} does not start: {error}.") from error
        try:
            self.versions: dict[str, str] = self._ask({"do": "versions"})["versions"]
        except PeerError:
            self.close()
            raise
        self.name = f"llmlingua {self.versions['llmlingua']}"

    def load(self, name: str, folder: str | Path) -> None:
        """Loads a model of `selection_models`, once."""
        if name not in self._loaded:
            self._ask(
                {
                    "do": "load",
                    "name": name,
                    "folder": str(folder),
                    "classifier": MODELS[name].classifier,
                    "threads": self.threads,
                }
            )
            self._loaded.add(name)

    def compress(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """`seconds`, `text` and forwarded `positions` of one call of the package with a loaded model."""
        return self._ask({"do": "compress", "name": name, "options": options})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        requests, answers = self._process.stdin, self._process.stdout
        if requests is None or answers is None:
            raise PeerError("The package's process has no pipe.")
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            line = answers.readline()
        except OSError as error:
            raise PeerError(f"The package's process is gone: {error}.") from error
        if not line:
            raise PeerError(f"The package's process ended without an answer (exit status {self._process.wait()}).")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise PeerError(f"llmlingua failed: {found['error']}.")
        return found

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _token_tables() -> Path | None:
    """GPT-3.5's token table, which the package counts with, as llama-index-core ships it; else it would be downloaded."""
    spec = importlib.util.find_spec("llama_index.core")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "_static" / "tiktoken_cache"
    return folder if folder.is_dir() else None
