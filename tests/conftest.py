"""Shared fixtures: `zoo` (tiny random models), indexes, a cache for packaged models, and quiet, deterministic torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import zoo as zoo_module
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples in every run; `pytest --hypothesis-profile=default` draws new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """The module `tests/zoo.py`: ``zoo.reader("llama")``, ``zoo.ARCHITECTURES``, ``zoo.tokenizer()``."""
    return zoo_module


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder that packaged models are unpacked into, once for all tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUTGRAF_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def make_index() -> Callable[[list[str]], Any]:
    """Makes a LlamaIndex vector index of texts: nodes ``node-0``, ``node-1``, ..., all equally near to any question."""
    from llama_index.core import MockEmbedding, VectorStoreIndex
    from llama_index.core.schema import TextNode

    def make(texts: list[str]) -> VectorStoreIndex:
        nodes = [TextNode(id_=f"node-{i}", text=text) for i, text in enumerate(texts)]
        return VectorStoreIndex(nodes, embed_model=MockEmbedding(8))

    return make


@pytest.fixture(scope="module")
def index(request: pytest.FixtureRequest, make_index: Callable[[list[str]], Any]) -> Any:
    """A LlamaIndex vector index of the test module's ``TEXTS``."""
    return make_index(request.module.TEXTS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
