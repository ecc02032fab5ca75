"""Shared fixtures: `zoo` (tiny random models) and quiet, deterministic torch."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _load_zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nutgraf_test_zoo", Path(__file__).parent / "zoo.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["nutgraf_test_zoo"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


_ZOO = _load_zoo()


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """The module `tests/zoo.py`: ``zoo.reader("llama")``, ``zoo.ARCHITECTURES``, ``zoo.tokenizer()``."""
    return _ZOO


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
