"""`ServedReader` against a real vLLM: `make vllm` installs it, sets ``NUTGRAF_VLLM`` to its Python and runs this.

``NUTGRAF_VLLM_RESULTS`` names a file for the rows of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from nutgraf import Reader, load_compressor
from nutgraf.adapters.openai import EmbeddingTable, RequestRefusedError, ServedReader
from nutgraf.benchmarks.loading import SAMPLE_QUESTIONS
from nutgraf.benchmarks.rows import provenance
from nutgraf.recipes.data.corpus import Record, read_records
from nutgraf.recipes.data.templates import question_prompt

PYTHON = os.environ.get("NUTGRAF_VLLM", "")
QUESTIONS = int(os.environ.get("NUTGRAF_VLLM_QUESTIONS", "16"))
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "stop": ["\n"]}
METHODS = ("text", "identity", "icae-smollm2", "xrag-smollm2", "salient-pool-query-smollm2")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON, reason="no vLLM: run make vllm"),
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def reader() -> Reader:
    """Shadows the tiny reader: vLLM serves the pretrained one. float32, because bfloat16 turns near ties."""
    return Reader.from_pretrained("reader-smollm2", device="cpu", dtype="float32")


@contextlib.contextmanager
def serving(reader: Reader, folder: Path) -> Iterator[str]:
    """vLLM on loopback, which serves a reader; it and its workers are ended at the end."""
    reader.save_pretrained(folder / "reader")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "reader")]
    run += ["--served-model-name", "reader", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"]
    run += ["--dtype", "float32", "--enable-prompt-embeds", "--enforce-eager", "--generation-config", "vllm"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    env.pop("PYTHONPATH", None)
    log = (folder / "log").open("w")
    process = subprocess.Popen(run, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1800):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield f"{address}/v1"
    finally:
        os.killpg(process.pid, 15)  # of the session that was started here
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


@pytest.fixture(scope="module")
def url(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(reader, tmp_path_factory.mktemp("vllm")) as address:
        yield address


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read_records(SAMPLE_QUESTIONS, "tune")[::20][:QUESTIONS]


@pytest.fixture(scope="module")
def note(reader: Reader, url: str) -> Callable[..., None]:
    """Write a row about what was compared."""
    version = httpx.get(url.replace("/v1", "/version")).json()["version"]

    def write(what: str, same: int, of: int, **more: Any) -> None:
        row = {"suite": "served", "test": what, "engine": f"vllm {version}", "same": same, "questions": of, **more}
        row |= provenance(reader, 0) | {"command": "make vllm"}
        if path := os.environ.get("NUTGRAF_VLLM_RESULTS"):
            with Path(path).open("a") as file:
                file.write(json.dumps(row) + "\n")

    return write


@pytest.fixture(scope="module")
def prompts(reader: Reader, records: list[Record]) -> Callable[[str], list[list[Any]]]:
    def make(method: str) -> list[list[Any]]:
        context: list[Any] = [[record.gold_text] for record in records]
        if method == "identity":
            context = [[reader.identity(record.gold_text)] for record in records]
        elif method != "text":
            compressor = load_compressor(method, reader)
            asked = [record.question for record in records] if compressor.query_aware else None
            texts = [record.gold_text for record in records]
            context = [[passage] for passage in compressor.compress(texts, query=asked, batch_size=4)]
        return [question_prompt(pieces, record.question) for pieces, record in zip(context, records)]

    return make


def served(url: str, reader: Reader, **options: Any) -> ServedReader:
    return ServedReader(url, "reader", EmbeddingTable.of(reader), timeout=600, known_bugs="ignore", **options)


@pytest.mark.parametrize("method", METHODS)
def test_completions_are_those_of_the_local_reader(url, reader, prompts, note, method):
    asked = prompts(method)
    wanted = reader.generate(asked, batch_size=4, **OPTIONS)
    with served(url, reader, concurrency=16) as remote:
        found = remote.generate(asked, **OPTIONS)
        streamed = ["".join(remote.stream(prompt, **OPTIONS)) for prompt in asked[:4]]
    note(f"completions, {method}", sum(a == b for a, b in zip(found, wanted)), len(asked), concurrency=16)
    note(f"streams, {method}", sum(a == b for a, b in zip(streamed, wanted)), len(streamed))
    assert found == wanted
    assert streamed == wanted[:4]


def test_chats_laid_out_here_are_exact_and_chat_parts_are_answered(url, reader, prompts, note):
    asked = [["Passage: ", *prompt] for prompt in prompts("icae-smollm2")]
    wanted = reader.generate(asked, chat=True, batch_size=4, **OPTIONS)
    with served(url, reader, concurrency=4) as remote:
        found = remote.generate(asked, chat=True, **OPTIONS)
    note("completions of chats, icae-smollm2", sum(a == b for a, b in zip(found, wanted)), len(asked))
    with served(url, reader, engine="vllm-chat", concurrency=4) as remote:
        parts = remote.generate(asked, chat=True, **OPTIONS)
    note("chat parts, icae-smollm2", sum(a == b for a, b in zip(parts, wanted)), len(asked))
    assert found == wanted
    assert all(map(str.strip, parts))


def test_refusals(url, reader, note):
    with served(url, reader) as remote, pytest.raises(RequestRefusedError, match="2048"):
        remote.generate([[reader.identity("word " * 3000), "?"]], 4)
    with ServedReader(url, "no-such-model", EmbeddingTable.of(reader)) as remote, pytest.raises(RequestRefusedError):
        remote.generate(["Hello"], 4)
    (pairs,) = load_compressor("kv-match", reader).compress(["The bridge was opened in 1883."])
    with served(url, reader) as remote, pytest.raises(ValueError, match="keys and values cannot be sent"):
        remote.generate([[pairs, "\nWhen?"]], 4)
    with served(url, reader) as remote:
        assert remote.generate(["Hello"], 4) == reader.generate(["Hello"], 4)
    note("refused: too long, unknown model, keys and values", 3, 3)


def test_a_tuned_reader_is_served_with_its_weights_merged(reader, records, note, tmp_path):
    compressor = load_compressor("mean-pool-smollm2", reader)
    tuned = compressor.reader
    passages = compressor.compress([record.gold_text for record in records], ratio=4, batch_size=4)
    asked = [question_prompt([passage], record.question) for passage, record in zip(passages, records)]
    wanted = tuned.generate(asked, batch_size=4, **OPTIONS)
    with serving(tuned, tmp_path) as address, served(address, tuned, concurrency=16) as remote:
        found = remote.generate(asked, **OPTIONS)
    note("completions, mean-pool-smollm2, tuned reader", sum(a == b for a, b in zip(found, wanted)), len(asked))
    assert found == wanted
