"""`CompressedPassage`: numbers, safetensors round trip, damage."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf import CompressedPassage
from safetensors import safe_open


def embeds(slots: int = 4, dtype: torch.dtype = torch.float32, **kw) -> CompressedPassage:
    return CompressedPassage("embeds", 32, "c" * 8, "r" * 8, embeds=torch.randn(slots, 6).to(dtype), **kw)


def kv(slots: int = 3) -> CompressedPassage:
    layers = [(torch.randn(2, slots, 4), torch.randn(2, slots, 5)) for _ in range(2)]
    keys, values = zip(*layers)
    return CompressedPassage("kv", 30, "c", "r", keys=keys, values=values, positions=torch.arange(slots) + 7)


COUNTS = torch.tensor([[3, 0], [1, 2]])


def ragged(**changes) -> CompressedPassage:
    fields = {
        "keys": (torch.randn(6, 4),),
        "values": (torch.randn(6, 5),),
        "positions": torch.tensor([1, 3, 8, 1, 1, 7], dtype=torch.int32),
        "counts": COUNTS,
        "bias": torch.randn(6),
        "span": (1, 8),
    }
    return CompressedPassage("kv", 8, "c", "r", **{**fields, **changes})


def tensors(passage: CompressedPassage) -> list[torch.Tensor]:
    return list(passage.tensors().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    for passage in (
        embeds(dtype=dtype, info={"method": "x", "ratio": 8.0}),
        kv(),
        ragged(),
        ragged(bias=None),
        embeds(slots=0),
    ):
        passage.save(tmp_path / "p.safetensors")
        for back in (
            CompressedPassage.load(tmp_path / "p.safetensors"),
            CompressedPassage.from_bytes(passage.to_bytes()),
        ):
            assert (back.interface, back.source_tokens, back.compressor, back.reader) == (
                passage.interface,
                passage.source_tokens,
                passage.compressor,
                passage.reader,
            )
            assert (back.info, back.span) == (passage.info, passage.span)
            assert all(
                torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors(back), tensors(passage), strict=True)
            )
    assert os.listdir(tmp_path) == ["p.safetensors"]  # no temporary files left


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec=None, categories=None)))
def test_text_round_trip(text):
    passage = CompressedPassage("text", 9, "c", text=text, spans=((0, 2), (3, 5)), n_tokens=3)
    back = CompressedPassage.from_bytes(passage.to_bytes())
    assert (back.text, back.spans, back.slots, back.reader) == (text, ((0, 2), (3, 5)), 3, None)


def test_numbers():
    passage = embeds(slots=4)
    assert (passage.slots, passage.ratio, passage.rate, passage.nbytes) == (4, 8.0, 0.125, 4 * 6 * 4)
    assert kv().nbytes == 2 * 2 * 3 * (4 + 5) * 4 + 3 * 8
    passage = ragged()
    assert (passage.slots, passage.places, passage.ratio) == (2, 8, 8 / 1.5)  # 6 pairs in 4 heads
    assert passage.nbytes == 6 * (4 + 5 + 1) * 4 + 6 * 4 + 4 * 8
    assert len(passage.to_bytes()) < passage.nbytes + 1000
    nothing = CompressedPassage("embeds", 0, "c", "r", embeds=torch.zeros(0, 6))
    assert (nothing.ratio, nothing.rate) == (1.0, 1.0)
    assert CompressedPassage("text", 5, "c", text="", n_tokens=0).ratio == float("inf")


def test_file_is_plain_safetensors_with_json(tmp_path):
    embeds(info={"a": 1}).save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["nutgraf"])["info"] == {"a": 1}


def test_damage_is_refused(tmp_path):
    data = embeds().to_bytes()
    for bad in (
        b"",
        b"x" * 100,
        data[:-5],
        data[: len(data) // 2],
        data.replace(b'\\"version\\": \\"1\\"', b'\\"version\\": \\"9\\"'),
    ):
        with pytest.raises(ValueError, match=r"passage|readable"):
            CompressedPassage.from_bytes(bad)
    poisoned = CompressedPassage("embeds", 3, "c", "r", embeds=torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="NaN"):
        CompressedPassage.from_bytes(poisoned.to_bytes())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"interface": "vectors"}, "must be one of"),
        ({"embeds": torch.zeros(3)}, r"\[slots, width\]"),
        ({"reader": None}, "fingerprint"),
        ({"source_tokens": -1}, "negative"),
        ({"interface": "text", "text": "a"}, "n_tokens"),
        ({"interface": "kv", "keys": (torch.zeros(1, 2, 3),)}, "keys, values and positions"),
        (
            {
                "interface": "kv",
                "keys": (torch.zeros(1, 2, 3),),
                "values": (torch.zeros(1, 3, 3),),
                "positions": torch.arange(2),
            },
            "Layer 0",
        ),
    ],
)
def test_wrong_fields_are_explained(kwargs, message):
    fields = {"interface": "embeds", "source_tokens": 3, "compressor": "c", "reader": "r", "embeds": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=message):
        CompressedPassage(**{**fields, **kwargs})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": COUNTS[0]}, r"\[layers, kv_heads\]"),
        ({"counts": COUNTS + 1}, "add up to 10 pairs"),
        ({"keys": (torch.zeros(5, 4),)}, "add up to 6 pairs"),
        ({"bias": torch.zeros(5)}, "one number per pair"),
        ({"span": (1, 7)}, "must lie in the span 1..7"),
        ({"span": None}, "its span"),
        ({"keys": (torch.zeros(6, 4),) * 2, "values": (torch.zeros(6, 5),) * 2}, "one tensor of keys"),
        ({"counts": None, "keys": (torch.zeros(2, 6, 4),), "values": (torch.zeros(2, 6, 4),)}, "needs counts"),
    ],
)
def test_ragged_parts_that_do_not_fit_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        ragged(**changes)


@pytest.mark.parametrize("poisoned", ["bias", "keys"])
def test_a_ragged_passage_with_nan_or_cut_short_is_refused(poisoned):
    bad = {"bias": torch.full((6,), float("nan")), "keys": (torch.full((6, 4), float("inf")),)}
    with pytest.raises(ValueError, match=f"{poisoned}.* holds NaN or infinite"):
        CompressedPassage.from_bytes(ragged(**{poisoned: bad[poisoned]}).to_bytes())
    with pytest.raises(ValueError, match="not a readable compressed passage"):
        CompressedPassage.from_bytes(ragged().to_bytes()[:-4])


def test_moves():
    half = ragged().to(dtype=torch.float16)
    assert (half.bias.dtype, half.positions.dtype, half.counts.dtype) == (torch.float16, torch.int32, torch.int64)
    passage = kv()
    half = passage.to(dtype=torch.float16)
    assert half.keys[0].dtype == torch.float16
    assert half.positions.dtype == torch.int64
    slots = torch.zeros(1, 2, requires_grad=True)
    assert not CompressedPassage("embeds", 3, "c", "r", embeds=slots * 2).detach().embeds.requires_grad
