"""Gist tokens: stored slots equal the masked pass, and both train."""

from __future__ import annotations

import json
import math

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors import Reader, make_compressor
from nutgraf.compressors.core.batching import SoftSequence
from nutgraf.compressors.kv.encode import encode_kv
from nutgraf.compressors.kv.gist import GistCompressor, GistConfig, mean_row
from nutgraf.compressors.reader.plan import plan_prompts
from nutgraf.compressors.slots.segments import Segment
from nutgraf.recipes.tasks.compressor import CompressorTask
from nutgraf.recipes.tasks.items import Reading
from nutgraf.recipes.training.schema import parse_recipe
from nutgraf.recipes.training.trainer import run_recipe
from oracles.gist_mask import Gisted, gist_mask, masked_logits
from torch.nn.functional import cross_entropy

LONG = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
SHORT = "The treaty was signed."
QUESTION = "\n\nQuestion: who signed it?\nAnswer:"
ROTARY = ["llama", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox", "falcon", "olmo2", "mixtral"]
PROMPTS = [
    [Gisted(LONG), QUESTION],
    ["Read this: ", Gisted(SHORT), " and this: ", Gisted(LONG), Gisted(""), Gisted("a"), QUESTION],
    ["No passage here."],
    [Gisted(SHORT), Gisted(LONG), "x"],
]
TARGETS = [" the delegates of 109 parties.", " it", " in 1648", " Warsaw, in 1903"]


def build(reader: Reader, **settings) -> GistCompressor:
    torch.manual_seed(0)
    gist = GistCompressor(GistConfig(**{"n_gist": 6, "r": 4, **settings}), reader).eval()
    with torch.no_grad():  # as after some training
        for p in gist.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return gist


def stored_logits(gist: GistCompressor, prompts, targets, ratio=None) -> list[torch.Tensor]:
    """The prompts' targets, read from passages that were compressed on their own."""
    texts = [piece.text for prompt in prompts for piece in prompt if isinstance(piece, Gisted)]
    found = iter(gist.encode(texts, ratio=ratio))
    filled = [[next(found) if isinstance(piece, Gisted) else piece for piece in prompt] for prompt in prompts]
    return gist.reader.target_logits(filled, targets)


def agree(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    scale = max(float(t.detach().abs().max()) for t in one)
    pairs = zip(one, other)
    return all(a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-5 * max(1.0, scale) for a, b in pairs)


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


# -- the masked pass -----------------------------------------------------------------------------------------------


def test_a_compressor_that_was_just_made_streams(reader):
    gist = GistCompressor(GistConfig(n_gist=6, r=4), reader)
    prompt = [*gist.compress([SHORT]), QUESTION]
    assert "".join(gist.reader.stream(prompt, max_new_tokens=4)) == gist.reader.generate([prompt], 4)[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ROTARY)
def test_stored_slots_equal_the_masked_pass(zoo, architecture):
    gist = build(zoo.reader(architecture))
    with torch.no_grad():
        stored = stored_logits(gist, PROMPTS, TARGETS)
        assert agree(stored, masked_logits(gist, PROMPTS, TARGETS))
        for i, (prompt, target) in enumerate(zip(PROMPTS, TARGETS)):
            assert agree(stored[i : i + 1], masked_logits(gist, [prompt], [target]))
        assert agree(stored_logits(gist, PROMPTS, TARGETS, 3.0), masked_logits(gist, PROMPTS, TARGETS, ratio=3.0))
    # what is compared does depend on the passage, on the prompt's text and on the ratio
    assert not agree(stored, masked_logits(gist, [[Gisted(LONG[1:]), QUESTION], *PROMPTS[1:]], TARGETS))
    assert not agree(stored, masked_logits(gist, PROMPTS, TARGETS, ratio=3.0))


@pytest.mark.parametrize("settings", [{"tuning": "full"}, {"shared_embedding": False}, {"residual": True}])
def test_both_readings_agree_in_every_form(reader, settings):
    gist = build(reader, **settings)
    assert agree(stored_logits(gist, PROMPTS, TARGETS, 4), masked_logits(gist, PROMPTS, TARGETS, ratio=4))


def test_both_readings_train_alike(reader):
    gist = build(reader, shared_embedding=False).train()
    grads = []
    for logits in (stored_logits, masked_logits):
        gist.zero_grad()
        found = torch.cat(logits(gist, PROMPTS, TARGETS))
        cross_entropy(found, torch.arange(len(found)) % 50).backward()
        grads.append({name: p.grad.clone() for name, p in gist.named_parameters()})
    assert all(torch.allclose(g, grads[1][name], atol=1e-5, rtol=1e-3) for name, g in grads[0].items())
    assert all(float(g.abs().max()) > 0 for g in grads[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_the_papers_mask_equals_reading_the_slots_alone(zoo, architecture, left):
    """[BOS passage][gist][rest] under the paper's mask, where the rest sees the gist and nothing before it."""
    gist = build(zoo.reader(architecture))
    reader, rest = gist.reader, [reader_ids(gist, QUESTION), reader_ids(gist, " it was signed")]
    sequences = []
    for passage, tail in zip((LONG, SHORT), rest):
        front = reader.bos_ids + reader.tokenize(passage)
        n = gist.segments(len(front) - 1)[0][1]
        sequences.append((front, n, tail))
    time = max(len(front) + n + len(tail) for front, n, tail in sequences)
    embeds = torch.zeros(2, time, reader.width)
    where, valid = torch.zeros(2, time, dtype=torch.bool), torch.zeros(2, time, dtype=torch.bool)
    positions = torch.zeros(2, time, dtype=torch.long)
    with torch.no_grad():
        for i, (front, n, tail) in enumerate(sequences):
            size = len(front) + n + len(tail)
            start = time - size if left else 0
            row = [reader.embed(torch.tensor(front)), gist.gist.expand(n, -1), reader.embed(torch.tensor(tail))]
            embeds[i, start : start + size] = torch.cat(row)
            where[i, start + len(front) : start + len(front) + n] = True
            valid[i, start : start + size] = True
            positions[i, start : start + size] = torch.arange(size)
        mask = reader.kv_placement.additive(gist_mask(where, valid), torch.float32)
        hidden = reader.model.get_decoder()(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        # without the reader's own BOS, which the paper's mask hides as well
        prompts = [[passage, text] for passage, text in zip(gist.compress([LONG, SHORT]), (QUESTION, " it was signed"))]
        read, layout, _, _ = reader.forward(plan_prompts(prompts, reader.prompts, [False, False]))
    for i, tail in enumerate(rest):
        one = hidden[i][valid[i]][-len(tail) :]
        other = read[i][layout.valid[i]]
        assert torch.allclose(one, other, atol=1e-5 * max(1.0, float(one.abs().max())))


def reader_ids(gist: GistCompressor, text: str) -> list[int]:
    return gist.reader.tokenize(text)


def picture(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def test_the_mask_is_the_papers():
    rows = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    one, apart, none = gist_mask(rows)[:, 0]
    assert picture(one) == ["x....", "xx...", "xxx..", ".xxx.", ".xxxx"]
    assert picture(apart) == ["x....", "xx...", "xxx..", "xxxx.", ".xxxx"]
    assert picture(none) == ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]
    assert picture(gist_mask(rows, neg_control=True)[0, 0]) == ["x....", "xx...", "xxx..", "...x.", "...xx"]
    left, right = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    assert picture(gist_mask(rows[:1], left[None])[0, 0]) == ["x....", ".x...", ".xx..", ".xxx.", ".xxxx"]
    assert picture(gist_mask(rows[:1], right[None])[0, 0]) == ["x....", "xx...", "xxx..", ".xxx.", "....x"]
    with pytest.raises(ValueError, match="bool tensor"):
        gist_mask(rows.long())
    with pytest.raises(ValueError, match=r"valid must be a bool tensor"):
        gist_mask(rows, rows[:1])


def test_one_pass_needs_one_model_and_one_position(reader):
    for settings in ({"adapt_reader": False}, {"positions": "spread"}):
        with pytest.raises(ValueError, match="masked pass needs"):
            masked_logits(build(reader, **settings), PROMPTS[:1], TARGETS[:1])
    with pytest.raises(ValueError, match="end with text"):
        masked_logits(build(reader), [["a", Gisted(LONG)]], [" b"])


# -- slots ---------------------------------------------------------------------------------------------------------


def test_slots_follow_the_length(reader):
    gist = build(reader, n_gist=8)
    assert [gist.segments(n) for n in (0, 1, 7, 8, 500)] == [[], [(1, 1)], [(7, 7)], [(8, 8)], [(500, 8)]]
    for ratio in (1, 2.5, 4):
        for n in (1, 3, 20, 33, 200):
            cut = gist.segments(n, ratio)
            assert sum(length for length, _ in cut) == n
            assert all(slots == min(8, math.ceil(length / ratio - 1e-6)) for length, slots in cut)
            assert all(length <= 8 * ratio for length, _ in cut)
    assert build(reader, n_gist=8, ratio=4.0).segments(33) == [(17, 5), (16, 4)]
    assert build(reader, segment_tokens=10).segments(25) == [(9, 6), (9, 6), (7, 6)]


def test_segments_keep_within_positions_and_window(zoo):
    for reader in (zoo.reader("llama", max_position_embeddings=40), zoo.reader("mistral", sliding_window=40)):
        gist = build(reader)
        assert max(n for n, _ in gist.segments(500)) + 6 + len(reader.bos_ids) <= 40
        with pytest.raises(ValueError, match="fewer memory tokens"):
            build(reader, n_gist=40)


def test_unequal_batches_equal_one_by_one(reader):
    gist = build(reader, ratio=3.0)
    texts = [LONG * n for n in (1, 3, 2)] + ["a", "", SHORT]
    whole = gist.compress(texts)
    gist.batch_positions = 1
    for a, b in zip(whole, gist.compress(texts)):
        assert torch.equal(a.positions, b.positions)
        for x, y in zip(a.tensors().values(), b.tensors().values()):
            assert torch.allclose(x, y, atol=1e-5)
    # a stored passage holds its own slots alone, not a view of the batch
    assert whole[0].keys[0].untyped_storage().nbytes() == whole[0].keys[0].numel() * 4


def test_keys_are_those_of_the_plain_model_at_the_gist_tokens(zoo):
    reader = zoo.reader("llama")
    gist = GistCompressor(GistConfig(n_gist=3), reader).eval()  # LoRA still changes nothing
    ids = torch.tensor(reader.bos_ids + reader.tokenize(LONG))
    embeds = torch.cat([reader.embed(ids), gist.gist.detach().expand(3, -1)])[None]
    with torch.no_grad():
        layers = reader.model(inputs_embeds=embeds, use_cache=True).past_key_values.layers
    (passage,) = gist.compress([LONG])
    assert passage.positions.tolist() == [len(ids), len(ids) + 1, len(ids) + 2]
    for layer, k, v in zip(layers, passage.keys, passage.values):
        assert torch.allclose(layer.keys[0, :, -3:], k, atol=1e-5)
        assert torch.allclose(layer.values[0, :, -3:], v, atol=1e-5)


def test_gist_embeddings_start_as_the_mean_row(zoo):
    for name in ("llama", "gemma3_text"):  # Gemma scales its embeddings
        reader = zoo.reader(name)
        want = reader.embed(torch.arange(reader.vocab_size)).mean(0)
        assert torch.allclose(mean_row(reader), want, atol=1e-5)
        assert torch.allclose(GistCompressor(GistConfig(), reader).gist, want[None], atol=1e-5)
        apart = GistCompressor(GistConfig(n_gist=4, shared_embedding=False), reader)
        assert torch.allclose(apart.gist, want.expand(4, -1), atol=1e-5)


def test_the_residual_is_the_pooled_embeddings(reader):
    gist = build(reader, residual=True, ratio=3.0)
    segments = [Segment([5, 6, 7, 8, 9], 2, []), Segment([20, 21], 1, [])]
    runs = [[5, 6, 7], [8, 9], [20, 21]]
    want = torch.stack([reader.embed(torch.tensor(run)).sum(0) / len(run) ** 0.5 for run in runs])
    assert torch.allclose(torch.cat(gist.memory_inputs(segments)) - gist.gist, want, atol=1e-5)
    plain = build(reader, ratio=3.0)
    assert torch.equal(torch.cat(plain.memory_inputs(segments)), plain.gist.expand(3, -1))


def test_spread_slots_stand_in_the_middle_of_their_tokens(reader):
    gist = build(reader, positions="spread", ratio=4.0)
    (passage,) = gist.compress(["word " * 4])
    length, slots = gist.segments(passage.source_tokens)[0]
    first = len(reader.bos_ids)
    assert passage.positions.tolist() == [first + math.floor((j + 0.5) * length / slots) for j in range(slots)]


# -- who reads -----------------------------------------------------------------------------------------------------


def test_the_tuned_model_reads_or_the_given_one(reader):
    tuned, plain = build(reader), build(reader, adapt_reader=False)
    assert tuned.reader is not reader
    assert tuned.base_reader is plain.reader is reader
    (passage,) = tuned.compress([LONG])
    with pytest.raises(ValueError, match="made for"):
        reader.generate([[passage, QUESTION]], 2)
    answer = int(masked_logits(tuned, [[Gisted(LONG), QUESTION]], [" x"])[0][0].argmax())
    assert tuned.reader.generate([[passage, QUESTION]], 1, eos_token_id=[599])[0] == reader.decode([answer])
    assert reader.generate([[plain.compress([LONG])[0], QUESTION]], 2) is not None
    # without the reader beside it, an idle adapter is neither trained nor saved
    assert not any("2/self_attn/q_proj" in name for name in plain.encoder.lora)
    assert any("2/self_attn/v_proj" in name for name in plain.encoder.lora)
    assert any("2/self_attn/q_proj" in name for name in tuned.encoder.lora)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_readers_whose_keys_cannot_move_are_refused(zoo, architecture):
    with pytest.raises(ValueError, match="mixes positions into its keys"):
        make_compressor("gist", zoo.reader(architecture))


def test_gradient_checkpointing_is_refused(reader):
    gist = build(reader)
    with pytest.raises(ValueError, match="gradient_checkpointing: false"):
        gist.gradient_checkpointing_enable()
    gist.encoder.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="kept no keys"):
        gist.train().encode([LONG])


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_few_steps_lower_the_loss(zoo, tuning):
    reader = zoo.reader("llama")
    before = {name: t.clone() for name, t in reader.model.state_dict().items()}
    gist = GistCompressor(GistConfig(n_gist=4, r=4, tuning=tuning), reader).train()
    optimizer = torch.optim.Adam(gist.parameters(), 1e-2 if tuning == "lora" else 1e-3)
    losses = []
    for _ in range(8):
        passages = gist.encode([LONG, SHORT])
        found = gist.reader.target_hidden([[p, "\nRepeat:\n"] for p in passages], [SHORT, LONG])
        losses.append(cross_entropy(gist.reader.head(found.hidden), found.ids))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in gist.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(t, before[name]) for name, t in reader.model.state_dict().items())


def test_encode_kv_is_differentiable_in_the_memory_tokens(reader):
    gist = build(reader)
    memory = torch.randn(7, reader.width, requires_grad=True)
    rows = memory[:6].split([2, 4])
    sequences = [SoftSequence.with_memory(ids, row) for ids, row in zip([[1, 7, 8, 9], [1, 5]], rows)]
    found = encode_kv(gist.encoder, sequences)
    assert [f.keys[0].shape[1] for f in found] == [2, 4]
    sum(t.square().sum() for f in found for t in f.keys + f.values).backward()
    moved = memory.grad.abs().sum(-1) > 0
    assert moved.tolist() == [True] * 6 + [False]


@pytest.mark.parametrize(
    "settings",
    [
        {"n_gist": 0},
        {"n_gist": True},
        {"ratio": 0.5},
        {"ratio": float("nan")},
        {"r": 0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"positions": "middle"},
        {"segment_tokens": 0},
        {"target_modules": "q_proj"},
        {"target_modules": []},
        {"tuning": "some"},
    ],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GistConfig.from_dict(settings)


# -- under the trainer ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"method": "gist", "n_gist": 16}, {"method": "500x", "num_mem": 16}])
def test_the_trainer_lowers_the_loss(zoo, tmp_path, settings):
    cities = ["Bergen", "Oslo", "Lima", "Cairo", "Kyoto", "Quito"]
    paragraphs = [f"The town of {{}} stands on hill {n}. " * 3 + "Many people live there." for n in range(4)]
    articles = [f"# {city}\n\n" + "\n\n".join(p.replace("{}", city) for p in paragraphs) for city in cities]
    (tmp_path / "text.txt").write_text("\n<|doc|>\n".join(articles))
    stage = {
        "name": "mixed",
        "steps": 16,
        "batch_size": 4,
        "lr": 1e-2,
        "schedule": "constant",
        "objectives": {"ae": 0.3, "lm": 1.0, "kl": 1.0},
        "ratios": [2, 4],
        "mix": {"repeat": 0.3, "continue": 0.4, "made": 0.3},
        "log_every": 4,
    }
    data = {"dir": str(tmp_path), "texts": ["text.txt"], "max_chars": 300}
    raw = {"name": "toy", "kind": "compressor", "reader": "unused", "data": data}
    recipe = parse_recipe({**raw, "compressor": {**settings, "r": 4, "residual": True}, "stages": [stage]})
    task = CompressorTask(recipe, zoo.reader())
    before = {name: p.detach().clone() for name, p in task.compressor.named_parameters()}
    final = run_recipe(recipe, task, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"loss/ae", "loss/lm", "loss/kl"} <= set().union(*log)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert not any(torch.equal(p, before[name]) for name, p in task.compressor.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in task.compressor.base_reader.model.parameters())
    loaded = load_compressor(final, task.compressor.base_reader)
    one, other = (c.compress([LONG])[0] for c in (loaded, task.compressor))
    assert all(torch.equal(a, b) for a, b in zip(one.keys + one.values, other.keys + other.values))
    assert loaded.reader.generate([[one, QUESTION]], 3) == task.compressor.reader.generate([[other, QUESTION]], 3)


def test_a_continuation_behind_kv_begins_with_a_word_of_text():
    reading = Reading("continue", " the river runs\n\nto the sea", ("lm",), eos=False)
    moved = reading.behind_kv()
    assert moved.prompt(["Here"]) == ["Here", " the"]
    assert "".join(moved.prompt(["Here"])) + moved.target == "Here" + reading.target
    assert Reading("continue", " word", ("lm",)).behind_kv().prompt(["Here"]) == ["Here", "\n\n"]
    asked = Reading("plain", " x", ("lm",), "who?")
    assert asked.behind_kv() is asked
