"""The released `llmlingua` package as a process of its own: requests come as JSON lines on stdin, answers go to stdout.

The package needs transformers 4.44 and numpy below 2, so it runs under another interpreter than the toolkit. This file is
run by path there and imports nothing of the toolkit; `peer.Peer` is the other end of the pipe.

Requests: ``{"do": "versions"}``, ``{"do": "load", "name", "folder", "classifier", "threads"}`` and ``{"do": "compress",
"name", "options"}``, where the options are those of `PromptCompressor.compress_prompt`. An answer has ``error`` if the
package failed. What a compression took is measured here, around the call alone, so the pipe costs it nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any


class Forwarded:
    """Counts the positions that a model reads, padding included.

    Args:
        model: every call of it is counted.
    """

    def __init__(self, model: Any) -> None:
        self.positions = 0
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def remove(self) -> None:
        """Counts no more."""
        self._handle.remove()

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.positions += (args[0] if args else kwargs["input_ids"]).numel()


class Served:
    """One `PromptCompressor`, on the CPU in float32."""

    def __init__(self, folder: str, classifier: bool) -> None:
        from llmlingua import PromptCompressor

        self.compressor = PromptCompressor(folder, device_map="cpu", use_llmlingua2=classifier)
        self.compressor.model.eval()
        self.forwarded = Forwarded(self.compressor.model)

    def compress(self, options: dict[str, Any]) -> dict[str, Any]:
        """The compressed prompt, what it took in seconds, and the positions that were forwarded."""
        self.forwarded.positions = 0
        self.compressor.context_idxs.clear()  # it grows with every call otherwise
        start = time.perf_counter()
        found = self.compressor.compress_prompt(**options)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "text": found["compressed_prompt"], "positions": self.forwarded.positions}


def versions() -> dict[str, str]:
    """What the answers of this process were made with."""
    from importlib.metadata import version

    return {name: version(name) for name in ("llmlingua", "transformers", "torch", "numpy")}


def answer(request: dict[str, Any], served: dict[str, Served]) -> dict[str, Any]:
    """Does what a request asks for. Raises whatever the package raises."""
    if request["do"] == "versions":
        return {"versions": versions()}
    if request["do"] == "load":
        import torch

        torch.set_num_threads(request["threads"])
        served[request["name"]] = Served(request["folder"], request["classifier"])
        return {"threads": torch.get_num_threads()}
    if request["do"] == "compress":
        return served[request["name"]].compress(request["options"])
    raise ValueError(f"A request is versions, load or compress, got {request['do']!r}.")


def main() -> None:
    """Answers until stdin ends."""
    out = sys.stdout
    served: dict[str, Served] = {}
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):  # the package prints
            try:
                found = answer(json.loads(line), served)
            except Exception as error:  # told to the other end, whatever it is
                found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
