"""A server with a store: passages by id and as text, added, listed and deleted; many clients; faults that it outlives."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from nutgraf import load_compressor, make_compressor
from nutgraf.adapters.serve import Limits, create_app
from nutgraf.adapters.serve.batching import AnswerOptions, Batcher, generate
from nutgraf.adapters.serve.cli import is_loopback
from nutgraf.adapters.store import LanceStore, fill, keys_for
from nutgraf.cli import app as nutgraf
from serving import Running, refused
from texts import CURIE, DELEGATES, RIVERS, TREATY
from typer.testing import CliRunner

TEXTS = [TREATY, RIVERS, CURIE, *DELEGATES]
QUESTION = "\nQuestion: who signed it?\nAnswer:"
LIMITS = Limits(max_new_tokens=2000, max_positions=2048, max_wait_ms=30, max_passages=8)
MATCH = {"probes": 4, "ratio": 2.0}


def kinds(reader: Any) -> dict[str, Any]:
    """A compressor of each form of passage."""
    made = {
        "ragged": load_compressor("kv-match", reader=reader, **MATCH),
        "dense": make_compressor("500x", reader, num_mem=6, r=4, ratio=4.0),
        "soft": make_compressor("mean-pool", reader, encoder="embeddings", ratio=4.0),
        "text": make_compressor("selective-context", reader),
    }
    return {name: compressor.eval() for name, compressor in made.items()}


@pytest.fixture(scope="module")
def compressors(reader):
    return kinds(reader)


@pytest.fixture
def store(tmp_path):
    with LanceStore(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def served(reader, compressors, store):
    for compressor in compressors.values():
        fill(store, compressor, TEXTS[:3])
    server = Running(reader, compressor=compressors["ragged"], store=store, limits=LIMITS)
    yield server
    server.stop()


def test_streams_of_short_and_long_prompts_get_their_own_pieces_and_end_on_their_own(reader, compressors):
    (passage,) = compressors["ragged"].compress([TREATY])
    plans = reader.plan([[passage, "\nWho?"], [RIVERS[:60], QUESTION]])
    assert len(plans[0]) > len(plans[1]) > plans[0].run  # read in the other order than by length
    wanted = [reader.generate([plan], 12) for plan in plans]
    batcher = Batcher(reader, Limits(max_wait_ms=500))
    given: list[list[str]] = [[], []]
    answers = [batcher.stream(plan, AnswerOptions(12), into.append) for plan, into in zip(plans, given)]
    found = [answer.result(60) for answer in answers]
    batcher.close()
    assert list(batcher.batches) == [2]
    assert [[answer.text] for answer in found] == wanted
    assert [["".join(pieces)] for pieces in given] == wanted
    for plan, answer in zip(plans, found):
        assert answer == generate(reader, [plan], AnswerOptions(12))[0]


@pytest.fixture(scope="module")
def standing(reader, compressors, tmp_path_factory):
    """A server that no test changes."""
    with LanceStore(tmp_path_factory.mktemp("store") / "s") as store:
        server = Running(reader, compressor=compressors["ragged"], store=store, limits=LIMITS)
        yield server
        server.stop()


def part(text: str | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "passage", **({} if text is None else {"text": text}), **more}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def chat(server: Running, *content: Any, **body: Any) -> str:
    body = {"max_tokens": 6, "temperature": 0, **body}
    answer = server.post("chat/completions", messages=[{"role": "user", "content": list(content)}], **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_64_clients_get_the_serial_answers_whatever_their_passages(served, reader, compressors):
    ids = {kind: [key.id for key in keys_for(c, TEXTS[:3])] for kind, c in compressors.items()}
    made = {kind: c.compress(TEXTS) for kind, c in compressors.items()}
    asked: list[tuple[str, list[Any]]] = []
    wanted = []
    for i in range(64):
        kind = [*compressors, "seen", "plain"][i % 6]
        page = "chat/completions" if i % 4 == 1 else "completions"
        if kind == "plain":
            parts, prompt = [said(f"{i}: {TREATY}")], [f"{i}: {TREATY}"]
        elif kind == "seen":  # compressed by the server
            parts, prompt = [said(f"{i}: "), part(TEXTS[i % 8])], [f"{i}: ", made["ragged"][i % 8]]
        else:  # two passages of two forms
            other = [*compressors][i // 6 % 4]
            parts = [said(f"{i}: "), part(id=ids[kind][i % 3]), part(id=ids[other][0])]
            prompt = [f"{i}: ", made[kind][i % 3], made[other][0]]
        asked.append((page, [*parts, said(QUESTION)]))
        wanted.append(reader.generate([[*prompt, QUESTION]], 6, chat=page.startswith("chat"))[0])

    def ask(number: int) -> str:
        page, parts = asked[number]
        if page.startswith("chat"):
            return chat(served, *parts)
        return served.ask(prompt=parts, max_tokens=6)[0]

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, range(64))) == wanted
    assert len(set(wanted)) > 8
    assert max(served.app.state.batcher.batches) > 4


def test_streams_read_passages(served, reader, compressors):
    (passage,) = compressors["ragged"].compress([TREATY])
    wanted = reader.generate([[passage, QUESTION]], 8)[0]
    body = {"prompt": [part(TREATY), said(QUESTION)], "max_tokens": 8, "temperature": 0, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == wanted


# -- add, list, delete ---------------------------------------------------------------------------------------------------


def test_passages_are_added_listed_read_and_deleted(served, reader, compressors, store):
    texts = DELEGATES[:2]
    new = [{"text": texts[0], "about": {"page": 3}}, {"text": texts[1]}, {"text": texts[1]}]
    added = served.post("passages", passages=new).json()["data"]
    keys = keys_for(compressors["ragged"], texts)
    assert [one["id"] for one in added] == [keys[0].id, keys[1].id, keys[1].id]
    assert added[0]["about"] == {"page": 3}
    assert added[0]["interface"] == "kv"
    with LanceStore(store.uri) as again:  # as another process sees it
        assert not again.missing(keys)
    assert served.post("passages", passages=new).json()["data"] == added
    assert served.http.get(f"/v1/passages/{keys[0].id}").json() == added[0]

    listed, after = [], ""
    while True:
        page = served.http.get("/v1/passages", params={"limit": 5, "after": after}).json()
        listed += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert len(listed) == len(set(listed)) == 4 * 3 + 2
    assert listed == sorted(listed)

    (passage,) = compressors["ragged"].compress(texts[:1])
    wanted = reader.generate([[passage, QUESTION]], 6, chat=True)[0]
    assert chat(served, part(texts[0]), said(QUESTION)) == wanted
    assert chat(served, part(id=keys[0].id), said(QUESTION)) == wanted
    gone = served.http.delete(f"/v1/passages/{keys[0].id}").json()
    assert gone == {"id": keys[0].id, "object": "passage.deleted", "deleted": True}
    assert store.missing(keys) == keys[:1]
    refused(served.http.delete(f"/v1/passages/{keys[0].id}"), 404)
    assert "there is no passage" in refused(served.post(prompt=[part(id=keys[0].id), said("a")]), 404)
    assert chat(served, part(texts[0]), said(QUESTION)) == wanted, "its text still is one, and is stored again"
    assert not store.missing(keys)


BAD = [
    (part(id="0" * 32), 404, "there is no passage"),
    (part(id="x' OR '1'='1"), 404, "there is no passage"),
    (part(), 400, 'needs either "id", or "text"'),
    (part("a", id="b"), 400, 'needs either "id", or "text"'),
    (part(id="b", query="c"), 400, 'needs either "id", or "text"'),
    (part(3), 400, "text must be a string"),
    (part(id=["a"]), 400, "id must be a string"),
    (part("a", data="AA=="), 400, "data is not served"),
    (part("a " * 5000), 400, "positions"),
    ({"type": "image_url"}, 400, "'image_url'"),
]


@pytest.mark.parametrize(("bad", "status", "words"), BAD)
@pytest.mark.parametrize("page", ["completions", "chat/completions"])
def test_bad_passages_are_refused_and_named(standing, page, bad, status, words):
    content = [said("a"), bad, said("b")]
    body = {"prompt": content} if page == "completions" else {"messages": [{"role": "user", "content": content}]}
    answer = standing.post(page, **body, max_tokens=2)
    message = refused(answer, status)
    assert words in message
    assert ("prompt.1" if page == "completions" else "messages.0.content.1") in message
    assert answer.json()["error"]["param"] == ("prompt" if page == "completions" else "messages")


def test_bad_requests_about_passages(standing):
    assert "must not end with a passage" in refused(standing.post(prompt=[said("a"), part(TREATY)], max_tokens=2))
    assert "may name 8 passages" in refused(standing.post(prompt=[*[part(TREATY)] * 9, said("a")], max_tokens=2))
    ragged = [part(TREATY), said(QUESTION)]
    assert "repetition_penalty" in refused(standing.post(prompt=ragged, max_tokens=2, repetition_penalty=1.5))
    for body in ({}, {"passages": []}, {"passages": ["a"]}, {"passages": [{"text": 3}]}, {"texts": ["a"]}):
        refused(standing.post("passages", **body))
    for name in ("nutgraf:text", "nutgraf:also"):
        assert "own" in refused(standing.post("passages", passages=[{"text": "a", "about": {name: "b"}}]))
    assert "positions" in refused(standing.post("passages", passages=[{"text": "a " * 5000}]))
    for limit in ("0", "1001", "many"):
        assert "limit" in refused(standing.http.get("/v1/passages", params={"limit": limit}))
    assert standing.http.get("/v1/passages", params={"after": "x'--"}).json()["has_more"] is False


def test_what_utf8_and_json_cannot_hold_is_no_failure(served):
    lone = r'"\ud800"'
    for page, body in (
        ("completions", f'{{"prompt": "a", {lone}: 1}}'),
        ("completions", f'{{"prompt": "a", "max_tokens": 2, "stop": {lone}}}'),
        (
            "chat/completions",
            f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "text": "a", {lone}: 1}}]}}]}}',
        ),
        ("completions", '{"prompt": [100000000000000000000000], "max_tokens": 2}'),
    ):
        refused(served.http.post(f"/v1/{page}", content=body))
    facts = f'{{"name": {lone}, "price": NaN, "size": 1e999}}'
    added = served.http.post("/v1/passages", content=f'{{"passages": [{{"text": "A new text.", "about": {facts}}}]}}')
    (new,) = added.json()["data"]
    assert new["about"] == {"name": "\ud800", "price": None, "size": None}
    assert new in served.http.get("/v1/passages").json()["data"]
    assert new == served.http.get(f"/v1/passages/{new['id']}").json()


def test_requests_that_add_passages_are_counted_too(reader, compressors, store):
    few = Limits(max_queue=1, max_batch=1, max_streams=1)
    server = Running(reader, compressor=compressors["soft"], store=store, limits=few)
    begun = b"POST /v1/passages HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
    try:
        with ExitStack() as slow:
            for _ in range(3):
                address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
                slow.enter_context(socket.create_connection(address)).sendall(begun)
            until = time.monotonic() + 20
            while server.post("passages", passages=[]).status_code != 429:
                assert time.monotonic() < until
    finally:
        server.stop()


def test_a_server_without_store_or_compressor_says_so(reader, compressors, store):
    fill(store, compressors["soft"], [TREATY])
    (key,) = keys_for(compressors["soft"], [TREATY])
    for options, works, fails in (
        ({"compressor": compressors["soft"]}, part(TREATY), part(id=key.id)),
        ({"store": store}, part(id=key.id), part(TREATY)),
    ):
        server = Running(reader, limits=LIMITS, **options)
        try:
            (passage,) = compressors["soft"].compress([TREATY])
            assert chat(server, works, said(QUESTION)) == reader.generate([[passage, QUESTION]], 6, chat=True)[0]
            assert "start it with --" in refused(server.post(prompt=[fails, said("a")]))
            assert "start it with --" in refused(server.post("passages", passages=[{"text": "a"}]))
        finally:
            server.stop()


def test_a_compressor_for_the_question_needs_it(reader, store):
    compressor = load_compressor("kv-match", reader=reader, score="snapkv", **MATCH)
    server = Running(reader, compressor=compressor, store=store, limits=LIMITS)
    try:
        for query in ("Who signed it?", "When?"):
            (passage,) = compressor.compress([TREATY], query=query)
            wanted = reader.generate([[passage, QUESTION]], 6, chat=True)[0]
            assert chat(server, part(TREATY, query=query), said(QUESTION)) == wanted
        assert len(server.http.get("/v1/passages").json()["data"]) == 2
        assert 'needs "query"' in refused(server.post(prompt=[part(TREATY), said("a")]))
        assert "cannot be stored ahead" in refused(server.post("passages", passages=[{"text": "a"}]))
    finally:
        server.stop()


def test_a_compressor_of_another_reader_is_refused(zoo, reader):
    other = zoo.reader("llama", seed=1, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"serve compressor\.reader"):
        create_app(reader, compressor=load_compressor("kv-match", reader=other, **MATCH))
    with pytest.raises(TypeError, match="must be a nutgraf compressor"):
        create_app(reader, compressor="kv-match")  # type: ignore[arg-type]


# -- faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_refuses_what_it_cannot_keep_and_answers_go_on(served, compressors, store):
    wanted = chat(served, part(TREATY), said(QUESTION))
    texts = [f"{text} {RIVERS * 4}" for text in DELEGATES]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in Path(store.uri).rglob("*") if path.is_file())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 1000, hard))  # no file may grow beyond it
    try:
        message = refused(served.post("passages", passages=[{"text": text} for text in texts]), 507)
        assert "full" in message
        assert store.uri not in message
        assert chat(served, part(texts[0]), said(QUESTION)), "a text that cannot be stored is read all the same"
        assert chat(served, part(TREATY), said(QUESTION)) == wanted
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(store.missing(keys_for(compressors["ragged"], texts))) == len(texts)
    assert len(served.post("passages", passages=[{"text": text} for text in texts]).json()["data"]) == len(texts)


def test_a_damaged_passage_is_an_error_and_the_others_are_read(reader, compressors, tmp_path):
    with LanceStore(tmp_path / "s") as store:
        fill(store, compressors["ragged"], [TREATY])
        fill(store, compressors["ragged"], [RIVERS])
    (slab,) = (tmp_path / "s" / "slabs").glob("*.slab")
    os.truncate(slab, slab.stat().st_size - 100)
    with LanceStore(tmp_path / "s") as store:
        server = Running(reader, store=store, limits=LIMITS)
        try:
            good, bad = (key.id for key in keys_for(compressors["ragged"], [TREATY, RIVERS]))
            message = refused(server.post(prompt=[part(id=bad), said("a")]), 500)
            assert "cannot be read" in message
            assert str(tmp_path) not in message
            assert chat(server, part(id=good), said(QUESTION))
        finally:
            server.stop()


@pytest.mark.slow
def test_a_client_that_sends_or_reads_too_slowly_frees_its_place(reader, compressors):
    server = Running(reader, compressor=compressors["soft"], limits=Limits(max_streams=1, timeout_s=0.5))
    try:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
            slow.settimeout(20)
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        assert server.ask(prompt="Hello", max_tokens=2)
    finally:
        server.stop()


async def test_a_stream_that_no_client_reads_ends(reader):
    """The application itself, as uvicorn calls it: its `send` waits while the connection's buffer is full."""
    app = create_app(reader, name="tiny", limits=Limits(max_streams=1, timeout_s=0.3))
    body = json.dumps({"prompt": "Hello", "max_tokens": 40, "stream": True, "temperature": 0}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    scope |= {"http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}}

    async def call(stuck: bool) -> list[Any]:
        sent: list[Any] = []
        requests = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            return next(requests, None) or await asyncio.sleep(60)

        async def send(message: Any) -> None:
            if stuck and len(sent) > 1:
                await asyncio.sleep(60)
            sent.append(message)

        await asyncio.wait_for(app({**scope}, receive, send), 20)
        return sent

    assert len(await call(stuck=True)) == 2
    whole = await call(stuck=False)  # its place is free
    assert whole[0]["status"] == 200
    assert b"[DONE]" in b"".join(message.get("body", b"") for message in whole)
    app.state.batcher.close()


def test_every_page_but_health_and_metrics_needs_the_key(reader, compressors, store):
    server = Running(reader, compressor=compressors["ragged"], store=store, limits=LIMITS, api_key="sesame")
    try:
        pages = [route for route in server.app.routes if route.path not in ("/health", "/metrics")]
        assert len(pages) >= 8
        for route in pages:
            for method in route.methods - {"HEAD"}:
                for key in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"}):
                    path = route.path.replace("{name:path}", "a").replace("{name}", "a")
                    answer = server.http.request(method, path, headers=key, content=b"{}")
                    assert "API key" in refused(answer, 401), route.path
        headers = {"Authorization": "Bearer sesame"}
        assert server.http.get("/v1/passages", headers=headers).status_code == 200
        assert server.http.get("/health").status_code == server.http.get("/metrics").status_code == 200
    finally:
        server.stop()


def test_metrics_count_what_was_done(reader, compressors, store):
    server = Running(reader, compressor=compressors["ragged"], store=store, limits=LIMITS)
    try:
        (one,) = server.post("passages", passages=[{"text": RIVERS}]).json()["data"]
        chat(server, part(id=one["id"]), part(TREATY), part(TREATY), said(QUESTION))
        server.ask(prompt="Hello", max_tokens=5, stop=None)
        refused(server.post(prompt=[part(id="a"), said("b")]), 404)
        shown = server.http.get("/metrics")
        assert shown.headers["content-type"].startswith("text/plain")
        values = dict(line.rsplit(" ", 1) for line in shown.text.splitlines() if line[0] != "#")
        assert float(values['nutgraf_requests_total{page="/v1/completions",status="200"}']) == 1
        assert float(values['nutgraf_requests_total{page="/v1/completions",status="404"}']) == 1
        assert float(values['nutgraf_passages_total{how="by_id"}']) == 1
        assert float(values['nutgraf_passages_total{how="compressed"}']) == 2
        assert float(values["nutgraf_batch_prompts_count"]) == 2
        assert float(values["nutgraf_answer_tokens_total"]) == 6 + 5
        assert float(values["nutgraf_waiting_prompts"]) == 0
    finally:
        server.stop()


# -- the command, stopped and killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "only_here"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.2", False), ("example.org", False), ("", False), ("127.0.0.1.example.org", False)],
)  # fmt: skip
def test_only_this_machine_is_served_without_a_key(host, only_here):
    assert is_loopback(host) is only_here
    if not only_here:
        done = CliRunner().invoke(nutgraf, ["serve", "--reader", "no-such-reader", "--host", host])
        assert done.exit_code == 2
        assert "NUTGRAF_API_KEY" in done.output


@pytest.mark.parametrize("keys", ["a,", "a,b c", ","])
def test_bad_keys_are_refused_before_the_reader_is_loaded(keys):
    done = CliRunner().invoke(nutgraf, ["serve", "--reader", "no-such-reader"], env={"NUTGRAF_API_KEY": keys})
    assert done.exit_code == 2
    assert "API key" in done.output


@pytest.mark.slow
def test_a_stopped_server_finishes_its_answers(zoo, tmp_path):
    folder = str(zoo.saved("llama", tmp_path / "reader"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--reader", folder, "--name", "tiny", "--port", str(port), "--device", "cpu", "--max-new-tokens", "3000"]
    options += ["--store", str(tmp_path / "s"), "--compressor", "kv-match:probes=4", "--ratio", "2"]
    code = "from nutgraf.cli import app; app()"
    process = subprocess.Popen([sys.executable, "-c", code, "serve", *options], stderr=subprocess.PIPE)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while True:
                try:
                    assert http.get("/health").json()["status"] == "ok"
                    break
                except httpx.ConnectError:
                    assert process.poll() is None
                    time.sleep(0.1)
            (one,) = http.post("/v1/passages", json={"passages": [{"text": TREATY}]}).json()["data"]
            body = {"prompt": [part(id=one["id"]), said(QUESTION)], "max_tokens": 400, "temperature": 0}
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(http.post, "/v1/completions", json=body)
                time.sleep(0.4)
                process.send_signal(signal.SIGTERM)
                answer = asked.result()
            assert answer.status_code == 200
            assert answer.json()["choices"][0]["text"]
        assert process.wait(30) in (0, -signal.SIGTERM)  # uvicorn passes the signal on when all is done
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
    with LanceStore(tmp_path / "s", create=False) as store:
        assert store.listed([one["id"]])


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_nothing_that_it_acknowledged(tmp_path):
    driver = Path(__file__).with_name("killed_server.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path / "s"), "8"], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] == 8
    assert found["added"] > 12
    assert found["deleted"] > 2
    assert found["lost"] == found["back"] == found["damaged"] == []
