"""OpenAI's Python client and LlamaIndex's OpenAILike work against the server as they are."""

from __future__ import annotations

import openai
import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import TextNode
from nutgraf import load_compressor
from nutgraf.adapters.serve import Limits
from nutgraf.adapters.store import LanceStore
from serving import Running
from texts import RIVERS, TREATY

QUESTION = "\nQuestion: who signed it?\nAnswer:"


@pytest.fixture(scope="module")
def compressor(reader):
    return load_compressor("kv-match", reader=reader, probes=4, ratio=2.0)


@pytest.fixture(scope="module")
def served(reader, compressor, tmp_path_factory):
    with LanceStore(tmp_path_factory.mktemp("store") / "s") as store:
        options = {"store": store, "compressor": compressor, "api_key": "sesame"}
        server = Running(reader, limits=Limits(max_positions=2048), **options)
        yield server
        server.stop()


def test_the_openai_client(served, reader, compressor):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="sesame", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    text = TREATY + QUESTION
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    wanted = reader.generate([text], 8)[0]
    assert client.completions.create(prompt=text, **options).choices[0].text == wanted
    pieces = client.completions.create(prompt=text, stream=True, **options)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted

    (stored,) = client.post("/passages", body={"passages": [{"text": TREATY}]}, cast_to=dict)["data"]
    (passage,) = compressor.compress([TREATY])
    for part in ({"type": "passage", "id": stored["id"]}, {"type": "passage", "text": TREATY}):
        content = [part, {"type": "text", "text": QUESTION}]
        wanted = reader.generate([[passage, QUESTION]], 8)[0]
        assert client.completions.create(prompt=content, **options).choices[0].text == wanted
        wanted = reader.generate([[passage, QUESTION]], 8, chat=True)[0]
        messages = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(messages=messages, **options)
        assert answer.choices[0].message.content == wanted
        assert answer.usage.completion_tokens > 0
        stream = client.chat.completions.create(messages=messages, stream=True, **options)
        assert "".join(piece.choices[0].delta.content or "" for piece in stream) == wanted
    with pytest.raises(openai.NotFoundError, match="there is no passage"):
        client.completions.create(prompt=[{"type": "passage", "id": "x"}, {"type": "text", "text": "a"}], **options)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="open").models.list()


@pytest.mark.slow
def test_llama_indexs_openai_like(served, reader):
    found = pytest.importorskip("llama_index.llms.openai_like", reason="pip install llama-index-llms-openai-like")
    options = {"model": "tiny", "api_base": f"{served.url}/v1", "api_key": "sesame", "max_tokens": 8, "temperature": 0}
    plain = found.OpenAILike(**options, is_chat_model=False, max_retries=0)
    wanted = reader.generate([TREATY + QUESTION], 8)[0]
    assert plain.complete(TREATY + QUESTION).text == wanted
    assert [*plain.stream_complete(TREATY + QUESTION)][-1].text == wanted
    chat = found.OpenAILike(**options, is_chat_model=True, max_retries=0)
    wanted = reader.generate([TREATY + QUESTION], 8, chat=True)[0]
    assert chat.chat([ChatMessage(role="user", content=TREATY + QUESTION)]).message.content == wanted
    assert [*chat.stream_chat([ChatMessage(role="user", content=TREATY + QUESTION)])][-1].message.content == wanted
    index = VectorStoreIndex([TextNode(text=text) for text in (TREATY, RIVERS)], embed_model=MockEmbedding(4))
    for llm in (plain, chat):
        assert str(index.as_query_engine(llm=llm).query("Who signed it?"))
        assert "".join(index.as_query_engine(llm=llm, streaming=True).query("Who signed it?").response_gen)
