"""`ServedReader` over real HTTP, against an engine written from the documented formats alone."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import warnings
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import legacy
import pytest
import torch
from nutgraf import CompressedPassage, Reader, make_compressor
from nutgraf.adapters.llama_index import CompressedContextLLM
from nutgraf.adapters.openai import (
    EmbeddingTable,
    KnownBugError,
    KnownBugWarning,
    RequestRefusedError,
    ServedReader,
    ServerFaultError,
    ServerTimeoutError,
    ServerUnavailableError,
    StreamCutError,
    UnexpectedAnswerError,
)
from nutgraf.compressors import ReaderMismatchError
from texts import TREATY

PASSAGE = TREATY
QUESTION = "\nQuestion: who signed it?\nAnswer:"


class Engine:
    """Stands in for vLLM and SGLang: their requests as documented, decoded and run with transformers alone."""

    def __init__(self, reader: Reader) -> None:
        self.model, self.tokenizer = reader.model, reader.tokenizer
        self.requests: list[tuple[str, dict[str, Any], Any]] = []
        self.faults: deque[str] = deque()
        self.always: str | None = None
        self.pages: dict[str, Any] = {}  # /tokenize: a tokenizer
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = engine.pages.get(self.path)
                self.reply(200 if page is not None else 404, page or "{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    spell = engine.pages.get(self.path)
                    if body.get("model", "") is None:  # both engines then want a name
                        return self.reply(422, "{}")
                    ids = (
                        spell(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
                        if spell
                        else []
                    )
                    return self.reply(200 if spell else 404, json.dumps({"tokens": ids} if spell else {}))
                engine.requests.append((self.path, body, self.headers))
                fault = engine.faults.popleft() if engine.faults else engine.always
                if fault == "slow":
                    time.sleep(1.5)
                elif fault == "drop":
                    self.connection.close()
                    return
                elif fault == "no json":
                    return self.reply(200, "<html>hello</html>")
                elif fault == "no choices":
                    return self.reply(200, "{}")
                elif fault is not None and fault.isdigit():
                    return self.reply(int(fault), json.dumps({"error": {"message": f"fault {fault}"}}))
                elif fault == "embeds 500" and ("prompt_embeds" in body or "input_embeds" in body):
                    return self.reply(500, "EngineDeadError")
                try:
                    text = engine.answer(self.path, body)
                except ValueError as error:
                    return self.reply(400, json.dumps({"error": {"message": str(error)}}))
                if not body.get("stream"):
                    return self.reply(200, json.dumps(engine.whole(self.path, text)))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
                for i, event in enumerate(engine.events(self.path, pieces)):
                    if fault == "cut" and i == 1:
                        return
                    if fault == "error event" and i == 1:
                        event = {"error": {"message": "out of memory"}}
                    if fault is not None and fault.startswith("abort") and i == 1:
                        status = int(fault.split()[1])
                        ended = {"type": "abort", "message": "out of memory", "status_code": status or None}
                        event = {**event, "meta_info": {"finish_reason": ended}}
                    if fault == "refusal event":
                        event = {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}
                    if fault == "two answers" and "choices" in event:
                        other = {**event["choices"][0], "text": "WRONG", "delta": {"content": "WRONG"}, "index": 1}
                        event["choices"][0]["index"] = 0
                        self.wfile.write(f"data: {json.dumps({'choices': [other]})}\n\n".encode())
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

            def reply(self, status: int, body: str) -> None:
                data = body.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    # -- the formats -------------------------------------------------------------------------------------------------

    def answer(self, path: str, body: dict[str, Any]) -> str:
        if path == "/generate":
            params = body["sampling_params"]
            embeds = torch.tensor(body["input_embeds"]) if "input_embeds" in body else self.embed(body["input_ids"])
            return self.run(embeds, params["max_new_tokens"], params.get("stop"), params["temperature"])
        if path == "/v1/chat/completions":
            embeds = self.embed_chat(body["messages"])
        elif body.get("prompt_embeds"):
            if body.get("prompt") is not None:  # vLLM takes it for a second prompt
                raise ValueError("The decoder prompt cannot be empty")
            embeds = self.decode(body["prompt_embeds"])
        else:
            embeds = self.embed(body["prompt"])
        if len(body.get("stop") or []) > 4:
            raise ValueError("List should have at most 4 items after validation")
        return self.run(embeds, body["max_tokens"], body.get("stop"), body["temperature"])

    @staticmethod
    def decode(data: str) -> torch.Tensor:
        tensor = torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True, map_location="cpu")
        if tensor.dim() != 2 or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"bad prompt_embeds: {tensor.shape}, {tensor.dtype}")
        return tensor

    def embed(self, ids: list[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor(ids))

    def embed_chat(self, messages: list[dict[str, Any]]) -> torch.Tensor:
        mark, tensors, plain = "@EMBEDS@", [], []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                tensors += [self.decode(part["data"]) for part in content if part["type"] == "prompt_embeds"]
                content = "".join(part["text"] if part["type"] == "text" else mark for part in content)
            plain.append({"role": message["role"], "content": content})
        prompt = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        rows = []
        for i, text in enumerate(prompt.split(mark)):
            rows += [tensors[i - 1]] if i else []
            rows.append(self.embed(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        return torch.cat(rows)

    @torch.no_grad()
    def run(self, embeds: torch.Tensor, max_tokens: int, stop: Any, temperature: float) -> str:
        if embeds.shape[1] != self.model.get_input_embeddings().weight.shape[1]:
            raise ValueError(f"the width is {embeds.shape[1]}")
        assert temperature == 0
        out = self.model.generate(
            inputs_embeds=embeds[None].float(),
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        text = self.tokenizer.decode(out[0], skip_special_tokens=True)
        for s in stop or []:
            text = text.split(s)[0]
        return text

    @staticmethod
    def whole(path: str, text: str) -> dict[str, Any]:
        if path == "/generate":
            return {"text": text, "meta_info": {}}
        return {"choices": [{"message": {"content": text}} if "chat" in path else {"text": text}]}

    @staticmethod
    def events(path: str, pieces: list[str]) -> list[dict[str, Any]]:
        if path == "/generate":
            return [{"text": "".join(pieces[: i + 1])} for i in range(len(pieces))]
        if "chat" in path:
            return [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        return [{"choices": [{"text": piece}]} for piece in pieces]


@pytest.fixture(scope="module")
def passage(reader) -> CompressedPassage:
    (made,) = make_compressor("mean-pool", reader, encoder="embeddings").compress([PASSAGE], ratio=4)
    assert 0 < made.slots < made.source_tokens
    return made


@pytest.fixture(scope="module")
def server(reader):
    engine = Engine(reader)
    yield engine
    engine.server.shutdown()


@pytest.fixture
def engine(server) -> Engine:
    server.requests.clear()
    server.faults.clear()
    server.pages.clear()
    server.always = None
    return server


def served(server: Engine, reader: Any, **options: Any) -> ServedReader:
    return ServedReader(f"{server.url}/v1", "tiny", reader, **{"backoff": 0.01, "timeout": 20.0, **options})


ENGINES = ["vllm", "vllm-chat", "sglang"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_compressed_passages_and_text_get_the_local_readers_answers(engine, reader, passage, kind):
    chat = kind == "vllm-chat"
    prompts = [["About: ", passage, QUESTION], PASSAGE + QUESTION, [reader.identity(PASSAGE), QUESTION]]
    wanted = reader.generate(prompts, max_new_tokens=12, chat=chat)
    assert len(set(wanted)) == 2, "the compressed passage must matter, its own embeddings must read as text"
    assert wanted[1] == wanted[2]
    with served(engine, reader, engine=kind) as remote:
        assert remote.generate(prompts, max_new_tokens=12, chat=chat) == wanted
        assert ["".join(remote.stream(prompt, max_new_tokens=12, chat=chat)) for prompt in prompts] == wanted
    assert {path for path, _, _ in engine.requests} == {
        {"vllm": "/v1/completions", "vllm-chat": "/v1/chat/completions", "sglang": "/generate"}[kind]
    }
    assert engine.requests[0][2]["X-Nutgraf-Reader"] == reader.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_chat_templates_are_applied_here(engine, reader, passage, kind):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [passage, QUESTION]}]
    wanted = reader.generate([messages], max_new_tokens=12, chat=True)
    assert served(engine, reader, engine=kind).generate([messages], max_new_tokens=12, chat=True) == wanted
    plans = reader.plan([messages], chat=True)
    assert served(engine, reader, engine=kind).generate(plans, max_new_tokens=12) == wanted


def test_chat_parts_stand_in_order_and_text_stays_text(engine, reader, passage):
    messages = [
        {"role": "system", "content": "Be \ud800brief."},
        {"role": "user", "content": ["A", passage, "B", "C", passage]},
    ]
    served(engine, reader, engine="vllm-chat", dtype=torch.bfloat16).generate([messages], 4)
    _, body, _ = engine.requests[-1]
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be \ufffdbrief."}
    assert [part["type"] for part in user["content"]] == ["text", "prompt_embeds", "text", "prompt_embeds"]
    assert [part.get("text") for part in user["content"]] == ["A", None, "BC", None]
    sent = Engine.decode(user["content"][1]["data"])
    assert torch.equal(sent, passage.embeds.to(torch.bfloat16))
    assert body["model"] == "tiny"
    assert body["temperature"] == 0


def test_a_slice_is_sent_without_the_tensor_that_it_views(engine, reader):
    big = torch.randn(5000, reader.width)
    made = CompressedPassage("embeds", 9, "test", reader.fingerprint, embeds=big[:2])
    served(engine, reader, engine="vllm-chat").generate([[made, "Go"]], 2)
    part = engine.requests[-1][1]["messages"][0]["content"][0]
    assert len(part["data"]) < 4000


def test_stop_strings_and_sampling_are_passed_on(engine, reader):
    remote = served(engine, reader)
    whole = remote.generate([PASSAGE], 12)[0]
    stop = whole[4:6]
    assert remote.generate([PASSAGE], 12, stop=[stop]) == reader.generate([PASSAGE], 12, stop=[stop])
    with pytest.raises(ValueError, match="num_beams"):
        remote.generate([PASSAGE], 12, num_beams=4)
    with pytest.raises(ValueError, match="max_new_tokens"):
        remote.generate([PASSAGE], 0)
    from nutgraf.adapters.openai.payload import Settings

    assert Settings.of(3, "x", {"do_sample": True, "top_p": 0.5}).sampling == {"top_p": 0.5, "temperature": 1.0}
    assert Settings.of(3, None, {"temperature": 0.7}).sampling == {"temperature": 0.7}
    assert Settings.of(3, None, {"do_sample": False, "temperature": 0.7}).sampling == {"temperature": 0.0}


@pytest.mark.slow
async def test_async_forms_give_the_same_and_leave_the_loop_free(engine, reader, passage):
    import asyncio

    prompt = [passage, QUESTION]
    remote = served(engine, reader, known_bugs="ignore")
    wanted = reader.generate([prompt], 12)
    engine.faults.extend(["slow"])
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.05)
            ticks += 1

    ticking = asyncio.create_task(tick())
    assert await remote.agenerate([prompt], 12) == wanted
    assert ticks >= 10
    assert "".join([piece async for piece in remote.astream(prompt, 12)]) == wanted[0]
    ticking.cancel()


# -- the embedding table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_embedding_table_of_a_checkpoint_gives_the_readers_embeddings(zoo, tmp_path, architecture):
    local = zoo.reader(architecture)
    local.model.save_pretrained(tmp_path, max_shard_size="50KB")
    local.tokenizer.save_pretrained(tmp_path)
    (made,) = make_compressor("mean-pool", local, encoder="embeddings").compress([PASSAGE], ratio=4)
    table = EmbeddingTable.from_pretrained(tmp_path, fingerprint=local.fingerprint)
    (plan,) = table.plan([["About: ", made, QUESTION]])
    (wanted,) = EmbeddingTable.of(local).plan([["About: ", made, QUESTION]])
    assert plan.ids == wanted.ids
    assert torch.equal(table.embed(plan), EmbeddingTable.of(local).embed(wanted))
    assert table.max_positions == local.max_positions


def test_embedding_table_of_a_checkpoint_without_safetensors(zoo, tmp_path):
    zoo.model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no safetensors"):
        EmbeddingTable.from_pretrained(tmp_path, fingerprint="x", tokenizer=zoo.tokenizer())


# -- what cannot be sent -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_keys_and_values_are_refused(engine, reader, kind):
    kv = CompressedPassage(
        "kv",
        9,
        "test",
        reader.fingerprint,
        keys=(torch.zeros(2, 3, 8),),
        values=(torch.zeros(2, 3, 8),),
        positions=torch.arange(3),
    )
    with pytest.raises(ValueError, match="keys and values cannot be sent"):
        served(engine, reader, engine=kind).generate([[kv, QUESTION]])
    assert not engine.requests
    remote = served(engine, reader, engine=kind, fallback="text")
    wanted = reader.generate([PASSAGE + QUESTION], 8, chat=kind == "vllm-chat")
    assert remote.generate([[kv, QUESTION]], 8, texts=[[PASSAGE]]) == wanted
    assert "".join(remote.stream([kv, QUESTION], 8, texts=[PASSAGE])) == wanted[0]


@pytest.mark.parametrize("kind", ENGINES)
def test_passages_that_would_be_misread_are_refused(engine, reader, passage, kind):
    remote = served(engine, reader, engine=kind)
    width = reader.width
    other = CompressedPassage("embeds", 9, "test", "another reader", embeds=torch.zeros(2, width))
    with pytest.raises(ReaderMismatchError, match="another reader"):
        remote.generate([[other, QUESTION]])
    wide = CompressedPassage("embeds", 9, "test", reader.fingerprint, embeds=torch.zeros(2, width + 1))
    with pytest.raises(ValueError, match=f"must be {width} wide"):
        remote.generate([[wide, QUESTION]])
    nan = CompressedPassage("embeds", 9, "test", reader.fingerprint, embeds=torch.full((2, width), float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        remote.generate([[nan, QUESTION]])
    assert not engine.requests


# -- faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_then_success(engine, reader, passage):
    prompt = [passage, QUESTION]
    wanted = reader.generate([prompt], 8)
    for faults in (["500", "503", "429"], ["drop", "502"]):
        engine.faults.extend(faults)
        remote = served(engine, reader)
        assert remote.generate([prompt], 8) == wanted
        engine.faults.extend(faults)
        assert "".join(remote.stream(prompt, 8)) == wanted[0]
    assert len(engine.requests) == 2 * (4 + 3)


@pytest.mark.slow
def test_retries_are_bounded_and_backed_off(engine, reader):
    engine.always = "500"
    start = time.monotonic()
    with pytest.raises(ServerFaultError, match="500: fault 500") as caught:
        served(engine, reader, retries=2, backoff=0.2).generate(["Hello"])
    assert caught.value.status == 500
    assert len(engine.requests) == 3
    assert time.monotonic() - start >= 0.75 * (0.2 + 0.4)


def test_refusals_are_not_tried_again(engine, reader):
    engine.always = "404"
    with pytest.raises(RequestRefusedError, match="fault 404"):
        served(engine, reader).generate(["Hello"])
    assert len(engine.requests) == 1


@pytest.mark.parametrize("fault", ["no json", "no choices"])
def test_answers_of_another_form(engine, reader, fault):
    engine.always = fault
    with pytest.raises(UnexpectedAnswerError):
        served(engine, reader).generate(["Hello"])
    assert len(engine.requests) == 1


@pytest.mark.slow
def test_slow_and_absent_servers(engine, reader):
    engine.always = "slow"
    with pytest.raises(ServerTimeoutError, match=r"within 0\.3 s"):
        served(engine, reader, timeout=0.3, retries=1).generate(["Hello"])
    assert len(engine.requests) == 2
    with pytest.raises(ServerTimeoutError):
        list(served(engine, reader, timeout=0.3, retries=0).stream("Hello"))
    with pytest.raises(ServerUnavailableError, match="cannot be reached"):
        ServedReader("http://127.0.0.1:9", "tiny", reader, retries=1, backoff=0.01).generate(["Hello"])


def test_a_cut_stream_is_told_from_a_complete_one(engine, reader):
    wanted = reader.generate([PASSAGE], 12)[0]
    engine.faults.append("cut")
    pieces: list[str] = []
    with pytest.raises(StreamCutError) as caught:
        pieces.extend(served(engine, reader).stream(PASSAGE, 12))
    assert pieces
    assert wanted.startswith(caught.value.text)
    assert caught.value.text == "".join(pieces)
    assert len(engine.requests) == 1, "what was given cannot be taken back, so it is not tried again"
    engine.faults.append("error event")
    pieces.clear()
    with pytest.raises(ServerFaultError, match="out of memory") as failed:
        pieces.extend(served(engine, reader).stream(PASSAGE, 12))
    assert failed.value.text == "".join(pieces) != ""


@pytest.mark.parametrize(
    ("status", "error"), [(0, ServerFaultError), (503, ServerFaultError), (400, RequestRefusedError)]
)
def test_an_answer_that_sglang_aborts_is_not_taken_for_a_whole_one(engine, reader, status, error):
    engine.faults.append(f"abort {status}")
    with pytest.raises(error, match="out of memory") as caught:
        list(served(engine, reader, engine="sglang").stream(PASSAGE, 12))
    assert caught.value.text != ""
    assert reader.generate([PASSAGE], 12)[0].startswith(caught.value.text)


def test_a_refusal_inside_a_stream_is_not_tried_again(engine, reader):
    engine.faults.append("refusal event")
    with pytest.raises(RequestRefusedError, match="too long") as caught:
        list(served(engine, reader).stream(PASSAGE, 12))
    assert caught.value.status == 400
    assert len(engine.requests) == 1


@pytest.mark.parametrize("kind", ["vllm", "vllm-chat"])
def test_a_second_answer_in_a_stream_is_left_out(engine, reader, kind):
    engine.faults.append("two answers")
    wanted = reader.generate([PASSAGE], 12, chat=kind == "vllm-chat")
    assert "".join(served(engine, reader, engine=kind).stream(PASSAGE, 12)) == wanted[0]


def test_the_first_of_several_faults_is_told(engine, reader):
    engine.faults.extend(["500", "503", "drop"])
    with pytest.raises(StreamCutError, match=r"cut the connection .*\(At first: .* 500: fault 500\)"):
        served(engine, reader, retries=2).generate(["Hello"])


@pytest.mark.parametrize("kind", ENGINES)
def test_numbers_that_do_not_fit_the_dtype_sent_are_refused(engine, reader, kind):
    large = CompressedPassage("embeds", 9, "test", reader.fingerprint, embeds=torch.full((2, reader.width), 1e5))
    remote = served(engine, reader, engine=kind, dtype=torch.float16)
    with pytest.raises(ValueError, match="up to 100000 do not fit float16"):
        remote.generate([[large, QUESTION]])
    assert not engine.requests
    assert served(engine, reader, engine=kind, dtype=torch.bfloat16).generate([[large, QUESTION]], 2)


def test_chats_with_slots_have_a_cache_salt_and_vllms_own_options_stand_outside_of_the_templates(
    engine, reader, passage
):
    remote = served(engine, reader, engine="vllm-chat")
    template = {"add_generation_prompt": False, "thinking": True}
    remote.generate([[passage, "Go"], [passage, "Go"], "Go"], 2, template=template)
    bodies = [body for _, body, _ in engine.requests]
    salts = [body.get("cache_salt") for body in bodies if not isinstance(body["messages"][0]["content"], str)]
    assert len({*salts, None}) == 3
    assert next(body for body in bodies if "cache_salt" not in body)["messages"][0]["content"] == "Go"
    for body in bodies:
        assert (body["add_generation_prompt"], body["chat_template_kwargs"]) == (False, {"thinking": True})
    with pytest.raises(ValueError, match="message 1 is"):
        remote.generate([[{"role": "user", "content": "a"}, {"role": "assistant"}]])


def test_the_servers_window(engine, reader):
    remote = served(engine, reader)
    assert remote.served_positions() is None
    engine.pages["/v1/models"] = json.dumps(
        {"data": [{"id": "x", "max_model_len": 9}, {"id": "tiny", "max_model_len": 77}]}
    )
    assert remote.served_positions() == 77
    assert CompressedContextLLM(remote).context_window == 77
    assert CompressedContextLLM(remote, context_window=50).context_window == 50
    engine.pages["/v1/models"] = json.dumps({"data": [{"id": "tiny", "max_model_len": None}]})
    assert CompressedContextLLM(remote).context_window == reader.max_positions


def test_text_fallback(engine, reader, passage):
    prompt = ["About: ", passage, QUESTION]
    as_text = reader.generate([f"About: {PASSAGE}{QUESTION}"], 8)
    engine.always = "embeds 500"
    with pytest.raises(ServerFaultError):
        served(engine, reader, retries=1).generate([prompt], 8)
    remote = served(engine, reader, retries=1, fallback="text")
    engine.requests.clear()
    assert remote.generate([prompt], 8, texts=[[PASSAGE]]) == as_text
    assert ["prompt_embeds" in body for _, body, _ in engine.requests] == [True, True, False]
    assert "".join(remote.stream(prompt, 8, texts=[PASSAGE])) == as_text[0]
    with pytest.raises(ValueError, match="pass texts"):
        remote.generate([prompt], 8)
    with pytest.raises(ValueError, match="one text per compressed passage"):
        remote.generate([prompt], 8, texts=[[PASSAGE, PASSAGE]])


# -- known bugs ----------------------------------------------------------------------------------------------------------


def test_lora_with_prompt_embeddings_is_warned_of(engine, reader, passage):
    models = [{"id": "tiny", "parent": None}, {"id": "adapter", "parent": "tiny"}]
    engine.pages["/v1/models"] = json.dumps({"data": models})
    remote = served(engine, reader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remote.generate(["no passages"], 2)
    with pytest.warns(KnownBugWarning, match="holds LoRA adapters"):
        remote.generate([[passage, QUESTION]], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remote.generate([[passage, QUESTION]], 2)  # warned once
    strict = served(engine, reader, known_bugs="raise")
    with pytest.raises(KnownBugError, match="holds LoRA adapters"):
        strict.generate([[passage, QUESTION]], 2)
    adapter = ServedReader(engine.url, "adapter", reader)
    with pytest.raises(KnownBugError, match="merge the adapter"):
        adapter.generate([[passage, QUESTION]], 2)
    assert adapter.generate(["no passages"], 2)
    assert ServedReader(engine.url, "adapter", reader, known_bugs="ignore").generate([[passage, QUESTION]], 2)


PARTS = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}
{%- endfor %}{% endif %}{% endfor %}"""


def test_newlines_between_the_parts_of_vllms_chats_are_warned_of(engine, reader, passage, monkeypatch):
    prompt = ["About: ", passage, QUESTION]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for owner, kind in (("nutgraf", "vllm-chat"), ("vllm", "vllm")):
            engine.pages["/v1/models"] = json.dumps({"data": [{"id": "tiny", "owned_by": owner}]})
            served(engine, reader, engine=kind).generate([prompt], 2)
        monkeypatch.setattr(reader.tokenizer, "chat_template", PARTS)
        served(engine, reader, engine="vllm-chat").generate([prompt], 2)
        monkeypatch.undo()
    with pytest.warns(KnownBugWarning, match="chat=True"):
        served(engine, reader, engine="vllm-chat").generate([prompt], 2)
    with pytest.raises(KnownBugError, match="newlines"):
        served(engine, reader, engine="vllm-chat", known_bugs="raise").generate([prompt], 2)


def test_sglang_with_its_radix_cache_is_refused(engine, reader, passage):
    engine.pages["/get_server_info"] = json.dumps({"disable_radix_cache": False})
    with pytest.raises(KnownBugError, match="--disable-radix-cache"):
        served(engine, reader, engine="sglang").generate([[passage, QUESTION]], 2)
    remote = served(engine, reader, engine="sglang", fallback="text")
    wanted = reader.generate([PASSAGE + QUESTION], 8)
    assert remote.generate([[passage, QUESTION]], 8, texts=[[PASSAGE]]) == wanted
    engine.pages.clear()
    info = {"disable_radix_cache": True, "chunked_prefill_size": 2048, "dtype": "auto"}
    for more in ({}, {"version": "0.5.9.post1"}, {"version": "main"}):
        engine.pages["/server_info"] = json.dumps(info | more)
        with pytest.warns(KnownBugWarning, match="chunked-prefill-size"):
            served(engine, reader, engine="sglang").generate([[passage, QUESTION]], 2)
    engine.pages["/server_info"] = json.dumps(info | {"version": "0.5.23"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        served(engine, reader, engine="sglang").generate([[passage, QUESTION]], 2)
    engine.pages["/server_info"] = json.dumps(info | {"version": "0.5.23", "dtype": "float16"})
    with pytest.warns(KnownBugWarning, match="--dtype bfloat16"):
        served(engine, reader, engine="sglang").generate([[passage, QUESTION]], 2)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_server_with_another_tokenizer_is_refused(engine, reader, passage, kind):
    engine.pages["/tokenize"] = engine.tokenizer
    assert served(engine, reader, engine=kind).generate([[passage, QUESTION]], 2)
    engine.pages["/tokenize"] = legacy.tokenizer("prepend")
    if kind == "sglang":
        nameless = ServedReader(engine.url, None, reader, engine=kind)
        with pytest.raises(ReaderMismatchError, match="another tokenizer"):
            nameless.generate([[passage, QUESTION]], 2)
    remote = served(engine, reader, engine=kind, fallback="text")
    with pytest.raises(ReaderMismatchError, match="another tokenizer"):
        remote.generate([[passage, QUESTION]], 2, texts=[[PASSAGE]])
    with pytest.raises(ReaderMismatchError, match="another tokenizer"):
        next(remote.stream([passage, QUESTION], 2, texts=[PASSAGE]))
    engine.pages.clear()  # a server that cannot be asked is not refused
    assert served(engine, reader, engine=kind).generate([[passage, QUESTION]], 2)


@pytest.mark.parametrize("kind", ENGINES)
def test_more_stop_strings_than_the_format_takes(engine, reader, kind):
    remote = served(engine, reader, engine=kind)
    chat = kind == "vllm-chat"
    whole = reader.generate([QUESTION], 20, chat=chat)[0]
    for stop in (whole[6:9], whole[4:12], whole[3]):
        many = ["@1@", "@2@", "@3@", "@4@", "@5@", stop]
        want = reader.generate([QUESTION], 20, chat=chat, stop=many)
        assert want[0] != whole
        assert remote.generate([QUESTION], 20, stop=many) == want
        assert "".join(remote.stream(QUESTION, 20, stop=many)) == want[0]
    assert "".join(remote.stream(QUESTION, 20, stop=[*many[:5], f"{whole[-3:]}?"])) == whole


@pytest.mark.slow
def test_bad_arguments(reader):
    for wrong in (
        {"engine": "tgi"},
        {"fallback": "summary"},
        {"timeout": 0},
        {"retries": -1},
        {"known_bugs": "hide"},
    ):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            ServedReader("http://localhost:1", "tiny", reader, **wrong)
    with pytest.raises(ValueError, match="http"):
        ServedReader("localhost:1", "tiny", reader)
    with pytest.raises(ValueError, match="name"):
        ServedReader("http://localhost:1", None, reader)
    with pytest.raises(TypeError, match="list of prompts"):
        ServedReader("http://localhost:1", "tiny", reader).generate("Hello")
