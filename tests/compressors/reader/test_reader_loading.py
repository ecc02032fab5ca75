"""Readers loaded quantised, or partly kept on disk: the shipped reader reads slots as it reads text, or refuses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from llama_index.core.query_engine import RetrieverQueryEngine
from nutgraf import Reader, load_compressor, pretrained
from nutgraf.adapters.llama_index import CompressedContextLLM, CompressedContextPostprocessor
from nutgraf.compressors import CompressorConfig, SoftCompressor
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

NAME = "reader-small"
TEXTS = [
    "The Peace of Westphalia was signed in October 1648 in Osnabrück and Münster.",
    "Marie Curie was born in Warsaw in 1867. She won Nobel Prizes in physics and in chemistry.",
]
QUESTION = "When was the Peace of Westphalia signed?"
ASKED = f"\n\nQuestion: {QUESTION}\nAnswer:"


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# name: the package, the settings, the class of a linear layer (or of its weight) afterwards
QUANTISED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "quanto-int8": ("optimum.quanto", lambda: QuantoConfig(weights="int8"), "QLinear"),
    "bitsandbytes-int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt"),
    "bitsandbytes-4bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True), "Linear4bit"),
    "torchao-int8": ("torchao", _torchao, "Int8Tensor"),
}


@dataclass
class _Config(CompressorConfig):
    method: ClassVar[str] = "test-only"


class Identity(SoftCompressor):
    """Every passage becomes its own token embeddings."""

    config_class = _Config
    interface = "embeds"

    def identity_parts(self) -> list[Any]:
        return ["identity of loading"]

    def encode(self, texts, query=None, ratio=None, vectors=None):
        return [self.reader.identity(text) for text in texts]

    def __init__(self, reader: Reader) -> None:
        super().__init__(_Config(), reader)


@pytest.fixture(scope="module")
def whole() -> Reader:
    return Reader.from_pretrained(pretrained(NAME), dtype=torch.float32)


@pytest.fixture(scope="module")
def on_whole(whole) -> Callable[[str], Any]:
    """A shipped compressor on the whole reader."""
    return functools.cache(lambda name: load_compressor(pretrained(name), reader=whole))


@pytest.fixture(scope="module", params=list(QUANTISED))
def quantised(request) -> Reader:
    package, config, layer = QUANTISED[request.param]
    pytest.importorskip(package, reason=f"needs {package.split('.')[0]}", exc_type=ImportError)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line a layer: bfloat16 becomes float16 on the way
    reader = Reader.from_pretrained(pretrained(NAME), quantization_config=config())
    projection = reader.model.model.layers[0].mlp.up_proj
    assert layer in (type(projection).__name__, type(projection.weight).__name__)  # it really is quantised
    return reader


@pytest.fixture(scope="module")
def offloaded(whole, tmp_path_factory) -> Reader:
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" for i in range(whole.model.config.num_hidden_layers)}
    folder = tmp_path_factory.mktemp("offloaded")
    return Reader.from_pretrained(pretrained(NAME), dtype=torch.float32, device_map=places, offload_folder=str(folder))


def engine(index: Any, reader: Reader, *posts: Any) -> RetrieverQueryEngine:
    llm = CompressedContextLLM(reader, max_new_tokens=6, stop=["\n"])
    return RetrieverQueryEngine.from_args(index.as_retriever(similarity_top_k=2), llm=llm, node_postprocessors=[*posts])


# -- quantised -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_the_same_reader(whole, quantised):
    assert quantised.fingerprint == whole.fingerprint
    assert quantised.identity_card.runs_as["quantisation"]
    assert whole.identity_card.runs_as["quantisation"] is None


@pytest.mark.slow
def test_slots_are_read_as_the_text_they_hold(whole, quantised):
    as_text = [text + ASKED for text in TEXTS]
    as_slots = [[whole.identity(text), ASKED] for text in TEXTS]  # made with the whole reader
    answers = quantised.generate(as_text, 6)
    assert "1648" in answers[0]
    assert quantised.generate(as_slots, 6) == answers
    assert [quantised.generate([prompt], 6)[0] for prompt in as_slots] == answers
    assert "".join(quantised.stream(as_slots[0], 6)) == answers[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["icae-small", "500x-small"])
def test_a_compressor_made_on_it_gives_nearly_the_same_slots(on_whole, quantised, name):
    ours, theirs = load_compressor(pretrained(name), reader=quantised), on_whole(name)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.reader.fingerprint == theirs.reader.fingerprint
    for mine, wanted in zip(ours.compress(TEXTS), theirs.compress(TEXTS)):
        for a, b in zip(mine.tensors().values(), wanted.tensors().values()):
            difference = (a.float() - b.float()).norm() / b.float().norm()
            assert a.shape == b.shape
            assert difference < 0.35  # 4 bits; another passage's slots are 0.7 to 1.4 away
        assert ours.reader.generate([[wanted, ASKED]], 4)[0].strip()  # slots stored with the whole reader


def test_a_pipeline_answers_from_slots_as_from_text(whole, quantised, make_index):
    index, identity = make_index(TEXTS), Identity(whole)
    from_text = str(engine(index, quantised).query(QUESTION))
    assert str(engine(index, quantised, CompressedContextPostprocessor(identity)).query(QUESTION)) == from_text
    assert "1648" in from_text


# -- partly on disk ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_offloaded_reader_reads_what_others_compressed(whole, on_whole, offloaded, make_index):
    assert offloaded.model.model.layers[0].mlp.up_proj.weight.is_meta
    assert offloaded.fingerprint == whole.fingerprint
    compressor = on_whole("icae-small")
    prompts = [[*compressor.compress(TEXTS), ASKED], TEXTS[0] + ASKED]
    assert offloaded.generate(prompts, 6) == whole.generate(prompts, 6)
    index, post = make_index(TEXTS), CompressedContextPostprocessor(compressor)
    assert str(engine(index, offloaded, post).query(QUESTION)) == str(engine(index, whole, post).query(QUESTION))


@pytest.mark.slow
def test_all_of_it_may_be_offloaded(whole, tmp_path):
    reader = Reader.from_pretrained(
        pretrained(NAME), dtype=torch.float32, device_map={"": "disk"}, offload_folder=str(tmp_path)
    )
    assert reader.device == torch.device("cpu")
    prompts = [[whole.identity(TEXTS[0]), ASKED]]
    assert reader.generate(prompts, 6) == whole.generate(prompts, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["icae-small", "500x-small"])
def test_methods_that_run_the_readers_weights_say_that_they_cannot(offloaded, name):
    with pytest.raises(ValueError, match=r"they are offloaded.*into a store with the reader loaded whole"):
        load_compressor(pretrained(name), reader=offloaded)


def test_an_offloaded_model_object_cannot_be_identified(offloaded):
    reader = Reader.from_pretrained(offloaded.model, tokenizer=offloaded.tokenizer)
    with pytest.raises(ValueError, match=r"cannot be hashed; let the reader load it"):
        _ = reader.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_that_keeps_all_in_memory_changes_nothing(whole, on_whole, device_map):
    reader = Reader.from_pretrained(pretrained(NAME), dtype=torch.float32, device_map=device_map)
    compressor = load_compressor(pretrained("icae-small"), reader=reader)
    assert compressor.fingerprint == on_whole("icae-small").fingerprint
    prompts = [[*compressor.compress(TEXTS), ASKED]]
    if reader.device.type == "cpu":
        assert reader.generate(prompts, 6) == whole.generate(prompts, 6)
