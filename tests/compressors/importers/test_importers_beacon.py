"""Activation Beacon checkpoints against plain torch, window by window."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors import CheckpointError
from nutgraf.compressors.importers import import_checkpoint, import_to, recognise
from oracles import lora_pass
from safetensors.torch import load_file, save_file

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
WINDOW, RUN = 12, 4
SETTINGS = {
    "beacon_window": WINDOW,
    "beacon_stride": WINDOW,
    "beacon_attn": "full-coverage",
    "beacon_attend_prev": True,
    "beacon_pos": "interleave",
    "beacon_ratio": [2, 4, 8],
    "beacon_ratio_mix": "adapt-1024",
    "beacon_param": ["q", "k", "v"],
    "beacon_embed_init": "eos",
    "beacon_sink_size": 0,
    "beacon_parallel_window": 1,
}


def write(zoo, folder, settings=None, **changes):
    """A checkpoint of a tiny Llama; returns the beacons' weights."""
    zoo.saved("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    held = {k: v for k, v in {**SETTINGS, **(settings or {})}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps({**config, **held}))
    torch.manual_seed(0)
    state, own = load_file(folder / "model.safetensors"), {"model.beacon_embed_tokens.weight": torch.randn(1, 32)}
    for name, weight in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            own[name.replace("self_attn.", "self_attn.beacon_")] = weight + 0.2 * torch.randn_like(weight)
    whole = {k: v for k, v in {**state, **own, **changes}.items() if v is not None}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return own


def pairs(reader, own, raw, sink):
    """Unrotated keys and values of the beacons of all windows: ``(keys, values)`` per layer."""
    state = dict(reader.model.named_parameters())
    lora = {}
    for name, weight in own.items():
        if "_proj" in name:
            place = name.removeprefix("model.").removesuffix(".weight").replace("beacon_", "").replace(".", "/")
            lora[f"{place}/lora_A"] = torch.eye(weight.shape[1])
            lora[f"{place}/lora_B"] = weight - state[name.replace("beacon_", "")]
    past = []
    for start in range(0, len(raw), WINDOW):
        window, ids, beacons = raw[start : start + WINDOW], [], []
        if sink and start:
            ids += raw[:1]
        for at, token in enumerate(window, 1):
            ids.append(token)
            if at % RUN == 0 or at == len(window):
                beacons.append(len(ids))
                ids.append(0)
        rows = reader.embed(torch.tensor(ids)).clone()
        rows[beacons] = own["model.beacon_embed_tokens.weight"]
        at, held = torch.arange(len(ids)), past[0][0].shape[1] if past else 0
        positions = at + (at >= sink) * held
        before = [(*pair, torch.arange(held) + sink) for pair in past] if past else None
        where = dict.fromkeys(("q_proj", "k_proj", "v_proj"), torch.isin(at, torch.tensor(beacons)))
        made = lora_pass.run(reader, SimpleNamespace(lora=lora), rows, positions, where, before)
        kept = [(k[:, beacons], v[:, beacons]) for k, v in made]
        past = [tuple(map(lambda *x: torch.cat(x, 1), a, b)) for a, b in zip(past, kept)] if start else kept
    return past


@pytest.mark.slow
@pytest.mark.parametrize("sink", [0, 1])
def test_beacons_equal_plain_torch_and_are_written_whole(zoo, tmp_path, sink):
    own = write(zoo, tmp_path / "beacon", {"beacon_sink_size": sink})
    assert recognise(tmp_path / "beacon") == "beacon"
    ignored = import_to("beacon", tmp_path / "beacon", tmp_path / "out")
    assert set(ignored) == {"layers.2.self_attn.q_proj.weight"}
    loaded = load_compressor(tmp_path / "out")
    reader = loaded.reader
    assert torch.equal(reader.model.lm_head.weight, zoo.model("llama").lm_head.weight)
    texts = [PASSAGE, "", "Hi"]
    passages = loaded.compress(texts, ratio=RUN)
    for text, passage in zip(texts[::2], passages[::2]):
        with torch.no_grad():
            want = pairs(reader, own, [*reader.bos_ids, *reader.tokenize(text)], sink)
        for number, (keys, values) in enumerate(want):
            assert torch.allclose(passage.values[number], values, atol=1e-4)
            assert torch.allclose(passage.keys[number], lora_pass.rotate(keys, passage.positions), atol=1e-4)
    assert passages[1].slots == 0
    assert reader.generate([[passages[0], "\nWho?"]], max_new_tokens=2)


NAME = "model.layers.1.self_attn.beacon_v_proj.weight"
DAMAGE = {
    "a projection is missing": ({}, {NAME: None}, r"lacks layers\.1\.self_attn\.v_proj\.weight"),
    "a projection too many": ({}, {NAME.replace("v_", "o_"): torch.zeros(2, 2)}, r"unknown keys: .*o_proj"),
    "a narrow projection": ({}, {NAME: torch.zeros(2, 2)}, r"v_proj\.weight is \(2, 2\)"),
    "no embedding": ({}, {"model.beacon_embed_tokens.weight": None}, r"lacks model\.beacon_embed_tokens"),
    "a layer of the model": (
        {},
        {"model.layers.1.mlp.up_proj.weight": None},
        r"missing model\.layers\.1\.mlp\.up_proj",
    ),
    "appended beacons": ({"beacon_pos": "append"}, {}, "sets beacon_pos to 'append'; supported is 'interleave'"),
    "windows that overlap": ({"beacon_stride": 6}, {}, "sets beacon_stride to 6; supported is 12"),
    "other projections": ({"beacon_param": ["q", "k", "v", "o"]}, {}, "supported are 0 or 1, and q, k and v"),
    "no window": ({"beacon_window": None}, {}, "sets beacon_window to None; a number"),
    "an unknown setting": ({"beacon_depth": 2}, {}, "sets beacon_depth, which is not known"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_missing_or_unknown_is_named(zoo, tmp_path, what):
    settings, changes, message = DAMAGE[what]
    write(zoo, tmp_path / "beacon", settings, **changes)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint("beacon", tmp_path / "beacon")
