"""RestoreKV checkpoints against a pass of the reader with LoRA merged into its weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors import CheckpointError
from nutgraf.compressors.importers import MissingOption, import_checkpoint, import_to, recognise
from safetensors.torch import save_file
from transformers import DynamicCache

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
RANK, ALPHA, TOKENS = 3, 6.0, 4
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False, "alpha_pattern": {}}
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader()


def state(reader):
    torch.manual_seed(0)
    made = {}
    for i, layer in enumerate(reader.model.model.layers):
        for name in MODULES:
            out, into = layer.get_submodule(name).weight.shape
            made[f"base_model.model.model.layers.{i}.{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, into)
            made[f"base_model.model.model.layers.{i}.{name}.lora_B.weight"] = 0.3 * torch.randn(out, RANK)
    return made


def write(folder, reader, config=None, rows=None, **changes):
    folder.mkdir()
    held = {k: v for k, v in {**state(reader), **changes}.items() if v is not None}
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    embeddings = torch.randn(TOKENS, reader.width, generator=torch.Generator().manual_seed(1))
    save_file(rows or {"restore_embeddings": embeddings}, folder / "restore_embeddings.safetensors")
    return folder, embeddings


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_restore_tokens_read_the_whole_cache_with_lora(tmp_path, reader, rslora):
    folder, embeddings = write(tmp_path / "restore", reader, {"use_rslora": rslora})
    assert recognise(folder) == "restore-kv"
    ignored = import_to("restore-kv", folder, tmp_path / "out", reader, score="keydiff")
    assert set(ignored.values()) == {"LoRA of the last layer that no key or value depends on"}
    assert all(name.startswith(("layers.2.self_attn.q", "layers.2.self_attn.o", "layers.2.mlp")) for name in ignored)
    ids = torch.tensor([[*reader.bos_ids, *reader.tokenize(PASSAGE)]])
    tuned, scale = copy.deepcopy(reader.model), ALPHA / (RANK**0.5 if rslora else RANK)
    held = state(reader)
    with torch.no_grad():
        for i, layer in enumerate(tuned.model.layers):
            for name in MODULES:
                start = f"base_model.model.model.layers.{i}.{name}.lora_"
                layer.get_submodule(name).weight += scale * held[f"{start}B.weight"] @ held[f"{start}A.weight"]
        cache = DynamicCache()
        reader.model.model(ids, past_key_values=cache, use_cache=True)
        tuned.model(inputs_embeds=embeddings[None], past_key_values=cache, use_cache=True)
    (passage,) = load_compressor(tmp_path / "out", reader).compress([PASSAGE], ratio=3)
    keys, values = (part[0].unflatten(0, (3, 2, -1)) for part in (passage.keys, passage.values))
    for number, layer in enumerate(cache.layers):
        assert torch.allclose(keys[number, :, -TOKENS:], layer.keys[0, :, -TOKENS:], atol=1e-4)
        assert torch.allclose(values[number, :, -TOKENS:], layer.values[0, :, -TOKENS:], atol=1e-4)


NAME = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
DAMAGE = {
    "a matrix is missing": ({NAME: None}, {}, None, r"missing layers\.1\.self_attn\.v_proj\.lora_B"),
    "a tensor of DoRA": ({NAME.replace("B.weight", "magnitude_vector"): torch.ones(3)}, {}, None, "unknown keys"),
    "DoRA": ({}, {"use_dora": True}, None, "sets use_dora to True; supported is LoRA"),
    "a setting of later versions": ({}, {"new_setting": 1}, None, "sets new_setting to 1"),
    "other scales": ({}, {"alpha_pattern": {"v_proj": 1}}, None, "sets alpha_pattern"),
    "no scale": ({}, {"lora_alpha": None}, None, "sets lora_alpha to None"),
    "no embeddings": ({}, {}, {"embeddings": torch.zeros(2, 32)}, "lacks restore_embeddings"),
    "narrow embeddings": ({}, {}, {"restore_embeddings": torch.zeros(2, 31)}, r"is \(2, 31\)"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_missing_or_unknown_is_named(tmp_path, reader, what):
    changes, config, rows, message = DAMAGE[what]
    folder, _ = write(tmp_path / "restore", reader, config, rows, **changes)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint("restore-kv", folder, reader)


def test_it_asks_for_its_reader(tmp_path, reader):
    folder, _ = write(tmp_path / "restore", reader)
    with pytest.raises(MissingOption, match="holds no reader"):
        import_checkpoint("restore-kv", folder)
