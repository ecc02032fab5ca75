"""A server of an application on a free port of this machine, for tests."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import uvicorn
from nutgraf import Reader
from nutgraf.adapters.serve import create_app


class Running:
    """A server in a thread of its own, on a free port."""

    def __init__(self, reader: Reader | None, app: Any = None, **options: Any) -> None:
        self.app = app or create_app(reader, name="tiny", **options)  # type: ignore[arg-type]
        self.server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, page: str = "completions", **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{page}", json=body)

    def ask(self, **body: Any) -> list[str]:
        answer = self.post(**{"temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return [choice["text"] for choice in answer.json()["choices"]]

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def refused(answer: httpx.Response, status: int = 400) -> str:
    """An error in OpenAI's form; its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status
    assert error["type"]
    return error["message"]
