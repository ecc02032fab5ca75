"""``nutgraf serve`` over real HTTP: answers, batching, streams, limits, and tensors that must not be read."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf import CompressedPassage, Reader, make_compressor
from nutgraf.adapters.openai import EmbeddingTable, RequestRefusedError, ServedReader, ServerFaultError, encode_tensor
from nutgraf.adapters.serve import Limits, create_app
from nutgraf.adapters.serve.batching import AnswerOptions, Batcher
from nutgraf.adapters.serve.errors import RequestError
from nutgraf.adapters.serve.requests import _LABELS, ChatRequest, parse
from safetensors.torch import save as save_safetensors
from serving import Running, refused
from texts import TREATY

PASSAGE = TREATY
QUESTION = "\nQuestion: who signed it?\nAnswer:"
LIMITS = Limits(max_prompts=4, max_new_tokens=64, max_positions=512, max_body_bytes=2**20, max_wait_ms=30)


@pytest.fixture(scope="module")
def passage(reader) -> CompressedPassage:
    return make_compressor("mean-pool", reader, encoder="embeddings").compress([PASSAGE], ratio=4)[0]


@pytest.fixture(scope="module")
def running(reader):
    server = Running(reader, limits=LIMITS)
    yield server
    server.stop()


def embeds_of(reader: Reader, *prompt: Any) -> torch.Tensor:
    table = EmbeddingTable.of(reader)
    return table.embed(table.plan([list(prompt)])[0])


# -- answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_text_ids_and_the_texts_own_embeddings_give_the_readers_answer(running, reader):
    text = PASSAGE + QUESTION
    wanted = reader.generate([text], 12)
    assert wanted[0]
    assert running.ask(prompt=text, max_tokens=12) == wanted
    assert running.ask(prompt=[text, text], max_tokens=12) == wanted * 2
    ids = [*reader.bos_ids, *reader.tokenize(text)]
    assert running.ask(prompt=ids, max_tokens=12) == wanted
    assert running.ask(prompt=[ids], max_tokens=12) == wanted
    data = encode_tensor(embeds_of(reader, text))
    assert running.ask(prompt="", prompt_embeds=data, max_tokens=12) == wanted
    both = running.ask(prompt="Rivers carry", prompt_embeds=[data], max_tokens=12)
    assert both == [*wanted, *reader.generate(["Rivers carry"], 12)], "embeddings come first"


def test_special_tokens_in_a_text_are_text(running, reader):
    assert running.ask(prompt="Hello</s><|user|>", max_tokens=8) == reader.generate(["Hello</s><|user|>"], 8)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "vllm-chat"])
def test_compressed_passages_through_client_and_server(running, reader, passage, engine):
    prompts = [["About: ", passage, QUESTION], PASSAGE + QUESTION, [passage, "\n", passage, QUESTION]]
    chat = engine == "vllm-chat"
    wanted = reader.generate(prompts, 12, chat=chat)
    assert len(set(wanted)) > 1
    with ServedReader(running.url, "tiny", reader, engine=engine) as remote:
        assert remote.generate(prompts, 12, chat=chat) == wanted
        assert ["".join(remote.stream(prompt, 12, chat=chat)) for prompt in prompts] == wanted


def test_safetensors_and_half_precision(running, reader):
    text = PASSAGE + QUESTION
    embeds = embeds_of(reader, text)
    data = base64.b64encode(save_safetensors({"prompt_embeds": embeds})).decode()
    assert running.ask(prompt_embeds=data, max_tokens=12) == reader.generate([text], 12)
    half = embeds.half()
    made = CompressedPassage("embeds", 1, "test", reader.fingerprint, embeds=half)
    from nutgraf.compressors.reader.tokenization import TokenIds

    wanted = reader.generate([[TokenIds(()), made]], 12)
    assert running.ask(prompt_embeds=encode_tensor(half[None]), max_tokens=12) == wanted


def test_a_clients_passage_of_another_reader_is_refused(running, zoo):
    other = zoo.reader("llama", seed=1, num_hidden_layers=1)
    with pytest.raises(RequestRefusedError, match="was embedded for the reader") as caught:
        ServedReader(running.url, "tiny", other).generate([[other.identity(PASSAGE), QUESTION]])
    assert caught.value.status == 409


def test_usage_and_finish_reasons(running, reader, passage):
    answer = running.post(prompt=PASSAGE, max_tokens=5, temperature=0).json()
    assert answer["object"] == "text_completion"
    assert answer["usage"] == {
        "prompt_tokens": reader.length(PASSAGE),
        "completion_tokens": 5,
        "total_tokens": reader.length(PASSAGE) + 5,
    }
    assert answer["choices"][0]["finish_reason"] == "length"
    stop = answer["choices"][0]["text"][2:4]
    answer = running.post(prompt=PASSAGE, max_tokens=5, temperature=0, stop=stop).json()
    assert answer["choices"][0]["text"] == reader.generate([PASSAGE], 5, stop=[stop])[0]
    assert answer["choices"][0]["finish_reason"] == "stop"
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    answer = running.post("chat/completions", messages=messages, max_completion_tokens=3, temperature=0).json()
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": reader.generate(["Hello"], 3, chat=True)[0],
    }
    assert answer["usage"]["prompt_tokens"] == reader.length("Hello", chat=True)


@pytest.mark.slow
def test_sampling_differs_and_greedy_does_not(running):
    hot = {running.ask(prompt=PASSAGE, max_tokens=12, temperature=2.0, top_p=0.99)[0] for _ in range(4)}
    cold = {running.ask(prompt=PASSAGE, max_tokens=12, temperature=0, seed=3)[0] for _ in range(2)}
    assert len(hot) > 1
    assert len(cold) == 1
    assert "seed" in refused(running.post(prompt="Hello", temperature=1.0, seed=3))


# -- streams -------------------------------------------------------------------------------------------------------------


def events(server: Running, page: str, **body: Any) -> list[Any]:
    with server.http.stream("POST", f"/v1/{page}", json={"temperature": 0, "stream": True, **body}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_streams(running, reader):
    got = events(running, "completions", prompt=PASSAGE, max_tokens=12, stream_options={"include_usage": True})
    *pieces, last, usage = got
    assert len(pieces) > 2
    assert "".join(event["choices"][0]["text"] for event in pieces) == reader.generate([PASSAGE], 12)[0]
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert len({event["id"] for event in got}) == 1
    got = events(running, "chat/completions", messages=[{"role": "user", "content": "Hello"}], max_tokens=8)
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in got)
    assert text == reader.generate(["Hello"], 8, chat=True)[0]
    assert "One prompt" in refused(running.post(prompt=["a", "b"], stream=True))


@pytest.mark.slow
def test_a_reader_that_fails_breaks_no_later_answer(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1)
    server = Running(reader, limits=LIMITS)
    try:
        wanted = server.ask(prompt="Hello", max_tokens=4)
        decoder = reader.model.model.layers[0]
        handle = decoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        assert "log" in refused(server.post(prompt="Hello", max_tokens=4), 500)
        remote = ServedReader(server.url, "tiny", reader, retries=1, backoff=0.01)
        with pytest.raises(ServerFaultError):
            remote.generate(["Hello"], 4)
        with pytest.raises(ServerFaultError):
            list(remote.stream("Hello", 4))
        handle.remove()
        assert server.ask(prompt="Hello", max_tokens=4) == wanted
        assert "".join(remote.stream("Hello", 4)) == wanted[0]
    finally:
        server.stop()


# -- batching ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_concurrent_requests_are_read_together_with_the_serial_answers(running, reader, passage):
    prompts: list[Any] = [[f"Number {i}: ", passage, QUESTION] for i in range(24)]
    prompts += [f"Number {i}: {PASSAGE}{QUESTION}" for i in range(24)]
    wanted = [reader.generate([prompt], 6)[0] for prompt in prompts]
    running.app.state.batcher.batches.clear()
    remote = ServedReader(running.url, "tiny", reader, concurrency=48)
    assert remote.generate(prompts, 6) == wanted
    sizes = list(running.app.state.batcher.batches)
    assert sum(sizes) == 48
    assert max(sizes) > 4
    assert max(sizes) <= LIMITS.max_batch


@pytest.mark.slow
def test_requests_of_other_settings_are_not_mixed_up(running, reader):
    def ask(i: int) -> bool:
        n = 1 + i % 3
        return running.ask(prompt=f"{PASSAGE} {i}", max_tokens=n) == reader.generate([f"{PASSAGE} {i}"], n)

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(24)))


@pytest.mark.slow
def test_streams_are_read_together_with_each_other_and_with_whole_answers(running, reader, passage):
    remote = ServedReader(running.url, "tiny", reader)
    prompts = [[f"Number {i}: ", passage, QUESTION] if i % 2 else f"Number {i}: {PASSAGE}{QUESTION}" for i in range(16)]
    whole = reader.generate(prompts[:1], 12)[0]
    stop = [whole[5:8]]
    wanted = [reader.generate([prompt], 12, stop=stop)[0] for prompt in prompts]
    assert len(set(map(len, wanted))) > 1, "some answers end earlier than others"
    running.app.state.batcher.batches.clear()

    def ask(i: int) -> str:
        if i % 4 < 3:
            return "".join(remote.stream(prompts[i], 12, stop=stop))
        return remote.generate([prompts[i]], 12, stop=stop)[0]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == wanted
    sizes = list(running.app.state.batcher.batches)
    assert sum(sizes) == 16
    assert max(sizes) > 4


def test_a_batch_that_fails_is_repeated_but_not_what_a_stream_has_given(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1)
    plans = reader.plan([PASSAGE, "Hello"])
    wanted = reader.generate([PASSAGE, "Hello"], 8)
    steps: list[int] = []

    def fail(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 5:
            raise RuntimeError("out of memory")

    reader.model.model.layers[0].register_forward_pre_hook(fail)
    batcher = Batcher(reader, Limits(max_wait_ms=500))
    pieces: list[str] = []
    streamed = batcher.stream(plans[0], AnswerOptions(8), pieces.append)
    (whole,) = batcher.submit(plans[1:], AnswerOptions(8))
    with pytest.raises(RuntimeError, match="out of memory"):
        streamed.result(20)
    assert whole.result(20).text == wanted[1]
    assert pieces
    assert wanted[0].startswith("".join(pieces))
    assert list(batcher.batches) == [2]
    batcher.close()


@pytest.mark.slow
def test_a_stream_does_not_wait_for_the_batch_that_is_read(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1)
    reader.model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.005))
    server = Running(reader, limits=Limits(max_positions=1024, timeout_s=60))
    remote = ServedReader(server.url, "tiny", reader)
    try:
        with ThreadPoolExecutor(2) as pool:
            long = pool.submit(remote.generate, ["Hello"], 400)
            while not server.app.state.batcher.batches:
                time.sleep(0.01)
            whole = pool.submit(remote.generate, ["Hello"], 3)
            assert "".join(remote.stream("Hello", 4))
            assert not long.done()
            assert not whole.done(), "it waits for the batch"
            assert whole.result() == reader.generate(["Hello"], 3)
            assert long.done()
    finally:
        server.stop()


@pytest.mark.slow
def test_a_full_queue_and_a_slow_reader(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1)
    gate = threading.Event()
    handle = reader.model.model.layers[0].register_forward_pre_hook(lambda *_: gate.wait(20) and None)
    server = Running(reader, limits=Limits(max_batch=1, max_queue=2, timeout_s=0.5))
    try:
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(server.post, prompt="Hello", max_tokens=2) for _ in range(6)]
            answers = [future.result() for future in asked]
        assert sorted({answer.status_code for answer in answers}) == [429, 504]
        busy = next(answer for answer in answers if answer.status_code == 429)
        assert "waiting" in refused(busy, 429)
        assert busy.headers["retry-after"]
        gate.set()
        handle.remove()
        remote = ServedReader(server.url, "tiny", reader, backoff=0.2)
        assert remote.generate(["Hello"], 2) == reader.generate(["Hello"], 2)
    finally:
        gate.set()
        server.stop()


@pytest.mark.slow
def test_streams_are_limited_and_a_client_that_leaves_frees_its_place(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1)
    wanted = reader.generate(["Hello"], 2)
    gate = threading.Event()
    handle = reader.model.model.layers[0].register_forward_pre_hook(lambda *_: gate.wait(20) and None)
    server = Running(reader, limits=Limits(max_streams=1, timeout_s=1))
    try:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "stream": True}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as first:
            assert first.status_code == 200
            assert "Too many answers" in refused(server.post("chat/completions", **body), 429)
        gate.set()
        handle.remove()
        remote = ServedReader(server.url, "tiny", reader, backoff=0.2)
        assert ["".join(remote.stream("Hello", 2))] == wanted
    finally:
        gate.set()
        server.stop()


def abandoned(ask: Any) -> None:
    """Send a request and close its connection before the answer."""
    with pytest.raises(httpx.ReadTimeout):
        ask(timeout=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["leave", "timeout"])
def test_answers_that_are_no_longer_awaited_end(zoo, how):
    reader = zoo.reader("llama", num_hidden_layers=1)
    steps: list[int] = []

    def slow(*_: Any) -> None:
        steps.append(1)
        time.sleep(0.01)

    reader.model.model.layers[0].register_forward_pre_hook(slow)
    server = Running(reader, limits=Limits(max_batch=2, timeout_s=1.5 if how == "timeout" else 20, max_queue=3))
    body = {"prompt": "Hello", "max_tokens": 1900, "temperature": 0, "ignore_eos": False}
    try:
        if how == "timeout":
            assert "no answer after" in refused(server.post(**body), 504)
        else:
            with ThreadPoolExecutor(3) as pool:  # one batch and one in the queue
                asked = [
                    pool.submit(
                        abandoned,
                        lambda timeout: httpx.post(f"{server.url}/v1/completions", json=body, timeout=timeout),
                    )
                    for _ in range(3)
                ]
                [future.result() for future in asked]
        start = time.monotonic()
        assert server.post(**{**body, "prompt": "Bye", "max_tokens": 2}).status_code == 200
        assert time.monotonic() - start < 5
        assert server.app.state.batcher.waiting == 0
        assert len(steps) < 600
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["completions", "chat/completions"])
def test_a_stream_whose_client_leaves_before_its_first_piece_ends(zoo, page):
    reader = zoo.reader("llama", num_hidden_layers=1)
    steps: list[int] = []

    def slow(*_: Any) -> None:
        steps.append(1)
        time.sleep(0.01)

    reader.model.model.layers[0].register_forward_pre_hook(slow)
    reader.decode = lambda ids: ""  # the model writes nothing that can be shown
    server = Running(reader, limits=Limits(max_streams=1, timeout_s=20))
    body = {"max_tokens": 1900, "stream": True, "temperature": 0}
    body |= {"prompt": "Hello"} if page == "completions" else {"messages": [{"role": "user", "content": "Hello"}]}
    try:

        def read(timeout: float) -> None:
            with httpx.stream("POST", f"{server.url}/v1/{page}", json=body, timeout=timeout) as answer:
                answer.read()

        abandoned(read)
        time.sleep(0.5)
        taken = len(steps)
        time.sleep(0.3)
        assert len(steps) == taken
    finally:
        server.stop()


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "needs a prompt"),
        ({"prompt": []}, "needs a prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [100000]}, "Token ids must lie in"),
        ({"prompt": ["a"] * 5}, "may hold 4 prompts"),
        ({"prompt": "a " * 600}, "positions"),
        ({"prompt": "a", "max_tokens": 65}, "may have 64 tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "3"}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "n": 2}, "n=2 is not served"),
        ({"prompt": "a", "logprobs": 3}, "logprobs=3"),
        ({"prompt": "a", "stop": ""}, "stop takes"),
        ({"prompt_embeds": 3}, "prompt_embeds"),
    ],
)
def test_bad_completions(running, body, said):
    assert said in refused(running.post(**body))


UNSERVED = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    {"guided_json": {"type": "object"}},
    {"guided_choice": ["a", "b"]},
    {"structured_outputs": {"regex": "a+"}},
    {"ignore_eos": True},
    {"stop_token_ids": [3]},
    {"skip_special_tokens": False},
    {"include_stop_str_in_output": True},
    {"min_tokens": 3},
    {"bad_words": ["a"]},
    {"allowed_token_ids": [1, 2]},
    {"truncate_prompt_tokens": 4},
    {"use_beam_search": True},
    {"regex": "a+"},
    {"prompt_logprobs": 1},
    {"max_token": 3},
    {"temprature": 0.1},
    {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"continuous_usage_stats": True}},
    {"stream": True, "stream_options": {"other": 1}},
]


@pytest.mark.parametrize("page", ["completions", "chat/completions"])
@pytest.mark.parametrize("body", UNSERVED, ids=lambda body: next(iter(reversed(body))))
def test_parameters_that_are_not_served_are_refused_by_name(running, page, body):
    prompt = {"prompt": "a"} if page == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    answer = running.post(page, **prompt, **body, max_tokens=2)
    name = next(reversed(body))
    assert name in refused(answer)
    assert answer.json()["error"]["param"] in (name, *(body[name] if isinstance(body[name], dict) else ()))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"functions": [{"name": "f"}]}, "functions="),
        ({"function_call": {"name": "f"}}, "function_call="),
        ({"tools": [{"type": "function"}]}, "tools="),
        ({"tool_choice": "required"}, "tool_choice="),
        ({"documents": [{"text": "a"}]}, "documents="),
        ({"chat_template": "{{ messages }}"}, "chat_template="),
        ({"modalities": ["audio"]}, "modalities="),
        ({"reasoning_effort": "low"}, "reasoning_effort="),
        ({"prompt": "a"}, "prompt is no parameter"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking is not read"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"messages": [{"role": "user", "content": "a", "name": "Bob"}]}, "messages.0.name is not read"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls is not read"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "content.0.x"),
    ],
)
def test_parameters_of_chats_that_are_not_served(running, body, said):
    body = {"messages": [{"role": "user", "content": "a"}], **body}
    assert said in refused(running.post("chat/completions", **body))


@pytest.mark.slow
@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from(sorted(ChatRequest.unserved)),
        st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()) | st.just({"type": "text"}),
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_only_names_and_values_of_the_list_are_accepted(more):
    served = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    given_ = {name: value for name, value in more.items() if name not in ChatRequest.model_fields}
    fine = all(n in _LABELS or (n in ChatRequest.unserved and v in ChatRequest.unserved[n]) for n, v in given_.items())
    if fine:
        assert parse(ChatRequest, served | given_).max_tokens == 2
    else:
        with pytest.raises(RequestError) as caught:
            parse(ChatRequest, served | given_)
        assert caught.value.status == 400
        assert caught.value.param in given_


def test_neutral_values_and_labels_are_accepted(running, reader):
    wanted = reader.generate(["Hello"], 3, chat=True)
    neutral = {name: values[-1] for name, values in ChatRequest.unserved.items()} | {"user": "u", "cache_salt": "x"}
    neutral |= {"chat_template_kwargs": None, "stream_options": None, "stop": None, "seed": None}
    messages = [{"role": "user", "content": "Hello", "name": None, "tool_calls": None}]
    for more in (neutral, dict.fromkeys(neutral), {"add_generation_prompt": True}):
        answer = running.post("chat/completions", messages=messages, max_tokens=3, temperature=0, **more)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == wanted[0]
    body = {"add_generation_prompt": False, "temperature": 0, "max_tokens": 3}
    answer = running.post("chat/completions", messages=messages, **body).json()
    wanted = reader.generate(["Hello"], 3, chat=True, template={"add_generation_prompt": False})
    assert answer["choices"][0]["message"]["content"] == wanted[0]
    assert running.ask(prompt="Hello", max_tokens=3, response_format={"type": "text"}, suffix=None)


def test_a_models_card(running, reader):
    card = running.http.get("/v1/models/tiny").json()
    assert card == running.http.get("/v1/models").json()["data"][0]
    assert card["reader"] == reader.fingerprint
    assert "There is no model 'a/b' here" in refused(running.http.get("/v1/models/a/b"), 404)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages"),
        ([{"content": "a"}], "messages.0 needs a role"),
        ([{"role": "user", "content": 3}], "must be a string or a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "prompt_embeds", "data": "AA=="}]}], "messages.0.content.0.data"),
        ([{"role": "user", "content": [{"type": "prompt_embeds"}]}], "must be a base64 string"),
    ],
)
def test_bad_chats(running, messages, said):
    assert said in refused(running.post("chat/completions", messages=messages))


def test_bad_requests(running):
    assert "no model 'other'" in refused(running.post(prompt="a", model="other"), 404)
    assert "not JSON" in refused(running.http.post("/v1/completions", content=b"{"))
    assert "not JSON" in refused(running.http.post("/v1/completions", content=b"[" * 100_000))
    assert "JSON object" in refused(running.http.post("/v1/completions", content=b"[]"))
    assert "bytes" in refused(running.http.post("/v1/completions", content=b" " * (2**20 + 1)), 413)
    refused(running.http.get("/v1/nothing"), 404)
    assert running.http.get("/health").json() == {"status": "ok", "model": "tiny", "waiting": 0}
    card = running.http.get("/v1/models").json()["data"][0]
    assert card["id"] == "tiny"
    assert card["max_model_len"] == 512


@pytest.mark.parametrize("keys", ["sesame", ["barley", "sesame", "oats"]])
def test_api_keys(reader, keys):
    server = Running(reader, limits=LIMITS, api_key=keys)
    try:
        for wrong in ({}, {"Authorization": f"Bearer {keys}"} if isinstance(keys, list) else {}, {"Authorization": ""}):
            answer = server.http.post("/v1/completions", json={"prompt": "a"}, headers=wrong)
            assert "API key" in refused(answer, 401)
        for key in [keys] if isinstance(keys, str) else keys:
            assert ServedReader(server.url, "tiny", reader, api_key=key).generate(["Hello"], 2)
        assert server.http.get("/health").status_code == 200
    finally:
        server.stop()


@pytest.mark.parametrize("keys", ["", ["sesame", ""], ["open sesame"], ["sésame"], "sesame\n"])
def test_keys_that_no_client_can_send_are_refused(reader, keys):
    with pytest.raises(ValueError, match="visible ASCII"):
        create_app(reader, api_key=keys)


# -- tensors -------------------------------------------------------------------------------------------------------------


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def packed(raw: bytes) -> bytes:
    """The same archive, deflated."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out.getvalue()


WIDTH = 32
ROWS = torch.ones(3, WIDTH)
BAD_TENSORS = {
    "sparse": (lambda: saved(ROWS.to_sparse()), "dense"),
    "sparse csr": (lambda: saved(ROWS.to_sparse_csr()), "dense"),
    "no tensor": (lambda: saved({"a": ROWS}), "one dense tensor, got dict"),
    "list": (lambda: saved([ROWS, ROWS]), "one dense tensor, got list"),
    "parameter": (lambda: saved(torch.nn.Parameter(ROWS)), "one dense tensor, got Parameter"),
    "meta": (lambda: saved(ROWS.to("meta")), "CPU tensor"),
    "int": (lambda: saved(ROWS.long()), "float32, float16 or bfloat16, got int64"),
    "double": (lambda: saved(ROWS.double()), "got float64"),
    "quantized": (lambda: saved(torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8)), "dense"),
    "vector": (lambda: saved(ROWS[0].clone()), "shape"),
    "too wide": (lambda: saved(torch.ones(3, WIDTH + 1)), "shape"),
    "empty": (lambda: saved(torch.ones(0, WIDTH)), "shape"),
    "too many": (lambda: saved(torch.ones(1, WIDTH, dtype=torch.float16).repeat(513, 1)), "shape"),
    "far too many": (lambda: saved(torch.ones(5000, WIDTH)), "characters"),
    "expanded": (lambda: saved(torch.ones(1, WIDTH).expand(10**9, WIDTH)), "shape"),
    "NaN": (lambda: saved(torch.full((3, WIDTH), float("nan"))), "NaN"),
    "infinite": (lambda: saved(torch.full((3, WIDTH), float("inf"))), "NaN or infinite"),
    "old format": (lambda: saved(ROWS, _use_new_zipfile_serialization=False), "neither"),
    "plain pickle": (lambda: pickle.dumps(ROWS.numpy()), "neither"),
    "deflated": (lambda: packed(saved(ROWS)), "packed"),
    "cut": (lambda: saved(ROWS)[:-100], "not a tensor that torch.save wrote"),
    "other zip": (lambda: packed(saved(ROWS))[:0] + _zip({"hello.txt": b"hello"}), "not a tensor"),
    "bomb": (lambda: packed(saved(torch.zeros(10**6, WIDTH))), "packed, or larger"),
    "two tensors": (lambda: save_safetensors({"a": ROWS, "b": ROWS.clone()}), "one tensor"),
    "safetensors of ints": (lambda: save_safetensors({"a": ROWS.int()}), "got int32"),
    "cut safetensors": (lambda: save_safetensors({"a": ROWS})[:-8], "neither"),
    "huge header": (lambda: b"\xff" * 8 + b"{", "neither"),
    "nothing": (lambda: b"", "neither"),
}


def _zip(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(running, name):
    make, said = BAD_TENSORS[name]
    message = refused(running.post(prompt_embeds=base64.b64encode(make()).decode(), max_tokens=2))
    assert said in message
    assert "weights_only=False" not in message, "nobody is to be told how to load it unsafely"


def test_good_tensor_of_the_bad_ones_shape(running):
    assert running.ask(prompt_embeds=encode_tensor(ROWS), max_tokens=2)
    assert "not base64" in refused(running.post(prompt_embeds="%%%", max_tokens=2))


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: [torch.ones(1), a]])
def test_pickled_objects_are_not_run(running, tmp_path, wrap):
    path = tmp_path / "owned"
    attack = saved(wrap(Attack(str(path))))
    message = refused(running.post(prompt_embeds=base64.b64encode(attack).decode(), max_tokens=2))
    assert "not a tensor that torch.save wrote" in message
    assert not path.exists()
    torch.load(io.BytesIO(attack), weights_only=False)
    assert path.exists(), "the attack would have worked"


# -- the command ---------------------------------------------------------------------------------------------------------


def command(*arguments: str, **options: Any) -> Any:
    code = "from nutgraf.cli import app; app()"
    run = [sys.executable, "-c", code, "serve", *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_the_commands_help_and_errors():
    assert "--max-batch" in command("--help", env={**os.environ, "COLUMNS": "120"}).stdout
    bad = command("--reader", "no-such-reader")
    assert bad.returncode == 2
    assert "no-such-reader" in bad.stderr


@pytest.mark.slow
def test_the_command_serves_a_shipped_reader():
    from nutgraf import pretrained

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from nutgraf.cli import app; app()"
    run = [sys.executable, "-c", code, "serve", "--reader", "reader-small", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            for _ in range(3000):
                try:
                    assert http.get("/health").json()["status"] == "ok"
                    break
                except httpx.ConnectError:
                    assert process.poll() is None
                    time.sleep(0.1)
        reader = Reader.from_pretrained(pretrained("reader-small"), device="cpu")
        remote = ServedReader(f"http://127.0.0.1:{port}/v1", "reader-small", reader)
        prompt = [reader.identity(PASSAGE), QUESTION]
        assert remote.generate([prompt], 8) == reader.generate([PASSAGE + QUESTION], 8)
    finally:
        process.terminate()
        process.wait(30)
