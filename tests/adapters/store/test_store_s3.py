"""A store on object storage, over real HTTP: an S3 server (moto) in this process, whose answers can be spoilt."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import stored_entry as entry
from nutgraf import Reader, make_compressor
from nutgraf.adapters.llama_index import CompressedContextLLM, CompressedContextPostprocessor
from nutgraf.adapters.store import Encoding, LanceStore, StoreError, fill, keys_for
from nutgraf.adapters.store.upkeep import compact, copy, verify
from nutgraf.cli import app
from typer.testing import CliRunner

pytest.importorskip("moto", reason='needs an S3 server: pip install "moto[s3]" flask flask-cors')
pytest.importorskip("flask_cors", reason='needs an S3 server: pip install "moto[s3]" flask flask-cors')

KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "aws_region": "us-east-1"}
TEXTS = [f"In {1600 + i} delegate number {i} signed the treaty of Westphalia, and there was peace." for i in range(5)]


class S3(SimpleNamespace):
    """A running server: ``options`` for lancedb, ``client`` (boto3), and ``refuse``, the HTTP methods it answers 403."""

    options: dict[str, str]
    client: Any
    refuse: set[str]


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server
    from werkzeug.wrappers import Response

    s3 = S3(refuse=set())
    moto = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start: Any) -> Any:
        if environ["REQUEST_METHOD"] in s3.refuse:
            body = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            return Response(body, 403, content_type="application/xml")(environ, start)
        return moto(environ, start)

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None: ...

    http = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{http.server_port}"
    s3.options = KEYS | {"aws_endpoint": url, "allow_http": "true"}
    s3.client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **dict(list(KEYS.items())[:2]))
    yield s3
    http.shutdown()
    thread.join()


@pytest.fixture
def s3(server: S3, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server with an empty bucket, at ``s3.uri``."""
    bucket = "test-" + format(abs(hash(request.node.name)), "x")
    server.client.create_bucket(Bucket=bucket)
    server.bucket, server.uri = bucket, f"s3://{bucket}/passages"
    yield server
    server.refuse.clear()


def opened(s3: S3, **settings: Any) -> LanceStore:
    return LanceStore(s3.uri, storage_options=s3.options, **settings)


def holds(store: LanceStore, *numbers: int, **kwargs: Any) -> bool:
    wanted = [entry(number, **kwargs) for number in numbers]
    found = store.get_many([one.key for one in wanted])
    return all(p is not None and torch.equal(p.embeds, one.passage.embeds) for p, one in zip(found, wanted))


@pytest.mark.slow
def test_passages_are_kept_in_the_table_and_found_by_whoever_opens_it(s3):
    store = opened(s3)
    store.put_many([entry(i) for i in range(6)])
    assert store.layout == "table"  # no file there can be mapped
    assert holds(store, *range(6))
    for again in (opened(s3, create=False), pickle.loads(pickle.dumps(store))):
        assert again.name == store.name
        assert holds(again, 5, 0, 3)
        assert again.missing([entry(2).key, entry(9).key]) == [entry(9).key]
    store.put_many([entry(9)])
    assert holds(again, 9)  # written by another handle
    assert {one.text for one in again.entries()} == {f"passage {i}" for i in (*range(6), 9)}
    assert opened(s3, read_only=True).stats.passages == 7
    with pytest.raises(StoreError, match="read-only"):
        opened(s3, read_only=True).put_many([entry(10)])
    with pytest.raises(ValueError, match=r'Slabs are mapped files.*layout="table"'):
        opened(s3, layout="slabs")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_slots(s3, quantize):
    with opened(s3, quantize=quantize, group=32) as store:
        store.put_many([entry(0)])
    again = opened(s3)
    assert again.encoding == Encoding(quantize=quantize, group=32)
    got = again.get_many([entry(0).key])[0]
    assert torch.allclose(got.embeds, entry(0).passage.embeds, atol=0.02 if quantize == "int8" else 0.3)
    assert again.stats.nbytes < entry(0).passage.nbytes / 2
    with pytest.raises(ValueError, match="holds slots"):
        opened(s3, dtype="float16")


def test_what_a_changed_compressor_makes_is_never_mixed(s3):
    store = opened(s3)
    store.put_many([entry(0), entry(1, compressor="changed")])
    assert holds(store, 0)
    assert store.missing([entry(0, compressor="changed").key]) == [entry(0, compressor="changed").key]
    assert {made.maker.compressor for made in store.stats.makers} == {"compressor", "changed"}


@pytest.mark.slow
def test_writers_at_the_same_time_all_succeed(s3):
    opened(s3)
    stores = [opened(s3) for _ in range(3)]
    errors: list[BaseException] = []

    def write(part: int) -> None:
        try:
            for i in range(2):
                stores[part].put_many([entry(10 * part + i), entry(100 + i)])  # the second by all of them
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    everything = [10 * part + i for part in range(3) for i in range(2)] + [100, 101]
    store = opened(s3)
    assert holds(store, *everything)
    compact(store)
    assert verify(store) == []
    assert len(list(store.entries())) == store.stats.passages == len(everything)


@pytest.mark.slow
def test_compaction_joins_what_was_written_bit_by_bit(s3):
    store, reader = opened(s3), opened(s3)
    for i in range(5):
        store.put_many([entry(i)])
    assert holds(reader, 0)
    before = store.stats.info["versions"]
    with pytest.warns(UserWarning, match="every version"):
        compact(store, keep_hours=0.0)
    assert store.stats.info["versions"] < before
    assert holds(reader, *range(5))  # it held on to a version that is gone
    assert holds(store, *range(5))


def test_refused_writes_leave_the_store_as_it_was(s3):
    store = opened(s3)
    store.put_many([entry(0)])
    s3.refuse.update({"PUT", "POST"})
    with pytest.raises(StoreError, match=r"cannot be written: .*Passages not acknowledged were not stored"):
        store.put_many([entry(1)])
    with pytest.raises(StoreError, match="cannot be opened"):
        LanceStore(s3.uri + "-new", storage_options=s3.options)
    assert holds(store, 0)  # reading goes on
    assert store.missing([entry(1).key]) == [entry(1).key]
    s3.refuse.clear()
    store.put_many([entry(1)])
    assert holds(opened(s3), 0, 1)
    assert verify(store) == []


@pytest.mark.slow
def test_storage_that_does_not_answer_is_told(s3):
    store = opened(s3)
    store.put_many([entry(0)])
    s3.refuse.update({"GET", "HEAD"})
    with pytest.raises(StoreError, match=r"cannot be (read|opened).*credentials right"):
        opened(s3, create=False).get_many([entry(0).key])
    options = s3.options | {"aws_endpoint": "http://127.0.0.1:9", "client_max_retries": "0"}
    with pytest.raises(StoreError, match=r"cannot be opened.*bucket there.*AWS_ACCESS_KEY_ID"):
        LanceStore(s3.uri, storage_options=options)


@pytest.mark.slow
def test_no_bucket_and_no_store(s3):
    with pytest.raises(StoreError, match="NoSuchBucket: The specified bucket does not exist"):
        LanceStore("s3://there-is-none/passages", storage_options=s3.options)
    with pytest.raises(StoreError, match="holds no store"):
        opened(s3, create=False)
    assert "Contents" not in s3.client.list_objects_v2(Bucket=s3.bucket)


def data_files(s3: S3) -> list[str]:
    listed = s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]
    return [one["Key"] for one in listed if "/data/" in one["Key"]]


def test_a_changed_byte_is_noticed_dropped_and_made_good(s3):
    store = opened(s3)
    store.put_many([entry(0), entry(1)])
    (name,) = data_files(s3)
    data = s3.client.get_object(Bucket=s3.bucket, Key=name)["Body"].read()
    slots = entry(1).passage.embeds.numpy().tobytes()
    assert slots in data
    changed = data.replace(slots, slots[:-1] + bytes([slots[-1] ^ 0x55]))
    s3.client.put_object(Bucket=s3.bucket, Key=name, Body=changed)
    again = opened(s3)
    assert holds(again, 0)
    with pytest.raises(StoreError, match="checksum is wrong"):
        again.get_many([entry(1).key])
    assert [problem.key for problem in verify(again, drop=True)] == [entry(1).key.id]
    again.put_many([entry(1)])
    assert holds(again, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["cut", "gone"])
def test_a_truncated_or_missing_file_is_told(s3, lost):
    opened(s3).put_many([entry(0)])
    (name,) = data_files(s3)
    if lost == "cut":
        s3.client.put_object(Bucket=s3.bucket, Key=name, Body=b"0123456789")
    else:
        s3.client.delete_object(Bucket=s3.bucket, Key=name)
    with pytest.raises(StoreError, match="nutgraf store verify"):
        opened(s3).get_many([entry(0).key])


@pytest.mark.slow
def test_a_pipeline_answers_from_it_as_from_memory(s3, zoo, make_index):
    reader = zoo.reader("llama")
    compressor = make_compressor("icae", reader, ratio=4.0)
    index = make_index(TEXTS)

    def ask(**kwargs: Any) -> str:
        post = CompressedContextPostprocessor(compressor, **kwargs)
        llm = CompressedContextLLM(reader, max_new_tokens=8)
        return str(index.as_query_engine(llm=llm, node_postprocessors=[post]).query("Who signed it?"))

    store = opened(s3)
    assert fill(store, compressor, TEXTS).compressed == 5
    kept = store.stats.passages
    assert ask(store=opened(s3)) == ask()
    assert store.stats.passages == kept  # all of it was read, nothing made anew
    local_copy = opened(s3).get_many(keys_for(compressor, TEXTS))
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(local_copy, store.get_many(keys_for(compressor, TEXTS))))


# -- the command line ----------------------------------------------------------------------------------------------------


def run(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    return " ".join(done.output.split())


@pytest.mark.slow
def test_the_commands_take_s3(s3, zoo, tmp_path, monkeypatch):
    for name, value in s3.options.items():  # as a user would: AWS's own variables
        monkeypatch.setenv(name.upper() if name.startswith("aws") else f"AWS_{name.upper()}", value)
    zoo.model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "reader")
    zoo.tokenizer().save_pretrained(tmp_path / "reader")
    compressor = make_compressor("icae", Reader.from_pretrained(str(tmp_path / "reader")), ratio=4.0)
    compressor.save_pretrained(tmp_path / "icae")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    make = ("compress", corpus, "-s", s3.uri, "-c", tmp_path / "icae", "-r", tmp_path / "reader", "--quantize", "int8")
    assert f"5 passages compressed (158 tokens to 40 slots), 0 were stored already, in {s3.uri}" in run(*make)
    assert "0 passages compressed (0 tokens to 0 slots), 5 were stored already" in run(*make)
    assert "5 passages" in (shown := run("store", "show", s3.uri))
    assert "layout: table, encoding: int8" in shown
    assert "0 damaged" in run("store", "verify", s3.uri)
    assert "small files were joined; 0 duplicates removed" in run("store", "compact", s3.uri)
    assert "5 passages copied" in run("store", "migrate", s3.uri, "--to", tmp_path / "local")
    assert "5 passages copied" in run(
        "store", "migrate", tmp_path / "local", "--to", s3.uri + "-2", "--dtype", "float16"
    )
    stored = opened(s3).get_many(keys_for(compressor, TEXTS))
    for passage, again in zip(stored, compressor.compress(TEXTS)):
        assert torch.allclose(passage.embeds, again.embeds, atol=0.05)
    assert copy(opened(s3), LanceStore(tmp_path / "copied")) == 5
    assert "holds no store" in run("store", "show", s3.uri + "-none", status=2)
