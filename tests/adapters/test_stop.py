"""One string is one stop string, everywhere that stop strings are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf import Reader
from nutgraf.adapters.llama_index import CompressedContextLLM, PassageScores
from nutgraf.adapters.openai import EmbeddingTable, ServedReader
from nutgraf.adapters.openai.payload import Settings
from nutgraf.compressors.reader.generation import stop_strings

TEXT = "The treaty"


def _langchain(reader: Reader, **options: Any) -> Any:
    adapter = pytest.importorskip("nutgraf.adapters.langchain")
    return adapter.CompressedContextLLM(reader=reader, max_new_tokens=12, options=options)


def _haystack(reader: Reader, **options: Any) -> Any:
    adapter = pytest.importorskip("nutgraf.adapters.haystack")
    return adapter.CompressedContextGenerator(reader, 12, **options)


ASK: dict[str, Callable[[Reader, Any], str]] = {
    "reader": lambda r, stop: r.generate([TEXT], 12, stop=stop)[0],
    "reader stream": lambda r, stop: "".join(r.stream(TEXT, 12, stop=stop)),
    "llama-index": lambda r, stop: CompressedContextLLM(r, max_new_tokens=12, stop=stop).complete(TEXT).text,
    "llama-index call": lambda r, stop: CompressedContextLLM(r, max_new_tokens=12).complete(TEXT, stop=stop).text,
    "langchain": lambda r, stop: _langchain(r, stop=stop).invoke(TEXT),
    "langchain call": lambda r, stop: _langchain(r, stop=["no such"]).invoke(TEXT, stop=stop),
    "haystack": lambda r, stop: _haystack(r, stop=stop).run(TEXT)["replies"][0],
    "haystack call": lambda r, stop: _haystack(r).run(TEXT, {"stop": stop})["replies"][0],
}


@pytest.mark.slow
@pytest.mark.parametrize("ask", ASK)
def test_one_string_is_one_stop_string(reader, ask):
    whole = reader.generate([TEXT], 12)[0]
    stop = whole[len(whole) // 2 :][:3]
    wanted = whole[: whole.index(stop)]
    reversed_stop = stop[::-1] + "@"  # its letters are in the answer, the string is not
    assert len(wanted) > 1
    assert ASK[ask](reader, stop) == ASK[ask](reader, [stop]) == ASK[ask](reader, (stop,)) == wanted
    assert ASK[ask](reader, reversed_stop) == whole


@pytest.mark.parametrize("ask", ["reader", "reader stream"])
def test_other_stops_are_refused(reader, ask):
    with pytest.raises(ValueError, match="must not be empty"):
        ASK[ask](reader, "")
    with pytest.raises(ValueError, match="must not be empty"):
        ASK[ask](reader, ["a", ""])
    with pytest.raises(TypeError, match="got a int"):
        ASK[ask](reader, ["a", 3])


@given(st.text(min_size=1) | st.lists(st.text(min_size=1)) | st.tuples(st.text(min_size=1)) | st.none())
@settings(max_examples=50, deadline=None)
def test_a_stop_is_never_iterated(stop):
    wanted = [stop] if isinstance(stop, str) else list(stop or ())
    assert stop_strings(stop) == wanted
    assert Settings.of(4, stop, {}).stop == tuple(wanted)


def test_other_lists_are_never_strings(reader):
    llm = CompressedContextLLM(reader, max_new_tokens=4)
    with pytest.raises(TypeError, match="one string"):
        llm.answer_logprobs("The", " treaty")
    with pytest.raises(TypeError, match="one string"):
        PassageScores(llm).score("who?", "The treaty", " signed")
    remote = ServedReader("http://127.0.0.1:9", "tiny", EmbeddingTable.of(reader), fallback="text")
    with pytest.raises(TypeError, match="one string"):
        remote.generate([[reader.identity(TEXT), "?"]], texts="T")
