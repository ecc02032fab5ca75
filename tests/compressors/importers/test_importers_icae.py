"""ICAE checkpoints in their authors' layouts, versions 1 and 2, against a computation by hand on the base model."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from nutgraf import Reader, load_compressor
from nutgraf.compressors import CheckpointError
from nutgraf.compressors.importers import MissingOption, import_checkpoint, import_to, recognise
from nutgraf.compressors.importers.prompts import icae_prompt
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

PASSAGE = (
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911). "
    "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."
)
MEM, RANK, RATE = 8, 4, 3
QUESTION = "where was she born?"
BEFORE, AFTER = (1, 33, 89, 93), (33, 48, 89, 93)


def lora(model, targets=("q_proj", "v_proj"), seed=1) -> dict[str, torch.Tensor]:
    """LoRA matrices by the path of their module in the causal LM."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in targets:
            out[f"{name}.lora_A"] = 0.3 * torch.randn(RANK, module.in_features, generator=g)
            out[f"{name}.lora_B"] = 0.3 * torch.randn(module.out_features, RANK, generator=g)
    return out


def tuned(model, matrices, scale):
    """The model with W + scale * B A: what LoRA computes, written out."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in merged.named_modules():
            if f"{name}.lora_A" in matrices:
                module.weight += scale * matrices[f"{name}.lora_B"] @ matrices[f"{name}.lora_A"]
    return merged


@pytest.fixture(scope="module")
def base(zoo):
    return zoo.model("mistral")


@pytest.fixture(scope="module")
def memory():
    return torch.randn(MEM + 3, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def state(base, memory):
    named = {f"icae.base_model.model.{n}.default.weight": t for n, t in lora(base).items()}
    return {**named, "memory_token_embed.weight": memory}


@pytest.fixture(scope="module")
def reader(zoo, base):
    return Reader.from_pretrained(copy.deepcopy(base), tokenizer=zoo.tokenizer())


def write(path: Path, state) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@torch.no_grad()
def slots_by_hand(base, memory, ids, cut):
    encoder = tuned(base, lora(base), 32 / RANK)
    out = []
    for segment in cut(ids):
        embeds = torch.cat([base.get_input_embeddings()(torch.tensor(segment)), memory[:MEM]])[None]
        out.append(encoder.model(inputs_embeds=embeds).last_hidden_state[0, -MEM:])
    return torch.cat(out)


def equalised(ids):
    n = math.ceil(len(ids) / (MEM * RATE))
    length = math.ceil(len(ids) / n)
    return [ids[i * length : (i + 1) * length] for i in range(n)]


@torch.no_grad()
def logits_by_hand(model, *parts, target):
    """Logits at the target's tokens, of a prompt of ids and embeddings."""
    embed = model.get_input_embeddings()
    rows = [part if torch.is_tensor(part) else embed(torch.tensor(part, dtype=torch.long)) for part in parts]
    embeds = torch.cat([*rows, embed(torch.tensor(target))])[None]
    return model(inputs_embeds=embeds).logits[0, -len(target) - 1 : -1]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("bos", [True, False])
def test_version_2_computes_what_the_equations_give(zoo, tmp_path, base, memory, state, reader, suffix, bos):
    path = write(tmp_path / f"icae{suffix}", state)
    assert recognise(path) == recognise(tmp_path) == "icae"
    icae = import_checkpoint("icae", path, reader, mean_compression_rate=RATE, bos=bos)
    ids = zoo.tokenizer()(PASSAGE, add_special_tokens=bos)["input_ids"]
    want = slots_by_hand(base, memory, ids, equalised)
    assert len(want) == MEM * math.ceil(len(ids) / (MEM * RATE)) >= 2 * MEM
    (passage,) = icae.compress([PASSAGE])
    assert torch.allclose(passage.embeds, want, atol=1e-4)
    # repeating: the target holds BOS, and EOS closes it
    target = [*ids, 2]
    (found,) = icae.reader.target_logits([icae_prompt(icae, [passage], "ae")], [target])
    assert torch.allclose(found, logits_by_hand(base, want, memory[MEM : MEM + 1], target=target), atol=1e-4)
    # answering an instruction
    asked = zoo.tokenizer()(QUESTION, add_special_tokens=False)["input_ids"]
    target = zoo.tokenizer()("in Warsaw", add_special_tokens=False)["input_ids"]
    prompt = icae_prompt(icae, [passage], "ft", QUESTION, before=BEFORE, after=AFTER)
    (found,) = icae.reader.target_logits([prompt], [target], add_eos=True)
    ft = memory[MEM + 2 : MEM + 3]
    hand = logits_by_hand(base, BEFORE, want, ft, asked, AFTER, target=[*target, 2])
    assert torch.allclose(found, hand, atol=1e-4)
    # continuing
    (found,) = icae.reader.target_logits([icae_prompt(icae, [passage], "lm")], [target])
    assert torch.allclose(found, logits_by_hand(base, want, target=target), atol=1e-4)
    (found,) = icae.reader.target_logits([icae_prompt(icae, [passage], "lm", lm_token=True)], [target])
    lm = memory[MEM + 1 : MEM + 2]
    assert torch.allclose(found, logits_by_hand(base, want, lm, target=target), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 23, 24, 25, 48, 49, 71])
def test_segments_are_those_of_the_authors_code(tmp_path, base, memory, state, reader, n):
    icae = import_checkpoint("icae", write(tmp_path / "a.pt", state), reader, mean_compression_rate=RATE)
    ids = torch.randint(7, 500, (n,)).tolist()
    (passage,) = icae.encode_ids([ids])
    assert torch.allclose(passage.embeds, slots_by_hand(base, memory, [1, *ids], equalised), atol=1e-4)
    assert passage.source_tokens == n


def test_the_readers_own_weights_are_untouched_and_needed(tmp_path, state, reader):
    path = write(tmp_path / "icae.pt", state)
    with pytest.raises(MissingOption, match="reader"):
        import_checkpoint("icae", path, mean_compression_rate=RATE)
    with pytest.raises(MissingOption, match="mean_compression_rate"):
        import_checkpoint("icae", path, reader)
    ids = torch.tensor([[1, 7, 8, 9]])
    before = reader.model(ids).logits
    icae = import_checkpoint("icae", path, reader, mean_compression_rate=RATE)
    icae.compress([PASSAGE])
    assert icae.reader is reader
    assert torch.equal(reader.model(ids).logits, before)
    import_to("icae", path, tmp_path / "out", reader, mean_compression_rate=RATE)
    assert not (tmp_path / "out" / "reader").exists()  # it is the one given
    again = load_compressor(tmp_path / "out", reader)
    assert torch.equal(again.compress([PASSAGE])[0].embeds, icae.compress([PASSAGE])[0].embeds)
    with pytest.raises(CheckpointError, match="holds no reader of its own"):
        load_compressor(tmp_path / "out")


@pytest.fixture(scope="module")
def whole(zoo, memory):
    """Version 1: base weights of a larger vocabulary, rotary frequencies, LoRA and memory embeddings."""
    base = zoo.model("llama", vocab_size=zoo.VOCAB + 1 + MEM + 3)
    state = {f"icae.base_model.model.{n}": t.clone() for n, t in base.state_dict().items()}
    state |= {f"icae.base_model.model.{n}.default.weight": t for n, t in lora(base).items()}
    state |= {f"icae.base_model.model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    return base, {**state, "memory_token_embed.weight": memory}


@pytest.mark.slow
def test_version_1_brings_its_reader_and_reads_one_segment(zoo, tmp_path, memory, whole):
    base, state = whole
    given = zoo.reader("llama", seed=5)  # another one: its config and tokenizer are all that is taken
    path = write(tmp_path / "icae.pt", state)
    icae = import_checkpoint("icae", path, given, max_tokens=40)
    assert icae.reader is not given
    assert icae.reader.vocab_size == zoo.VOCAB + 1 + MEM + 3
    ids = zoo.tokenizer()(PASSAGE)["input_ids"]
    want = slots_by_hand(base, memory, ids[:40], lambda ids: [ids])
    with pytest.warns(UserWarning, match="cut to its first 40"):
        (passage,) = icae.compress([PASSAGE])
    assert torch.allclose(passage.embeds, want, atol=1e-4)
    asked = zoo.tokenizer()(QUESTION, add_special_tokens=False)["input_ids"]
    target = zoo.tokenizer()("in Warsaw", add_special_tokens=False)["input_ids"]
    prompt = icae_prompt(icae, [passage], "ft", QUESTION, version=1)
    (found,) = icae.reader.target_logits([prompt], [target])
    ft = memory[MEM + 2 : MEM + 3]
    hand = logits_by_hand(base, want, ft, asked, ft, target=target)
    assert found.shape[1] == hand.shape[1] == zoo.VOCAB + 1 + MEM + 3  # the loss runs over the added rows too
    assert torch.allclose(found, hand, atol=1e-4)
    loss = cross_entropy(found, torch.tensor(target))
    assert torch.allclose(loss, cross_entropy(hand, torch.tensor(target)), atol=1e-4)
    # written with its reader, it loads by itself
    ignored = import_to("icae", path, tmp_path / "out", given, max_tokens=40)
    assert len(ignored) == 3
    loaded = load_compressor(tmp_path / "out")
    short = PASSAGE[:40]
    assert torch.equal(loaded.compress([short])[0].embeds, icae.compress([short])[0].embeds)
    assert loaded.config.truncate == 40


def test_version_1_with_zeroed_base_weights_takes_the_readers(zoo, tmp_path, memory, whole):
    base, state = whole
    zeroed = {n: torch.zeros_like(t) if "lora" not in n and "memory" not in n else t for n, t in state.items()}
    given = Reader.from_pretrained(copy.deepcopy(base), tokenizer=zoo.tokenizer())
    icae = import_checkpoint("icae", write(tmp_path / "icae.pt", zeroed), given)
    assert icae.reader is given
    ids = zoo.tokenizer()(PASSAGE[:60])["input_ids"]
    want = slots_by_hand(base, memory, ids, lambda ids: [ids])
    assert torch.allclose(icae.compress([PASSAGE[:60]])[0].embeds, want, atol=1e-4)


@pytest.mark.parametrize("form", ["decoder", "base_layer", "other weights"])
def test_version_2_as_its_training_saves_it(zoo, tmp_path, base, memory, state, reader, form):
    """Base weights too, with rows for the new tokens, in the names of newer peft, and the decoder's own copy."""
    model = zoo.model("mistral", seed=5) if form == "other weights" else base
    saved = dict(state)
    for name, t in model.state_dict().items():
        rows = torch.full((1 + MEM + 3, 32), 9.0)  # never trained, never read
        grown = torch.cat([t, rows]) if name in ("model.embed_tokens.weight", "lm_head.weight") else t
        new = name.endswith(("q_proj.weight", "v_proj.weight")) and form != "decoder"
        saved[f"icae.base_model.model.{name.replace('.weight', '.base_layer.weight') if new else name}"] = grown
        if form != "base_layer":
            saved[f"decoder.{name}"] = t
    path = write(tmp_path / "model.pt", saved)
    with pytest.raises(MissingOption, match="mean_compression_rate"):  # so it was taken for version 2
        import_checkpoint("icae", path, reader)
    icae = import_checkpoint("icae", path, reader, mean_compression_rate=RATE)
    assert icae.config.truncate is None
    assert (icae.reader is reader) == (form != "other weights")
    assert icae.reader.vocab_size == zoo.VOCAB
    (passage,) = icae.compress([PASSAGE])
    want = slots_by_hand(model, memory, zoo.tokenizer()(PASSAGE)["input_ids"], equalised)
    assert torch.allclose(passage.embeds, want, atol=1e-4)
    (found,) = icae.reader.target_logits([icae_prompt(icae, [passage], "lm")], [[9, 8]])
    assert torch.allclose(found, logits_by_hand(model, want, target=[9, 8]), atol=1e-4)
    name = "icae.base_model.model.lm_head.weight"
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight has \d+ rows, wanted {zoo.VOCAB} "):
        import_checkpoint("icae", write(path, {**saved, name: saved[name][:-1]}), reader, mean_compression_rate=RATE)


A, B = (f"icae.base_model.model.model.layers.1.self_attn.v_proj.lora_{side}.default.weight" for side in "AB")
DAMAGE = {
    "missing lora": (lambda s: {k: v for k, v in s.items() if k != A}, r"missing layers\.1\.self_attn\.v_proj\.lora_A"),
    "missing memory": (lambda s: {k: v for k, v in s.items() if "memory" not in k}, r"lacks memory_token_embed"),
    "no lora": (lambda s: {k: v for k, v in s.items() if "memory" in k}, "no LoRA"),
    "unknown": (lambda s: {**s, "memory_head.0.weight": torch.zeros(2)}, r"memory_head\.0\.weight"),
    "layer too many": (
        lambda s: {**s, B.replace("layers.1", "layers.9"): s[B], A.replace("layers.1", "layers.9"): s[A]},
        r"unknown layers\.9",
    ),
    "shape": (lambda s: {**s, B: torch.zeros(3, RANK)}, r"v_proj\.lora_B is \(3, 4\)"),
    "rank": (lambda s: {**s, B: torch.zeros(16, RANK + 1)}, "ranks"),
    "width": (lambda s: {**s, "memory_token_embed.weight": torch.zeros(MEM + 3, 31)}, r"\(11, 31\), wanted"),
    "rows": (lambda s: {**s, "memory_token_embed.weight": torch.zeros(3, 32)}, "has 3 rows"),
    "not finite": (lambda s: {**s, A: s[A] / 0}, "holds NaN or infinite"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damage_is_refused_by_name(tmp_path, state, reader, damage):
    change, named = DAMAGE[damage]
    path = write(tmp_path / "icae.pt", change(state))
    with pytest.raises(CheckpointError, match=named):
        import_checkpoint("icae", path, reader, mean_compression_rate=RATE)


def test_unsafe_and_truncated_files_are_refused(tmp_path, state, reader):
    path = tmp_path / "icae.pt"
    torch.save({**state, "trainer": Path("home")}, path)  # an object, restored by running its code
    with pytest.raises(CheckpointError, match="pickled objects other than tensors"):
        import_checkpoint("icae", path, reader, mean_compression_rate=RATE)
    for suffix in (".pt", ".safetensors"):
        whole = write(tmp_path / f"whole{suffix}", state).read_bytes()
        for size in (0, 5, len(whole) // 2, len(whole) - 9):
            (tmp_path / f"part{suffix}").write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match="cannot be read"):
                import_checkpoint("icae", tmp_path / f"part{suffix}", reader, mean_compression_rate=RATE)
    torch.save({**state, "steps": 7}, path)
    with pytest.raises(CheckpointError, match="'steps' is a int"):
        import_checkpoint("icae", path, reader, mean_compression_rate=RATE)
    with pytest.raises(CheckpointError, match="must hold one file of tensors"):
        import_checkpoint("icae", tmp_path, reader, mean_compression_rate=RATE)


def test_the_prompt_helper_refuses_what_it_does_not_know(tmp_path, state, reader):
    icae = import_checkpoint("icae", write(tmp_path / "a.pt", state), reader, mean_compression_rate=RATE)
    with pytest.raises(ValueError, match="version"):
        icae_prompt(icae, [], version=3)
    with pytest.raises(ValueError, match="Token ids must lie"):
        reader.plan([icae_prompt(icae, [], "ft", "x")])  # Mistral's ids are beyond this small vocabulary


def test_the_command_line_imports(tmp_path, state, reader):
    from nutgraf.cli import app
    from typer.testing import CliRunner

    base = tmp_path / "base"
    reader.model.save_pretrained(base)
    reader.tokenizer.save_pretrained(base)
    path = write(tmp_path / "icae.pt", {**state, "icae.x.rotary_emb.inv_freq": torch.ones(2)})
    command = ["import", "icae", str(path), "-o", str(tmp_path / "out"), "--reader", str(base)]
    asked = CliRunner().invoke(app, command)
    assert asked.exit_code == 2
    assert "mean_compression_rate" in asked.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*command, f"mean_compression_rate={RATE}"])
    assert done.exit_code == 0, done.output
    assert "follow from the config: icae.x.rotary_emb.inv_freq" in done.output
    loaded = load_compressor(tmp_path / "out", Reader.from_pretrained(base))
    assert loaded.config.ratio == RATE
