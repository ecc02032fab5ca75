"""Settings and requests of any shape are understood, or refused with a sentence: every allow-list of the package."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nutgraf import make_compressor
from nutgraf.adapters.serve.errors import RequestError
from nutgraf.adapters.serve.requests import ChatRequest, CompletionRequest, parse
from nutgraf.adapters.store import StoreError
from nutgraf.adapters.store.codec import Encoding, decode, encode
from nutgraf.benchmarks.costs.plan import Hardware, Load
from nutgraf.compressors import COMPRESSORS, CheckpointError, FidelityGate, ReaderMismatchError
from nutgraf.compressors.importers import IMPORTERS, import_checkpoint, recognise
from nutgraf.compressors.reader.lora import ADAPTER, read_settings
from nutgraf.recipes.sweep import make_cells, parse_grid
from nutgraf.recipes.training.schema import load_recipe, parse_recipe

REFUSALS = (ValueError, CheckpointError, ReaderMismatchError)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
many = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def places(data: Any, path: tuple = ()) -> list[tuple]:
    """Every place in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def changed(draw: Any, data: Any) -> Any:
    """The data with a random value at one to three places, or with another name."""
    found = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(found)))
        value = draw(values)
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return value
            if isinstance(found, dict):
                found[draw(st.text(max_size=6))] = value
            continue
        held = found
        for key in place[:-1]:
            held = held[key]
        if isinstance(held, dict) and draw(st.booleans()) and draw(st.booleans()):
            del held[place[-1]]
        else:
            held[place[-1]] = value
    return found


def told(run: Any, *refusals: type[Exception]) -> bool:
    """Whether it is understood. A refusal must be of these kinds, in one line."""
    kinds, said = refusals or REFUSALS, None
    try:
        run()
    except kinds as error:
        said = str(error).strip()
    assert said is None or (said and "\n" not in said), said
    return said is None


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@many
@given(data=st.data())
def test_recipes(tmp_path, data):
    name = data.draw(st.sampled_from(["icae", "llmlingua2", "reader"]))
    raw = yaml.safe_load(yaml.safe_dump(load_recipe(name).model_dump(mode="json", exclude_unset=True)))
    recipe = data.draw(changed(raw))
    told(lambda: parse_recipe(recipe))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    told(lambda: load_recipe(path))
    path.write_text(data.draw(st.text(st.characters(codec="utf-8"))), encoding="utf-8")
    told(lambda: load_recipe(path))


@many
@given(arguments=st.lists(st.text("seed.stages*=,[]{}0123 'a", max_size=16), max_size=3))
def test_sweeps(arguments):
    def run() -> None:
        fixed, grid = parse_grid(arguments)
        make_cells("icae", fixed, grid)

    told(run)


# -- gates, compressors, adapters, published checkpoints ------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader("llama", num_hidden_layers=2)


@many
@given(data=st.data())
def test_gates(tmp_path, reader, data):
    compressor = compressors(reader)["mean-pool"]
    about = {
        "version": 1,
        "compressor": compressor.fingerprint,
        "reader": reader.fingerprint,
        "config": {"signals": ["surprise"]},
        "calibration": {"weights": [0.1], "bias": 0.0},
        "thresholds": {"low": 0.1, "medium": 0.5, "high": 0.9},
        "price": 1.0,
        "passages": 3,
    }
    (tmp_path / "fidelity.json").write_text(json.dumps(data.draw(changed(about))))
    told(lambda: FidelityGate.from_pretrained(tmp_path, compressor))


@functools.cache
def compressors(reader: Any) -> dict[str, Any]:
    return {name: make_compressor(name, reader).eval() for name in ("mean-pool",)}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(COMPRESSORS))
@many
@given(data=st.data())
def test_settings_of_methods(method, data):
    config = COMPRESSORS[method].config_class
    told(lambda: config.from_dict(data.draw(changed(config().to_dict()))), ValueError)


@many
@given(data=st.data())
def test_adapters(tmp_path, data):
    plain = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        "use_dora": False,
    }
    (tmp_path / ADAPTER).write_text(json.dumps(data.draw(changed(plain))))
    told(lambda: read_settings(tmp_path))


@pytest.mark.slow
@many
@given(data=st.data())
def test_configs_of_published_checkpoints(tmp_path, reader, data):
    kinds = ["COCOM", "PISCO", "CLaRa", "llama", "opt"]
    config = {
        "model_type": "CLaRa",
        "compr_rate": 8,
        "doc_max_length": 40,
        "architectures": ["X"],
        "projector_type": "mlp",
    }
    config = data.draw(changed(config | {"model_type": data.draw(st.sampled_from(kinds))}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"encoder_adapter": {}, "decoder_adapter": {}}, tmp_path / "adapters.pth")
    found = recognise(tmp_path)
    assert found is None or found in IMPORTERS
    for name in {found, "clara", "cocom"} - {None}:
        assert not told(lambda name=name: import_checkpoint(name, tmp_path, reader))


# -- requests, stores, plans ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@many
@given(data=st.data())
def test_requests(data):
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 3,
        "stop": ["x"],
        "stream": True,
    }
    told(lambda: parse(ChatRequest, data.draw(changed(chat))), RequestError)
    text = {"prompt": ["a"], "temperature": 0.5, "stop": "x", "stream_options": {"include_usage": True}, "stream": True}
    told(lambda: parse(CompletionRequest, data.draw(changed(text))), RequestError)


@pytest.mark.slow
@many
@given(data=st.data())
def test_headers_of_stored_passages(reader, data):
    (passage,) = compressors(reader)["mean-pool"].compress(["The treaty was signed in 1648."])
    header, run = encode(passage, Encoding())
    told(lambda: decode(data.draw(changed(json.loads(header))), bytearray(run)), StoreError)


@many
@given(numbers=st.tuples(*[st.integers(-5, 5) | st.floats() | st.just(math.nan)] * 6))
def test_plans(numbers):
    lengths, passages, hits, efficiency, overhead, store = numbers
    told(lambda: Load((lengths,), passages, hits))  # type: ignore[arg-type]
    told(lambda: Hardware(None, efficiency, overhead, store))  # type: ignore[arg-type]
