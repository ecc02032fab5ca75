"""Servers with a store that are killed while a client adds and deletes passages; run in a process of its own.

Importing torch takes long, so one process forks all servers. It opens no store before it has forked the last one.

    python killed_server.py FOLDER KILLS  -> one JSON object: what happened
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback

import httpx
import torch
import uvicorn
import zoo
from nutgraf import load_compressor
from nutgraf.adapters.serve import create_app
from nutgraf.adapters.store import LanceStore
from nutgraf.adapters.store.upkeep import verify


def fork_server(folder: str) -> tuple[int, int]:
    """Start a server; its process and port."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    port = listening.getsockname()[1]
    child = os.fork()
    if not child:
        try:
            reader = zoo.reader("llama", num_hidden_layers=1)
            compressor = load_compressor("kv-match", reader=reader, probes=2, ratio=2.0)
            app = create_app(reader, compressor=compressor, store=LanceStore(folder))
            config = uvicorn.Config(app, log_level="error", lifespan="on")
            uvicorn.Server(config).run(sockets=[listening])
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    listening.close()
    return child, port


def fork_killer(server: int, seconds: float) -> int:
    child = os.fork()
    if not child:
        time.sleep(seconds)
        os.kill(server, signal.SIGKILL)
        os._exit(0)
    return child


def main(folder: str, kills: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)
    added: list[str] = []  # acknowledged ids
    deleted: list[str] = []
    unsure: set[str] = set()  # named in a request without an answer
    number = 0
    took = 0.2  # seconds of a server's first upload; it is killed within the next few, however slow the machine is
    for _ in range(kills):
        server, port = fork_server(folder)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            http.get("/health").raise_for_status()  # the listening socket waits for the server
            killer = fork_killer(server, draw.uniform(0.05, 4) * took)
            first, start, trying = True, time.monotonic(), ""
            try:
                while True:
                    texts = [f"{number + i} delegates signed the treaty" for i in range(draw.randint(1, 3))]
                    number += len(texts)
                    answer = http.post("/v1/passages", json={"passages": [{"text": text} for text in texts]})
                    added += [one["id"] for one in answer.raise_for_status().json()["data"]]
                    took = time.monotonic() - start if first else took
                    first = False
                    if draw.random() < 0.3:
                        trying = draw.choice(sorted(set(added) - set(deleted) - unsure))
                        http.delete(f"/v1/passages/{trying}").raise_for_status()
                        deleted.append(trying)
                        trying = ""
            except httpx.TransportError:
                unsure |= {trying} - {""}
        os.waitpid(killer, 0)
        os.waitpid(server, 0)
    with LanceStore(folder, create=False) as store:
        stored = store.listed(added)
        kept = set(added) - set(deleted) - unsure
        found = {"killed": kills, "added": len(added), "deleted": len(deleted)}
        found |= {"lost": sorted(kept - stored.keys()), "back": sorted(set(deleted) & stored.keys())}  # type: ignore[dict-item]
        print(json.dumps(found | {"damaged": [problem.what for problem in verify(store)]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
