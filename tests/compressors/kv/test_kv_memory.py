"""500xCompressor: keys and values of memory tokens, read by the reader as it was given."""

from __future__ import annotations

import math

import pytest
import torch
from nutgraf.compressors import Reader
from nutgraf.compressors.encoders.lora_twin import attention_inputs
from nutgraf.compressors.kv.five_hundred import KVMemoryCompressor, KVMemoryConfig
from nutgraf.compressors.reader.tokenization import TokenIds
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
QUESTION = "\n\nQuestion: who signed it?\nAnswer:"


def build(reader: Reader, **settings) -> KVMemoryCompressor:
    torch.manual_seed(0)
    memory = KVMemoryCompressor(KVMemoryConfig(**{"num_mem": 8, "r": 4, **settings}), reader).eval()
    with torch.no_grad():
        for p in memory.encoder.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return memory


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


def by_hand(
    zoo, compressor: KVMemoryCompressor, architecture: str, slots: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values at the memory tokens after `PASSAGE`, of a plain peft model with the same LoRA."""
    reader = compressor.reader
    base = zoo.model(architecture)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules=attention_inputs(base))).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            short = name.removeprefix("base_model.model.").split(".", 1)[1]
            key = short.replace(".default", "").removesuffix(".weight").replace(".", "/")
            p.data.copy_(compressor.encoder.lora[key] if key in compressor.encoder.lora else torch.zeros_like(p))
    ids = torch.tensor(reader.bos_ids + reader.tokenize(PASSAGE))
    embeds = torch.cat([reader.embed(ids), compressor.memory[:slots]])[None]
    cache = DynamicCache()
    with torch.no_grad():
        model(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.long),
            position_ids=torch.arange(embeds.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
        )
    return [(layer.keys[:, :, -slots:], layer.values[:, :, -slots:]) for layer in cache.layers]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "phi3"])
def test_slots_equal_a_plain_peft_model_run_by_hand(zoo, architecture):
    memory = build(zoo.reader(architecture), ratio=None)
    (passage,) = memory.compress([PASSAGE])
    assert passage.slots == 8
    n = len(memory.reader.bos_ids) + passage.source_tokens
    assert passage.positions.tolist() == list(range(n, n + 8))
    for (k, v), key, value in zip(by_hand(zoo, memory, architecture, 8), passage.keys, passage.values):
        assert torch.allclose(k[0], key, atol=1e-5 * max(1.0, float(k.abs().max())))
        assert torch.allclose(v[0], value, atol=1e-5 * max(1.0, float(v.abs().max())))


def test_slots_are_proportional_and_never_more_than_tokens(reader):
    memory = build(reader)
    n = len(reader.tokenize(PASSAGE))
    texts = [PASSAGE, "a", "", PASSAGE * 5]
    for ratio in (None, 1, 2.5, 9):
        found = memory.compress(texts, ratio=ratio)
        assert [p.source_tokens for p in found] == [len(reader.tokenize(text)) for text in texts]
        cut = memory.segments(n, ratio)
        assert sum(length for length, _ in cut) == n
        assert all(slots == min(8, math.ceil(length / (ratio or 4) - 1e-6)) for length, slots in cut)
        assert found[0].slots == sum(slots for _, slots in cut)
        assert found[2].slots == 0
        assert all(p.slots <= p.source_tokens for p in found)


def test_memory_starts_on_the_readers_scale(reader):
    ours = KVMemoryCompressor(KVMemoryConfig(num_mem=4), reader)
    assert torch.allclose(ours.memory.norm(dim=-1), torch.tensor(reader.embedding_norm), rtol=1e-4)


def test_lora_stands_only_where_keys_and_values_come_from(reader):
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    memory = build(reader, target_modules=everything)
    last = {name.split("/")[-2] for name in memory.encoder.lora if name.startswith("layers/2/")}
    first = {name.split("/")[-2] for name in memory.encoder.lora if name.startswith("layers/0/")}
    assert last == {"k_proj", "v_proj"}
    assert first == set(everything)
    sum(t.square().sum() for p in memory.encode([PASSAGE]) for t in p.keys + p.values).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in memory.encoder.parameters())


def test_the_given_reader_reads_them_anywhere(reader):
    memory = build(reader)
    one, two = memory.compress([PASSAGE, "The treaty was signed."])
    assert memory.reader is memory.base_reader is reader
    prompts = [[one, QUESTION], ["Read: ", two, " and ", one, QUESTION], ["no passage"]]
    together = reader.generate(prompts, 4)
    assert together == [reader.generate([prompt], 4)[0] for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("places", [1, 2])
def test_one_token_after_the_slots_is_enough(zoo, architecture, places):
    reader = zoo.reader(architecture)
    passage = build(reader).compress([PASSAGE])[0]
    shortest = [*[passage] * places, TokenIds((5,))]
    want: list[int] = []
    for _ in range(4):
        (logits,) = reader.target_logits([shortest], [[*want, 9]])
        want.append(int(logits[-1].argmax()))
    text = reader.decode(want)
    assert reader.generate([shortest], 4, generation_config=GenerationConfig(eos_token_id=-1)) == [text]
    assert "".join(reader.stream(shortest, 4, generation_config=GenerationConfig(eos_token_id=-1))) == text
    longer = [passage, QUESTION]
    assert reader.generate([shortest, longer, shortest], 4) == [
        reader.generate([prompt], 4)[0] for prompt in (shortest, longer, shortest)
    ]
    assert reader.generate([shortest], 4, num_beams=2) == reader.generate([shortest, longer], 4, num_beams=2)[:1]


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_readers_whose_keys_cannot_move_are_refused(zoo, architecture):
    with pytest.raises(ValueError, match="use an embeds method"):
        build(zoo.reader(architecture))


@pytest.mark.parametrize("settings", [{"num_mem": 0}, {"ratio": 0.5}, {"positions": "middle"}])
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        KVMemoryConfig.from_dict(settings)
