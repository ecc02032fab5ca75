"""xRAG checkpoints in their authors' layouts: what is imported computes what the paper's equations give."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from nutgraf import Reader, load_compressor
from nutgraf.compressors import CheckpointError, CompressedPassage
from nutgraf.compressors.importers import MissingOption, import_checkpoint, import_to, recognise
from nutgraf.compressors.importers.prompts import xrag_prompt
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch.nn.functional import gelu, linear
from transformers import AutoModel

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
QUESTION = "where was she born?"
ANSWER = " in Warsaw</s>"
SIZE = 24  # width of the retrieval vectors


@pytest.fixture(scope="module")
def tokenizer(zoo):
    found = copy.deepcopy(zoo.tokenizer())
    found.add_tokens([AddedToken("<xRAG>", special=False)])
    return found


@pytest.fixture(scope="module")
def model(zoo, tokenizer):
    return zoo.model("mistral", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def projector():
    g = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (32, SIZE), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    return {f"projector.projector.{n}": 0.3 * torch.randn(s, generator=g) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def state(model, projector):
    return {**{k: v.clone() for k, v in model.state_dict().items()}, **projector}


@pytest.fixture(scope="module")
def settings(model):
    settings = {**model.config.to_dict(), "architectures": ["XMistralForCausalLM"]}
    return {**settings, "projector_type": "mlp2x_gelu", "retriever_hidden_size": SIZE}


def write(folder: Path, state, settings, tokenizer, kind="safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer.save_pretrained(folder)
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = sorted(state)
        shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
        for file, held in shards.items():
            save_file({n: state[n] for n in held}, folder / file)
        index = {"metadata": {}, "weight_map": {n: file for file, held in shards.items() for n in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def slots_by_hand(projector, vectors):
    p = {n.removeprefix("projector.projector."): t for n, t in projector.items()}
    return linear(gelu(linear(vectors, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])


def logits_by_hand(model, tokenizer, slots):
    """The evaluation prompt, tokenised as one, the slots written over the embeddings at the placeholders."""
    places = " ".join(["<xRAG>"] * len(slots))
    text = (
        "[INST] Refer to the background document and answer the questions:\n\n"
        f"Background: {places}\n\nQuestion: {QUESTION} [/INST] The answer is:"
    )
    prompt = tokenizer(text)["input_ids"]
    target = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + target])
    embeds = model.get_input_embeddings()(ids).detach().clone()
    embeds[ids == tokenizer.convert_tokens_to_ids("<xRAG>")] = slots
    with torch.no_grad():
        return model(inputs_embeds=embeds).logits[0, len(prompt) - 1 : -1], target


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_the_whole_model_computes_what_the_equations_give(tmp_path, model, state, settings, tokenizer, projector, kind):
    folder = write(tmp_path / "xrag", state, settings, tokenizer, kind)
    assert recognise(folder) == "xrag"
    compressor = import_checkpoint("xrag", folder)
    vectors = torch.randn(2, SIZE)
    passages = compressor.compress([PASSAGE], vectors=[vectors])
    want = slots_by_hand(projector, vectors)
    assert torch.allclose(passages[0].embeds, want, atol=1e-5)
    logits, target = logits_by_hand(model, tokenizer, want)
    prompt = xrag_prompt(compressor.reader, passages, QUESTION)
    (found,) = compressor.reader.target_logits([prompt], [target])
    assert found.shape == (len(target), len(tokenizer))
    assert torch.allclose(found, logits, atol=1e-4)


def test_what_is_written_loads_by_itself_and_is_the_same(tmp_path, state, settings, tokenizer):
    folder = write(tmp_path / "published", state, settings, tokenizer)
    ignored = import_to("xrag", folder, tmp_path / "out")
    assert ignored == {}
    assert (tmp_path / "out" / "reader" / "config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "published"]  # nothing half written is left
    written = load_compressor(tmp_path / "out")
    memory = load_compressor(folder)  # recognised, and imported in memory
    vectors = [torch.randn(SIZE)]
    a, b = (c.compress([PASSAGE], vectors=vectors)[0] for c in (written, memory))
    assert torch.equal(a.embeds, b.embeds)
    assert written.reader.fingerprint == memory.reader.fingerprint
    assert written.fingerprint == memory.fingerprint
    prompts = [xrag_prompt(c.reader, [p], QUESTION) for c, p in ((written, a), (memory, b))]
    assert written.reader.generate([prompts[0]], 8) == memory.reader.generate([prompts[1]], 8)
    with pytest.raises(ValueError, match="exists already"):
        import_to("xrag", folder, tmp_path / "out")


@pytest.mark.parametrize("added_rows", [True, False])
def test_the_projector_alone_on_its_reader(zoo, tmp_path, model, state, tokenizer, projector, added_rows):
    base = zoo.model("mistral")  # of fewer or more rows than the tokenizer has names for
    rows = {n: state[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    with torch.no_grad():
        n = len(tokenizer) - 1
        base.resize_token_embeddings(n, mean_resizing=False)
        base.load_state_dict({**{k: state[k] for k in base.state_dict()}, **{k: v[:n] for k, v in rows.items()}})
    reader = Reader.from_pretrained(base, tokenizer=tokenizer)
    file = tmp_path / "ckpt.pth"
    torch.save({**rows, **projector}, file)
    assert recognise(file) == recognise(tmp_path) == "xrag"
    with pytest.raises(MissingOption, match="reader"):
        import_checkpoint("xrag", file)
    compressor = import_checkpoint("xrag", file, reader, added_rows=added_rows)
    vector = torch.randn(1, SIZE)
    passages = compressor.compress([PASSAGE], vectors=[vector])
    logits, target = logits_by_hand(model, tokenizer, slots_by_hand(projector, vector))
    (found,) = compressor.reader.target_logits([xrag_prompt(compressor.reader, passages, QUESTION)], [target])
    assert found.shape[1] == n + added_rows
    assert torch.allclose(found[:, :n], logits[:, :n], atol=1e-4)
    assert (compressor.reader is reader) == (not added_rows)
    assert reader.vocab_size == n  # the reader given is as it was

    rows["lm_head.weight"] = rows["lm_head.weight"] + 1
    torch.save({**rows, **projector}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        import_checkpoint("xrag", file, reader)


def test_the_projector_alone_brings_the_tokens_that_the_authors_add(zoo, tmp_path, model, state, tokenizer, projector):
    base = zoo.model("mistral")
    with torch.no_grad():
        base.resize_token_embeddings(len(tokenizer) - 1, mean_resizing=False)
        base.load_state_dict({k: state[k][: len(v)] for k, v in base.state_dict().items()})
    plain = zoo.tokenizer()
    reader = Reader.from_pretrained(base, tokenizer=plain)
    file = tmp_path / "ckpt.pth"
    torch.save({**{n: state[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}, **projector}, file)
    compressor = import_checkpoint("xrag", file, reader)
    vectors = torch.randn(2, SIZE)
    passages = compressor.compress([PASSAGE], vectors=[vectors])
    logits, target = logits_by_hand(model, tokenizer, slots_by_hand(projector, vectors))
    (found,) = compressor.reader.target_logits([xrag_prompt(compressor.reader, passages, QUESTION)], [target])
    assert torch.allclose(found, logits, atol=1e-4)
    assert "<xRAG>" not in plain.get_vocab()  # the tokenizer given is as it was
    bare = import_checkpoint("xrag", file, reader, added_rows=False)
    assert bare.reader is reader


def test_a_mixtral_is_read_too(zoo, tmp_path, tokenizer, projector):
    model = zoo.model("mixtral", vocab_size=len(tokenizer))
    folder = tmp_path / "moe"
    model.save_pretrained(folder)
    state = {**load_file(folder / "model.safetensors"), **projector}
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in state  # the layout of the release
    save_file(state, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "projector_type": "mlp2x_gelu",
        "retriever_hidden_size": SIZE,
        "architectures": ["XMixtralForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    compressor = import_checkpoint("xrag", folder)
    vectors = torch.randn(1, SIZE)
    passages = compressor.compress([PASSAGE], vectors=[vectors])
    logits, target = logits_by_hand(model, tokenizer, slots_by_hand(projector, vectors))
    (found,) = compressor.reader.target_logits([xrag_prompt(compressor.reader, passages, QUESTION)], [target])
    assert torch.allclose(found, logits, atol=1e-4)


def test_the_other_prompts_are_spelled_out_and_bad_ones_refused(tmp_path, state, settings, tokenizer):
    compressor = import_checkpoint("xrag", write(tmp_path / "x", state, settings, tokenizer))
    reader = compressor.reader
    passages = compressor.compress([PASSAGE, PASSAGE], vectors=[torch.randn(SIZE), torch.randn(2, SIZE)])
    places = "<xRAG> <xRAG> <xRAG>"
    own = "[INST] Refer to the background document: {background}\n\n{question} [/INST]"
    plan = reader.plan([xrag_prompt(reader, passages, QUESTION, own)])[0]
    spelled = tokenizer(own.format(background=places, question=QUESTION))["input_ids"]
    assert plan.ids == [0 if i == tokenizer.convert_tokens_to_ids("<xRAG>") else i for i in spelled]
    for template in ("Background: {background}", "{question} {background}", "{background} {background} {question}"):
        with pytest.raises(ValueError, match="template must hold"):
            xrag_prompt(reader, passages, QUESTION, template)
    text = CompressedPassage("text", 3, "t", None, text="abc", spans=((0, 3),), n_tokens=1)
    with pytest.raises(ValueError, match="are 'embeds', got 'text'"):
        xrag_prompt(reader, [text], QUESTION)


@pytest.mark.slow
def test_the_retriever_gives_its_bare_last_hidden_state(zoo, tmp_path, state, settings, tokenizer, projector):
    body = AutoModel.from_config(zoo.model("mistral").config)
    retriever = tmp_path / "retriever"
    small = type(body.config)(
        **{**body.config.to_dict(), "hidden_size": SIZE, "head_dim": 6, "vocab_size": len(tokenizer)}
    )
    body = AutoModel.from_config(small).eval()
    body.save_pretrained(retriever)
    tokenizer.save_pretrained(retriever)
    folder = write(tmp_path / "xrag", state, settings, tokenizer)
    compressor = import_checkpoint("xrag", folder, embedder=str(retriever))
    short = "A treaty was signed."
    for text, passage in zip((PASSAGE, short), compressor.compress([PASSAGE, short])):
        with torch.no_grad():
            vector = body(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1:]
        assert torch.allclose(passage.embeds, slots_by_hand(projector, vector), atol=1e-4)
    # kept through writing and loading, and held against the embedder's fingerprint
    import_to("xrag", folder, tmp_path / "out", embedder=str(retriever))
    again = load_compressor(tmp_path / "out").compress([PASSAGE])[0]
    assert torch.equal(again.embeds, compressor.compress([PASSAGE])[0].embeds)
    other = tmp_path / "other"  # of another width
    AutoModel.from_config(zoo.model("mistral").config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(CheckpointError, match="of width 24, but"):
        import_checkpoint("xrag", folder, embedder=str(other))


def test_a_question_cannot_forge_a_place(tmp_path, state, settings, tokenizer):
    compressor = import_checkpoint("xrag", write(tmp_path / "x", state, settings, tokenizer))
    passages = compressor.compress([PASSAGE], vectors=[torch.randn(SIZE)])
    with pytest.raises(ValueError, match="must not hold"):
        xrag_prompt(compressor.reader, passages, "what is <xRAG> ?")


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


DAMAGE = {
    "missing projector": lambda s: without(s, "projector.projector.2.bias"),
    "missing weight": lambda s: without(s, "model.layers.1.mlp.up_proj.weight"),
    "unknown key": lambda s: {**s, "retriever.layer.weight": torch.zeros(2)},
    "unknown projector key": lambda s: {**s, "projector.projector.4.weight": torch.zeros(32, 32)},
    "unknown model key": lambda s: {**s, "model.layers.7.mlp.up_proj.weight": torch.zeros(64, 32)},
    "projector shape": lambda s: {**s, "projector.projector.0.weight": torch.zeros(32, SIZE + 1)},
    "weight shape": lambda s: {**s, "lm_head.weight": torch.zeros(7, 32)},
    "not finite": lambda s: {**s, "model.norm.weight": torch.full((32,), torch.nan)},
}
NAMED = {
    "missing projector": r"lacks 2\.bias",
    "missing weight": r"missing model\.layers\.1\.mlp\.up_proj",
    "unknown key": r"retriever\.layer\.weight",
    "unknown projector key": r"4\.weight",
    "unknown model key": r"unknown model\.layers\.7",
    "projector shape": r"0\.weight is \(32, 25\), wanted \(32, 24\)",
    "weight shape": r"lm_head\.weight is \(7, 32\)",
    "not finite": r"model\.norm\.weight holds NaN",
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_damage_is_refused_by_name(tmp_path, state, settings, tokenizer, damage):
    folder = write(tmp_path / "x", DAMAGE[damage](state), settings, tokenizer, "bin")
    with pytest.raises(CheckpointError, match=NAMED[damage]):
        import_to("xrag", folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_missing_shard_and_a_shard_that_differs_from_its_index_are_refused(tmp_path, state, settings, tokenizer):
    folder = write(tmp_path / "x", state, settings, tokenizer, "sharded")
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match="00002-of-00003"):
        import_checkpoint("xrag", folder)
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_checkpoint("xrag", folder)
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match="differ in"):
        import_checkpoint("xrag", folder)


def test_rotary_frequencies_are_left_out_for_a_reason(tmp_path, state, settings, tokenizer):
    old = {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ignored = import_to("xrag", write(tmp_path / "x", old, settings, tokenizer), tmp_path / "out")
    assert list(ignored) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "follow from the config" in next(iter(ignored.values()))


def test_bad_names_and_options_are_refused(tmp_path, state, settings, tokenizer):
    folder = write(tmp_path / "x", state, settings, tokenizer)
    with pytest.raises(ValueError, match="there are xrag"):
        import_checkpoint("nothing", folder)
    with pytest.raises(ValueError, match="takes no rate"):
        import_checkpoint("xrag", folder, rate=4)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model type .None."):
        import_checkpoint("xrag", folder)
