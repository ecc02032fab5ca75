"""ICAE and the LoRA twin of the reader."""

from __future__ import annotations

import math

import pytest
import torch
from nutgraf.compressors import Reader
from nutgraf.compressors.encoders.lora_twin import LoRATwin, attention_inputs
from nutgraf.compressors.slots.pooling import GatedPool
from nutgraf.compressors.slots.segments import Segment
from nutgraf.compressors.soft.icae import ICAECompressor, ICAEConfig
from peft import LoraConfig, get_peft_model

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


def build(reader: Reader, **settings) -> ICAECompressor:
    torch.manual_seed(0)
    icae = ICAECompressor(ICAEConfig(**{"mem_size": 8, "r": 4, **settings}), reader).eval()
    with torch.no_grad():
        for p in icae.encoder.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return icae


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["append", "spread"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2", "phi3"])
def test_slots_equal_a_plain_peft_model_run_by_hand(zoo, architecture, positions):
    reader = zoo.reader(architecture)
    icae = build(reader, ratio=5, projector="none", alpha=16, positions=positions, residual=False)
    base = zoo.model(architecture)  # the same weights, wrapped by peft's usual door
    targets = attention_inputs(base)
    by_hand = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=targets)).eval()
    for name, p in by_hand.named_parameters():
        if "lora_" in name:
            short = name.removeprefix("base_model.model.").split(".", 1)[1]
            short = short.replace(".default", "").removesuffix(".weight")
            p.data.copy_(icae.encoder.lora[short.replace(".", "/")])
    ids = reader.tokenize(PASSAGE)
    rows = []
    for start in range(0, len(ids), -(-len(ids) // math.ceil(len(ids) / 40))):
        segment = ids[start : start + -(-len(ids) // math.ceil(len(ids) / 40))]
        slots = math.ceil(len(segment) / 5)
        embeds = torch.cat([reader.embed(torch.tensor(reader.bos_ids + segment)), icae.memory[:slots]])[None]
        at = list(range(embeds.shape[1]))
        if positions == "spread":
            first = len(reader.bos_ids)
            at[-slots:] = [first + math.floor((j + 0.5) * len(segment) / slots) for j in range(slots)]
        with torch.no_grad():
            hidden = by_hand(
                inputs_embeds=embeds,
                position_ids=torch.tensor([at]),
                attention_mask=torch.ones(1, len(at), dtype=torch.long),
                output_hidden_states=True,
            ).hidden_states[-1][0]
        rows.append(hidden[-slots:])
    (passage,) = icae.compress([PASSAGE])
    assert torch.allclose(passage.embeds, torch.cat(rows), atol=1e-5)


@pytest.mark.parametrize("ratio", [1, 1.7, 2, 4, 7.3, 16, 1000])
def test_segments_are_equalised_and_slots_proportional(reader, ratio):
    icae = build(reader)
    for n in (0, 1, 2, 7, 31, 32, 33, 100, 517):
        cut = icae.segments(n, ratio)
        assert sum(length for length, _ in cut) == n
        assert len(cut) == math.ceil(n / math.floor(8 * ratio + 1e-6)) or len({length for length, _ in cut[:-1]}) <= 1
        assert all(slots == min(8, math.ceil(length / ratio - 1e-6)) for length, slots in cut)
        assert all(length <= 8 * ratio + 1e-6 for length, _ in cut)
        assert sum(slots for _, slots in cut) <= n


def test_one_checkpoint_serves_several_ratios(reader):
    icae = build(reader, mem_size=64)
    n = len(reader.tokenize(PASSAGE))
    for ratio in (1.0, 2.5, 4, 9):
        (passage,) = icae.compress([PASSAGE], ratio=ratio)
        assert passage.slots == math.ceil(n / ratio)
        assert passage.info["ratio_asked"] == ratio
    # within one segment fewer appended slots are the first of more slots: the encoder is causal
    icae = build(reader, mem_size=64, positions="append", residual=False)
    many, few = (icae.compress([PASSAGE], ratio=ratio)[0].embeds for ratio in (4, 9))
    assert torch.allclose(many[: len(few)], few, atol=1e-5)


def test_the_residual_is_the_pooled_embeddings(reader):
    icae = build(reader, ratio=3)
    with torch.no_grad():
        icae.log_scale.fill_(-50.0)  # nothing of the encoder is left
    (passage,) = icae.compress([PASSAGE])
    want, cut = [], icae.segments(len(reader.tokenize(PASSAGE)))
    ids = torch.tensor(reader.tokenize(PASSAGE))
    for segment, (length, slots) in zip(ids.split([n for n, _ in cut]), cut):
        runs = [segment[[i for i in range(length) if i * slots // length == j]] for j in range(slots)]
        want += [reader.embed(run).sum(0) / len(run) ** 0.5 for run in runs]
    assert torch.allclose(passage.embeds, torch.stack(want), atol=1e-5)


def test_the_gate_says_which_tokens_are_pooled(reader):
    pool = GatedPool(reader)
    ids = reader.tokenize(PASSAGE)[:6]
    embeds = reader.embed(torch.tensor(ids))
    with torch.no_grad():
        pool.scale.fill_(3.0)
        pool.gate.copy_(0.1 * torch.randn(1, reader.width, generator=torch.Generator().manual_seed(0)))
    unit = embeds * reader.width**0.5 / reader.embedding_norm
    weights = torch.exp(8 * torch.tanh(unit @ pool.gate[0] / 8))
    want = [
        3 * (weights[a:b, None] * embeds[a:b]).sum(0) / weights[a:b].square().sum().sqrt() for a, b in ((0, 3), (3, 6))
    ]
    assert torch.allclose(pool([Segment(ids, 2, [])]), torch.stack(want), atol=1e-5)
    assert torch.allclose(pool([Segment(ids[:2], 1, []), Segment(ids, 2, [])])[1:], torch.stack(want), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        assert torch.allclose(pool([Segment(ids, 2, [])]), torch.stack(want), atol=1e-5)


def test_segments_keep_within_the_readers_positions(zoo):
    reader = zoo.reader("llama", max_position_embeddings=40)
    icae = build(reader, ratio=100)
    cut = icae.segments(200)
    assert max(length for length, _ in cut) + 8 + len(reader.bos_ids) <= 40
    (passage,) = icae.compress(["word " * 200])
    assert passage.slots == len(icae.segments(passage.source_tokens))
    assert max(length for length, _ in build(reader, ratio=4, segment_tokens=10).segments(200)) == 10
    with pytest.raises(ValueError, match="fewer memory tokens"):
        build(reader, mem_size=40)


def test_the_batch_size_inside_changes_nothing(reader):
    icae = build(reader)
    texts = [PASSAGE * n for n in (1, 3, 2)] + ["a", ""]
    whole = icae.compress(texts)
    icae.batch_positions = 1
    for a, b in zip(whole, icae.compress(texts)):
        assert torch.allclose(a.embeds, b.embeds, atol=1e-5)


@pytest.mark.parametrize("projector", ["none", "scale", "linear"])
def test_slots_start_on_the_readers_scale(zoo, projector):
    reader = zoo.reader("gemma3_text")
    torch.manual_seed(0)
    icae = ICAECompressor(ICAEConfig(mem_size=8, r=4, projector=projector, residual=False), reader)
    assert torch.allclose(icae.memory.norm(dim=-1), torch.tensor(reader.embedding_norm), rtol=1e-4)
    norm = icae.compress([PASSAGE])[0].embeds.norm(dim=-1).mean() / reader.embedding_norm
    assert (projector == "none") or 0.8 < norm < 1.25
    extra = {"none": set(), "scale": {"log_scale"}, "linear": {"linear.weight", "linear.bias"}}[projector]
    assert {name for name in icae.trainable_state() if "lora" not in name} == {"memory", *extra}


def test_without_lora_updates_the_encoder_is_the_reader(reader):
    torch.manual_seed(0)
    config = ICAEConfig(mem_size=8, r=4, projector="none", positions="append", residual=False)
    icae = ICAECompressor(config, reader)
    ids = torch.tensor(reader.bos_ids + reader.tokenize("The treaty was signed."))
    embeds = torch.cat([reader.embed(ids), icae.memory[:8]])[None]
    with torch.no_grad():
        want = reader.model.get_decoder()(inputs_embeds=embeds).last_hidden_state[0, len(ids) :]
    (passage,) = icae.compress(["The treaty was signed."], ratio=1)
    assert torch.allclose(passage.embeds, want[: passage.slots], atol=1e-5)


def test_the_twin_shares_memory_and_hides_the_reader(reader):
    twin = LoRATwin(reader.model, r=4, alpha=8)
    shared = {p.data_ptr() for p in reader.model.get_decoder().parameters()}
    held = {p.data_ptr() for n, p in twin.decoder.named_parameters() if "lora_" not in n}
    assert held == shared
    assert all("lora_" in name for name, _ in twin.named_parameters())
    assert all("lora_" in name for name in twin.state_dict())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in twin.parameters())


@pytest.mark.parametrize(
    ("architecture", "names"),
    [("llama", ["q_proj", "v_proj"]), ("phi3", ["qkv_proj"]), ("gpt_neox", ["query_key_value"]), ("gpt2", ["c_attn"])],
)
def test_target_modules_follow_the_architecture(zoo, architecture, names):
    assert attention_inputs(zoo.model(architecture)) == names


def test_target_modules_can_be_named(reader):
    icae = build(reader, target_modules=("gate_proj", "layers.0.self_attn.o_proj"))
    assert sum(name.endswith("A") for name in icae.encoder.lora) == 4
    with pytest.raises(ValueError, match=r"\['nope'\] are not in"):
        build(reader, target_modules=["q_proj", "nope"])


def test_gradient_checkpointing_gives_the_same_gradients(reader):
    grads = []
    for checkpointing in (False, True):
        icae = build(reader).train()
        if checkpointing:
            icae.encoder.gradient_checkpointing_enable()
        sum(p.embeds.square().sum() for p in icae.encode([PASSAGE, "short"])).backward()
        grads.append({name: p.grad for name, p in icae.named_parameters()})
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5) for name in grads[0])
    assert not reader.model.is_gradient_checkpointing
    assert not reader.model.training


def test_lora_dropout_is_on_in_training_only(reader):
    icae = build(reader, dropout=0.5)
    icae.train()
    assert not torch.equal(icae.encode([PASSAGE])[0].embeds, icae.encode([PASSAGE])[0].embeds)
    icae.eval()
    assert torch.equal(icae.encode([PASSAGE])[0].embeds, icae.encode([PASSAGE])[0].embeds)


def test_the_models_own_dropout_stays_off_in_training(zoo):
    icae = build(zoo.reader("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)).train()
    assert torch.equal(icae.encode([PASSAGE])[0].embeds, icae.encode([PASSAGE])[0].embeds)


@pytest.mark.parametrize(
    "settings",
    [
        {"mem_size": 0},
        {"ratio": 0.5},
        {"ratio": float("inf")},
        {"r": 0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"projector": "mlp"},
        {"segment_tokens": 0},
        {"target_modules": "q_proj"},
        {"target_modules": []},
    ],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ICAEConfig.from_dict(settings)
