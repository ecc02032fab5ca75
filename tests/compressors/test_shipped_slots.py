"""The shipped compressors give the slots and fingerprints that were stored when their results rows were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nutgraf import CompressedPassage, Reader, load_compressor, pretrained

STORED = json.loads((Path(__file__).parents[1] / "data" / "shipped_slots.json").read_text())
TEXTS = [
    "The treaty was signed in 1648 in Westphalia, ending thirty years of war in the Holy Roman Empire.",
    "Photosynthesis turns light into chemical energy. It takes place in the chloroplasts of plants, algae and some "
    "bacteria, and it gives off oxygen. " * 3,
    "",
]
QUESTION = "Where was it signed?"


@pytest.fixture(scope="module")
def readers(model_cache: Path) -> dict[str, Reader]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_slots_are_the_stored_ones(name: str, readers: dict[str, Reader]) -> None:
    kind = "reader-smollm2" if name.endswith("smollm2") else "reader-small"
    if kind not in readers:
        readers[kind] = Reader.from_pretrained(pretrained(kind), dtype=torch.float32)
    compressor = load_compressor(pretrained(name), reader=readers[kind])
    assert compressor.fingerprint == STORED[name]["fingerprint"]
    for ratio in (None, 8):
        made = compressor.compress(TEXTS, query=QUESTION, ratio=ratio)
        for found, stored in zip(made, STORED[name][f"ratio={ratio}"], strict=True):
            assert (found.slots, found.source_tokens) == (stored["slots"], stored["source_tokens"])
            assert_same(found, stored)


def assert_same(found: CompressedPassage, stored: dict[str, Any]) -> None:
    if found.interface == "text":
        assert found.text == stored["text"]
        return
    if found.interface == "embeds":
        norm, sums = found.embeds.float().norm(), found.embeds.float().sum(-1)
        last = found.embeds.float()[-1, :8] if found.slots else torch.zeros(0)
        close(last, stored["row"])
    else:
        norm = sum(t.float().norm() for pair in zip(found.keys, found.values) for t in pair)
        sums = torch.cat([t.float().sum((0, 2)) for t in (found.keys[-1], found.values[0])])
        assert found.positions.tolist() == stored["positions"]
    close(torch.as_tensor(norm), stored["norm"])
    close(sums, stored["sums"])


def close(found: torch.Tensor, stored: Any) -> None:
    # Other processors sum in another order; sums over a row cancel.
    torch.testing.assert_close(found, torch.tensor(stored, dtype=found.dtype), rtol=1e-5, atol=1e-3)
