"""LCLM checkpoints against a computation in plain torch, window by window."""

from __future__ import annotations

import json

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors import CheckpointError
from nutgraf.compressors.importers import import_checkpoint, import_to, recognise
from nutgraf.compressors.importers.prompts import lclm_prompt
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu
from transformers import AutoModel

TEXTS = [
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
    "Hi",
    "Rivers carry sediment to the sea. " * 12,
]
RATIO, WINDOW = 4, 24
SETTINGS = {
    "compression_ratio": RATIO,
    "encoder_window_size": WINDOW,
    "pooling": "mean",
    "encoder_mask_type": "causal",
    "boundary_overlap": 0,
    "adapter_type": "mlp",
}


def write(zoo, folder):
    """A checkpoint: an encoder of width 24, a decoder of width 32, whose tokenizer knows the marks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 1}
    encoder = zoo.model("qwen3", **sizes).model
    encoder.save_pretrained(folder / "encoder")
    zoo.tokenizer().save_pretrained(folder / "encoder")
    decoder = zoo.saved("qwen3", folder / "decoder")
    (held := zoo.tokenizer().__class__.from_pretrained(decoder)).add_tokens(
        ["<|memory_start|>", "<|memory_end|>"], True
    )
    held.save_pretrained(decoder)
    adapter = {"norm.weight": 1 + 0.1 * torch.randn(24), "fc1.weight": torch.randn(32, 24), "fc1.bias": torch.randn(32)}
    adapter |= {"fc2.weight": torch.randn(32, 32), "fc2.bias": torch.randn(32)}
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter.safetensors")
    (folder / "model_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture
def folder(zoo, tmp_path):
    (tmp_path / "lclm").mkdir()
    return write(zoo, tmp_path / "lclm")


def slots(zoo, folder, text, ratio=RATIO):
    """Slots as the paper says: windows, means of runs, RMSNorm, Linear, GELU, Linear."""
    encoder = AutoModel.from_pretrained(folder / "encoder").eval()
    adapter = load_file(folder / "adapter" / "adapter.safetensors")
    means = []
    ids = zoo.tokenizer()(text, add_special_tokens=False)["input_ids"]
    for start in range(0, len(ids), WINDOW):
        with torch.no_grad():
            states = encoder(torch.tensor([ids[start : start + WINDOW]])).last_hidden_state[0]
        means += [states[k : k + ratio].mean(0) for k in range(0, len(states), ratio)]
    h = torch.stack(means)
    h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * adapter["norm.weight"]
    h = gelu(h @ adapter["fc1.weight"].T + adapter["fc1.bias"])
    return h @ adapter["fc2.weight"].T + adapter["fc2.bias"]


@pytest.mark.slow
def test_it_computes_what_the_equations_give_and_is_written_whole(zoo, tmp_path, folder):
    assert recognise(folder) == "lclm"
    assert import_to("lclm", folder, tmp_path / "out") == {}
    loaded = load_compressor(tmp_path / "out")
    for ratio in (None, 3):
        found = loaded.compress([*TEXTS, ""], ratio=ratio)
        for text, passage in zip(TEXTS, found):
            assert torch.allclose(passage.embeds, slots(zoo, folder, text, ratio or RATIO), atol=1e-4)
        assert found[-1].slots == 0
    # the reader is the checkpoint's decoder, and reads the slots between the marks' own tokens
    reader, passage = loaded.reader, loaded.compress(TEXTS[:1])[0]
    message = [{"role": "user", "content": "<|memory_start|><|memory_end|> Who won?"}]
    text = reader.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor(reader.tokenizer(text, add_special_tokens=False)["input_ids"])
    at = ids.tolist().index(reader.tokenizer.convert_tokens_to_ids("<|memory_end|>"))
    decoder = zoo.model("qwen3")
    rows = decoder.get_input_embeddings()(ids)
    with torch.no_grad():
        want = decoder(inputs_embeds=torch.cat([rows[:at], passage.embeds, rows[at:]])[None]).logits[0, -1]
    found = reader.target_logits([lclm_prompt(reader, [passage], "Who won?")], [[5]])[0][0]
    assert torch.allclose(found, want, atol=1e-4)
    with pytest.raises(ValueError, match=r"has no '<\|memory_start\|>'"):
        lclm_prompt(zoo.reader("qwen3"), [passage], "Who won?")


def change(folder, part, **changes):
    if part == "settings":
        held = {k: v for k, v in {**SETTINGS, **changes}.items() if v is not None}
        (folder / "model_config.json").write_text(json.dumps(held))
        return
    file = folder / ("adapter/adapter.safetensors" if part == "adapter" else f"{part}/model.safetensors")
    state = {k: v for k, v in {**load_file(file), **changes}.items() if v is not None}
    save_file(state, file, metadata={"format": "pt"})


DAMAGE = {
    "a window of another size": ("settings", {"encoder_window_size": 22}, "no multiple of 4"),
    "no ratio": ("settings", {"compression_ratio": None}, "lacks compression_ratio"),
    "another pooling": ("settings", {"pooling": "eos"}, "sets pooling to 'eos'; supported is 'mean'"),
    "an unknown setting": ("settings", {"shuffle": True}, "sets shuffle, which is not known"),
    "a layer of the adapter": ("adapter", {"fc1.bias": None}, r"lacks fc1\.bias"),
    "one too many": ("adapter", {"fc3.bias": torch.zeros(3)}, r"unknown keys: fc3\.bias"),
    "a narrow adapter": ("adapter", {"fc2.weight": torch.zeros(32, 31)}, r"fc2\.weight is \(32, 31\)"),
    "a layer of the encoder": ("encoder", {"layers.1.mlp.up_proj.weight": None}, r"missing layers\.1\.mlp\.up_proj"),
    "a head on the encoder": ("encoder", {"lm_head.weight": torch.zeros(2, 2)}, r"unknown lm_head\.weight"),
    "a NaN in the decoder": ("decoder", {"model.norm.weight": torch.full((32,), torch.nan)}, "NaN or infinite"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_missing_or_unknown_is_named(folder, what):
    part, changes, message = DAMAGE[what]
    change(folder, part, **changes)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint("lclm", folder)


def test_adapters_of_lora_are_not_taken_for_weights(folder):
    (folder / "encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="encoder holds LoRA adapters; merge them"):
        import_checkpoint("lclm", folder)
