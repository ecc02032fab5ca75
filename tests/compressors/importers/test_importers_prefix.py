"""Gist, AutoCompressor and 500xCompressor checkpoints against a computation by hand on the base models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import legacy
import pytest
import torch
from nutgraf import Reader, load_compressor
from nutgraf.compressors import CheckpointError
from nutgraf.compressors.importers import MissingOption, import_checkpoint, import_to, recognise
from nutgraf.compressors.importers.prompts import fivehundred_prompt, gist_prompt, gist_source, slots_first
from nutgraf.compressors.reader.loading import save_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import DynamicCache, PreTrainedTokenizerFast

PASSAGE = (
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911). "
    "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."
)
SHORT = "Rivers carry sediment."
SPAN = 5  # summary vectors, memory tokens


def write(folder: Path, model, state, tokenizer=None, **extra) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), **extra}))
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    return folder


def state_of(model):
    """Its weights, the tied head left out as transformers saves it."""
    tied = model.config.get_text_config().tie_word_embeddings
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


# -- AutoCompressor ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def auto(zoo):
    model = zoo.model("llama")
    summary = torch.randn(SPAN, 32, generator=torch.Generator().manual_seed(1))
    return model, summary


def auto_write(folder, model, summary, tokenizer, **extra):
    settings = {"summary_length": SPAN, "accumulate_summary": True, "segment_gradient_checkpointing": False, **extra}
    return write(folder, model, {**state_of(model), "embed_summary.weight": summary}, tokenizer, **settings)


@torch.no_grad()
def auto_pass(model, soft, ids, summary):
    """Last hidden states of [soft prompt][tokens][summary tokens]."""
    embeds = torch.cat([soft, model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long)), summary])[None]
    return model.model(inputs_embeds=embeds).last_hidden_state[0]


@pytest.mark.slow
@pytest.mark.parametrize("equal", [False, True])
def test_autocompressor_computes_what_the_equations_give(zoo, tmp_path, auto, equal):
    model, summary = auto
    folder = auto_write(tmp_path / "auto", model, summary, zoo.tokenizer())
    assert recognise(folder) == "autocompressor"
    cut = {"equal_segments": True} if equal else {}
    compressor = import_checkpoint("autocompressor", folder, segment_tokens=30, **cut)
    ids = zoo.tokenizer()(PASSAGE, add_special_tokens=False)["input_ids"]
    n = -(-len(ids) // 30)
    length = -(-len(ids) // n) if equal else 30
    assert n > 1
    assert -(-len(ids) // n) < 30  # so that the two cuts differ
    soft = torch.zeros(0, 32)
    for start in range(0, len(ids), length):
        soft = torch.cat([soft, auto_pass(model, soft, ids[start : start + length], summary)[-SPAN:]])
    (passage,) = compressor.compress([PASSAGE])
    assert torch.allclose(passage.embeds, soft, atol=1e-4)
    asked = zoo.tokenizer()("where?", add_special_tokens=False)["input_ids"]
    target = zoo.tokenizer()(" in Warsaw", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        hidden = auto_pass(model, soft, asked + target, soft[:0])
        hand = model.lm_head(hidden)[-len(target) - 1 : -1]
    prompt = slots_first(compressor.reader, [passage], "where?")
    (found,) = compressor.reader.target_logits([prompt], [target])
    assert torch.allclose(found, hand, atol=1e-4)
    # beside a prompt of another length, and token by token
    alone = found
    (_, found) = compressor.reader.target_logits([[SHORT * 9], prompt], [target, target])
    assert torch.allclose(found, alone, atol=1e-4)
    greedy = []
    for _ in range(4):
        with torch.no_grad():
            greedy.append(int(model.lm_head(auto_pass(model, soft, asked + greedy, soft[:0]))[-1].argmax()))
    answer = compressor.reader.generate([prompt], 4, generation_config=None, eos_token_id=[])[0]
    assert answer == zoo.tokenizer().decode(greedy, skip_special_tokens=True)


def test_autocompressor_takes_the_segments_of_its_caller(zoo, tmp_path, auto):
    model, summary = auto
    compressor = import_checkpoint("autocompressor", auto_write(tmp_path / "auto", model, summary, zoo.tokenizer()))
    ids = torch.randint(7, 500, (31,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [4, 20, 7]
    soft, start = torch.zeros(0, 32), 0
    for length in lengths:
        soft = torch.cat([soft, auto_pass(model, soft, ids[start : start + length], summary)[-SPAN:]])
        start += length
    one, other = compressor.encode_lengths(ids, lengths), compressor.encode_ids([ids])[0]
    assert torch.allclose(one.embeds, soft, atol=1e-4)
    assert torch.allclose(other.embeds, auto_pass(model, soft[:0], ids, summary)[-SPAN:], atol=1e-4)
    for bad in ([4, 20], [31, 0], [4.0, 27]):
        with pytest.raises(ValueError, match="add up to the passage's 31 tokens"):
            compressor.encode_lengths(ids, bad)


@pytest.fixture(scope="module")
def spaced(zoo):
    """A tokenizer that puts a space in front of a text, as SentencePiece does for Llama, and knows <GIST>."""
    backend = Tokenizer(models.BPE(unk_token=zoo.SPECIALS[0]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=zoo.SPECIALS,
        initial_alphabet=sorted({*(PASSAGE + SHORT + "Instruction: Input: Output:\n?").replace(" ", "")}),
        show_progress=False,
    )
    backend.train_from_iterator([PASSAGE], trainer)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    found.add_tokens(["<GIST>"], special_tokens=True)
    return found


def test_autocompressor_spells_text_as_its_authors_do(zoo, tmp_path, spaced):
    model = zoo.model("llama", vocab_size=len(spaced))
    summary = torch.randn(SPAN, 32, generator=torch.Generator().manual_seed(1))
    compressor = import_checkpoint("autocompressor", auto_write(tmp_path / "auto", model, summary, spaced))
    ids, asked = (spaced(text, add_special_tokens=False)["input_ids"] for text in (SHORT, "where?"))
    assert ids != compressor.reader.tokenize(SHORT)  # as it is spelled inside a prompt
    soft = auto_pass(model, torch.zeros(0, 32), ids, summary)[-SPAN:]
    (passage,) = compressor.compress([SHORT])
    assert torch.allclose(passage.embeds, soft, atol=1e-4)
    (found,) = compressor.reader.target_logits([slots_first(compressor.reader, [passage], "where?")], [[9]])
    with torch.no_grad():
        hand = model.lm_head(auto_pass(model, soft, asked, soft[:0]))[-1:]
    assert torch.allclose(found, hand, atol=1e-4)


def test_autocompressor_is_written_with_its_reader(zoo, tmp_path, auto):
    folder = auto_write(tmp_path / "auto", *auto, zoo.tokenizer())
    import_to("autocompressor", folder, tmp_path / "out")
    loaded, memory = load_compressor(tmp_path / "out"), load_compressor(folder)
    a, b = loaded.compress([PASSAGE])[0], memory.compress([PASSAGE])[0]
    assert torch.equal(a.embeds, b.embeds)
    assert loaded.reader.fingerprint == memory.reader.fingerprint
    for changes, named in (
        ({"summary_length": SPAN + 1}, r"embed_summary\.weight is \(5, 32\), wanted \(6"),
        ({"model_type": "opt"}, "only AutoCompressors on Llama"),
    ):
        bad = auto_write(tmp_path / f"bad{len(named)}", *auto, zoo.tokenizer(), **changes)
        with pytest.raises(CheckpointError, match=named):
            import_checkpoint("autocompressor", bad)


# -- gist tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gist(zoo):
    tokenizer = copy.deepcopy(zoo.tokenizer())
    tokenizer.add_tokens(["<GIST>"], special_tokens=True)
    return zoo.model("llama", vocab_size=len(tokenizer)), tokenizer


@torch.no_grad()
def gist_logits(model, tokenizer, text, target):
    """One pass under the gist mask: what follows the gists sees from the first gist on."""
    prompt = tokenizer(text)["input_ids"] if isinstance(text, str) else text
    ids = torch.tensor([prompt + target])
    gists = (ids[0] == tokenizer.convert_tokens_to_ids("<GIST>")).nonzero()[:, 0]
    time = ids.shape[1]
    allowed = torch.ones(time, time).tril().bool()
    allowed[int(gists[-1]) + 1 :, : int(gists[0])] = False
    mask = torch.zeros(1, 1, time, time).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = torch.arange(time)[None]
    return model(ids, attention_mask=mask, position_ids=positions).logits[0, len(prompt) - 1 : -1]


@pytest.mark.slow
@pytest.mark.parametrize("diff", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_gist_tokens_compute_what_one_masked_pass_gives(zoo, tmp_path, gist, n, diff):
    model, tokenizer = gist
    state, given = state_of(model), None
    if diff:
        base = zoo.model("llama", seed=4, vocab_size=len(tokenizer) - 1)
        given = Reader.from_pretrained(base, tokenizer=zoo.tokenizer())
        rows = {
            k: torch.cat([v, torch.zeros(1, 32)])
            for k, v in base.state_dict().items()
            if v.shape[0] == len(tokenizer) - 1
        }
        state = {k: v - {**base.state_dict(), **rows}[k] for k, v in state.items()}
    folder = write(tmp_path / "gist", model, state, tokenizer)
    assert recognise(folder) == "gist"
    if diff:
        with pytest.raises(MissingOption, match="differences to a base model"):
            import_checkpoint("gist", folder, given, n_gist=n)
    compressor = import_checkpoint("gist", folder, given, n_gist=n, **({"diff": True} if diff else {}))
    (passage,) = compressor.compress([gist_source(SHORT)])
    assert passage.slots == n
    target = tokenizer(" the sea", add_special_tokens=False)["input_ids"]
    hand = gist_logits(model, tokenizer, f"Instruction: {SHORT}\n{'<GIST>' * n}\nInput: {PASSAGE}\nOutput:", target)
    (found,) = compressor.reader.target_logits([gist_prompt(passage, PASSAGE)], [target])
    assert torch.allclose(found, hand, atol=1e-4)
    import_to("gist", folder, tmp_path / "out", given, n_gist=n, **({"diff": True} if diff else {}))
    loaded = load_compressor(tmp_path / "out")
    again = loaded.compress([gist_source(SHORT)])[0]
    assert all(torch.equal(a, b) for a, b in zip(again.keys, passage.keys))
    assert again.reader == passage.reader


@pytest.mark.parametrize("given", ["", PASSAGE])
def test_gist_tokens_can_be_read_without_the_white_space_around_them(zoo, tmp_path, spaced, given):
    model = zoo.model("llama", vocab_size=len(spaced))
    compressor = import_checkpoint("gist", write(tmp_path / "gist", model, state_of(model), spaced), n_gist=2)
    # the slow tokenizer's spelling: <GIST> cuts the text, its neighbours lose white space, each part is spelled on its own
    rest = f"Input: {given}\nOutput:" if given else "Output:"
    gists = [spaced.convert_tokens_to_ids("<GIST>")] * 2
    ids = [*spaced(f"Instruction: {SHORT}")["input_ids"], *gists, *spaced(rest, add_special_tokens=False)["input_ids"]]
    assert ids != spaced(f"Instruction: {SHORT}\n<GIST><GIST>\n{rest}")["input_ids"]
    (passage,) = compressor.compress([gist_source(SHORT, stripped=True)])
    prompt = gist_prompt(passage, given, stripped=True, reader=compressor.reader)
    (found,) = compressor.reader.target_logits([prompt], [[9, 8]])
    assert torch.allclose(found, gist_logits(model, spaced, ids, [9, 8]), atol=1e-4)
    with pytest.raises(ValueError, match=r"pass reader=compressor\.reader"):
        gist_prompt(passage, given, stripped=True)


@pytest.mark.parametrize("kind", legacy.RELEASED)
def test_gist_tokens_between_parts_that_a_legacy_tokenizer_spells(zoo, tmp_path, kind):
    tokenizer = copy.deepcopy(legacy.tokenizer(kind))
    tokenizer.add_tokens(["<GIST>"], special_tokens=True)
    model = zoo.model("llama", vocab_size=len(tokenizer))
    compressor = import_checkpoint("gist", write(tmp_path / "gist", model, state_of(model), tokenizer), n_gist=2)
    rest = f"Input: {PASSAGE}\nOutput:"
    text = f"Instruction: {SHORT}<GIST><GIST>{rest}"  # the slow tokenizer strips the white space around <GIST>
    ids = [*compressor.reader.bos_ids, *legacy.spelled(kind, text, tokenizer=tokenizer)]
    (passage,) = compressor.compress([gist_source(SHORT, stripped=True)])
    prompt = gist_prompt(passage, PASSAGE, stripped=True, reader=compressor.reader)
    (found,) = compressor.reader.target_logits([prompt], [[9, 8]])
    assert torch.allclose(found, gist_logits(model, tokenizer, ids, [9, 8]), atol=1e-4)


def test_gist_checkpoints_that_lack_something_are_refused(zoo, tmp_path, gist):
    model, tokenizer = gist
    folder = write(tmp_path / "gist", model, state_of(model), tokenizer)
    with pytest.raises(MissingOption, match="n_gist"):
        import_checkpoint("gist", folder)
    with pytest.raises(MissingOption, match="reader"):
        import_checkpoint("gist", folder, n_gist=1, diff=True)
    other = Reader.from_pretrained(zoo.model("llama", num_hidden_layers=2), tokenizer=zoo.tokenizer())
    with pytest.raises(CheckpointError, match=r"differ in the keys model\.layers\.2"):
        import_checkpoint("gist", folder, other, n_gist=1, diff=True)
    bad = write(tmp_path / "bad", model, {**state_of(model), "left": torch.zeros(1)}, tokenizer)
    with pytest.raises(CheckpointError, match="unknown left"):
        import_checkpoint("gist", bad, n_gist=1)
    plain = write(tmp_path / "plain", model, state_of(model), zoo.tokenizer())
    assert recognise(plain) is None
    with pytest.raises(CheckpointError, match="the id None"):
        import_checkpoint("gist", plain, n_gist=1)


# -- 500xCompressor ------------------------------------------------------------------------------------------------

RANK = 4


@pytest.fixture(scope="module")
def five(zoo):
    base = zoo.model("llama")
    g = torch.Generator().manual_seed(1)
    matrices = {}
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            matrices[f"{name}.lora_A"] = 0.3 * torch.randn(RANK, module.in_features, generator=g)
            matrices[f"{name}.lora_B"] = 0.3 * torch.randn(module.out_features, RANK, generator=g)
    memory = torch.randn(1, SPAN, 32, generator=g)
    state = {f"llama.base_model.model.{n}.default.weight": t for n, t in matrices.items()}
    return base, matrices, memory, {**state, "memory_embeddings": memory}


@pytest.mark.parametrize(("pad_to", "kind"), [(None, None), (60, None), *((None, kind) for kind in legacy.RELEASED)])
def test_500x_computes_what_the_authors_positions_give(zoo, tmp_path, five, pad_to, kind):
    base, matrices, memory, state = five
    torch.save(state, tmp_path / "500x.pt")
    assert recognise(tmp_path) == "500x"
    reader = Reader(zoo.model("llama"), legacy.tokenizer(kind) if kind else zoo.tokenizer())
    compressor = import_checkpoint("500x", tmp_path, reader, pad_to=pad_to)
    encoder = copy.deepcopy(base)
    ids = legacy.spelled(kind, SHORT, tokenizer=reader.tokenizer)
    ids += [2] * ((pad_to or len(ids)) - len(ids))
    target = legacy.spelled(kind, "to the sea", tokenizer=reader.tokenizer)
    asked = legacy.spelled(kind, "Question: where? Answer: ", tokenizer=reader.tokenizer)
    with torch.no_grad():
        for name, module in encoder.named_modules():
            if f"{name}.lora_A" in matrices:
                module.weight += 32 / RANK * matrices[f"{name}.lora_B"] @ matrices[f"{name}.lora_A"]
        embeds = torch.cat([base.get_input_embeddings()(torch.tensor(ids)), memory[0]])[None]
        cache = DynamicCache()
        encoder.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        kept = [(layer.keys[:, :, -SPAN:], layer.values[:, :, -SPAN:]) for layer in cache.layers]
        (passage,) = compressor.compress([SHORT])
        for layer, (keys, values) in enumerate(kept):
            assert torch.allclose(passage.keys[layer], keys[0], atol=1e-4)
            assert torch.allclose(passage.values[layer], values[0], atol=1e-4)
        for question, head in (("where?", asked), (None, [1])):
            # keys as they were computed, at len(ids)...; the decoder goes on at SPAN
            new = torch.tensor([head + target])
            positions = torch.arange(SPAN, SPAN + new.shape[1])[None]
            hand = base(new, past_key_values=DynamicCache(kept), position_ids=positions).logits[0, len(head) - 1 : -1]
            (found,) = reader.target_logits([fivehundred_prompt(reader, passage, question)], [target])
            assert torch.allclose(found, hand, atol=1e-4)


@pytest.mark.slow
def test_500x_accounts_for_every_key(zoo, tmp_path, five):
    _, _, _, state = five
    reader = zoo.reader("llama")
    file = tmp_path / "500x.pt"
    torch.save(state, file)
    ignored = import_to("500x", file, tmp_path / "out", reader)
    assert set(ignored) == {f"layers.2.self_attn.q_proj.lora_{side}" for side in "AB"}
    again = load_compressor(tmp_path / "out", reader).compress([SHORT])[0]
    assert all(torch.equal(a, b) for a, b in zip(again.keys, load_compressor(file, reader).compress([SHORT])[0].keys))
    one = "llama.base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight"
    for change, named in (
        ({k: v for k, v in state.items() if k != one}, r"missing layers\.0\.self_attn\.v_proj\.lora_B"),
        ({**state, "extra": torch.zeros(1)}, "extra"),
        ({**state, "memory_embeddings": torch.zeros(1, SPAN, 31)}, r"\(1, 5, 31\), wanted"),
        ({**state, one: torch.zeros(3, RANK)}, r"v_proj\.lora_B is \(3, 4\)"),
    ):
        torch.save(change, file)
        with pytest.raises(CheckpointError, match=named):
            import_checkpoint("500x", file, reader)
    with pytest.raises(MissingOption, match="reader"):
        import_checkpoint("500x", file)
