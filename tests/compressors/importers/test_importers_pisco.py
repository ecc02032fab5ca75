"""PISCO (2026), PISCO v1 and COCOM checkpoints against a computation by hand on the base models."""

from __future__ import annotations

import copy
import json

import legacy
import pytest
import torch
from nutgraf import Reader, load_compressor
from nutgraf.compressors import CheckpointError
from nutgraf.compressors.importers import MissingOption, import_checkpoint, import_to, recognise
from nutgraf.compressors.importers.pisco import PublishedPISCO, PublishedPISCOConfig
from nutgraf.compressors.importers.prompts import PISCO_SYSTEM, pisco_prompt
from nutgraf.compressors.reader.loading import save_tokenizer
from safetensors.torch import save_file
from torch.nn.functional import linear, relu

PASSAGES = [
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
    "Rivers carry sediment to the sea.",
]
QUESTION = "where was she born?"
RANK, RATE = 4, 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora(model, seed) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in LINEARS:
            out[f"{name}.lora_A"] = 0.2 * torch.randn(RANK, module.in_features, generator=g)
            out[f"{name}.lora_B"] = 0.2 * torch.randn(module.out_features, RANK, generator=g)
    return out


def tuned(model, matrices, scale=2.0):
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in merged.named_modules():
            if f"{name}.lora_A" in matrices:
                module.weight += scale * matrices[f"{name}.lora_B"] @ matrices[f"{name}.lora_A"]
    return merged


def with_rows(model, embed, head):
    changed = copy.deepcopy(model)
    changed.get_input_embeddings().weight = torch.nn.Parameter(embed)
    changed.get_output_embeddings().weight = torch.nn.Parameter(head)
    return changed


def spelled(tokenizer, *names):
    found = copy.deepcopy(tokenizer)
    found.add_tokens(list(names), special_tokens=True)
    return found


@torch.no_grad()
def logits_by_hand(model, tokenizer, text, marks, slots, target):
    """The rendered chat text, its placeholders replaced in order by the slots."""
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + target])
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[torch.isin(ids, torch.tensor([tokenizer.convert_tokens_to_ids(m) for m in marks]))] = slots
    return model(inputs_embeds=embeds).logits[0, len(prompt) - 1 : -1]


def chat(tokenizer, content):
    messages = [{"role": "system", "content": PISCO_SYSTEM}, {"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# -- 2026 ----------------------------------------------------------------------------------------------------------


class New:
    """The layout of 2026: compressor/, connector.pt, decoder_state.pt, two tokenizers."""

    def __init__(self, zoo):
        self.base = zoo.model("llama")  # more embeddings than the tokenizer has names for: the table shrinks
        self.decoder_tokenizer = spelled(zoo.tokenizer(), "<MEM>", "<AE>")
        self.compressor_tokenizer = spelled(zoo.tokenizer(), "<MEM>")
        rows = len(self.decoder_tokenizer)
        self.embed, self.head = torch.randn(rows, 32), torch.randn(rows, 32)
        self.lora = lora(self.base, 1)
        self.compressor = zoo.model("qwen3", seed=3, hidden_size=24, vocab_size=len(self.compressor_tokenizer))
        self.connector = {
            "0.weight": 0.3 * torch.randn(20, 24),
            "0.bias": 0.3 * torch.randn(20),
            "2.weight": 0.3 * torch.randn(32, 20),
            "2.bias": 0.3 * torch.randn(32),
        }
        self.state = {f"{n}.default.weight": t for n, t in self.lora.items()}
        for name, new, old in (
            ("model.embed_tokens", self.embed, self.base.model.embed_tokens.weight),
            ("lm_head", self.head, self.base.lm_head.weight),
        ):
            self.state[f"{name}.modules_to_save.default.weight"] = new
            self.state[f"{name}.original_module.weight"] = old.detach()[:rows].clone()
        self.settings = {"model_type": "PISCO", "compr_rate": RATE, "decoder_model_name": "some/base"}

    def write(self, folder, state=None, connector=None, settings=None):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.settings if settings is None else settings))
        torch.save(self.state if state is None else state, folder / "decoder_state.pt")
        torch.save(self.connector if connector is None else connector, folder / "connector.pt")
        self.compressor.save_pretrained(folder / "compressor")
        self.compressor_tokenizer.save_pretrained(folder / "compressor_tokenizer")
        self.decoder_tokenizer.save_pretrained(folder / "decoder_tokenizer")
        return folder

    @torch.no_grad()
    def slots(self, ids):
        """Chunks of at most 128 tokens, BOS counted; n // rate + 1 slots each."""
        out = []
        embed = self.compressor.get_input_embeddings()
        mem = self.compressor_tokenizer.convert_tokens_to_ids("<MEM>")
        for start in range(0, len(ids), 128):
            chunk = ids[start : start + 128]
            n = len(chunk) // RATE + 1
            hidden = self.compressor.model(inputs_embeds=embed(torch.tensor([[*chunk, *[mem] * n]]))).last_hidden_state
            c = self.connector
            inner = relu(linear(hidden[0, -n:], c["0.weight"], c["0.bias"]))
            out.append(linear(inner, c["2.weight"], c["2.bias"]))
        return torch.cat(out)


@pytest.fixture(scope="module")
def new(zoo):
    torch.manual_seed(0)
    return New(zoo)


@pytest.fixture(scope="module")
def reader(zoo, new) -> Reader:
    return Reader.from_pretrained(copy.deepcopy(new.base), tokenizer=zoo.tokenizer())


@pytest.mark.slow
def test_2026_computes_what_the_equations_give(zoo, tmp_path, new, reader):
    folder = new.write(tmp_path / "pisco")
    assert recognise(folder) == "pisco"
    pisco = import_checkpoint("pisco", folder, reader)
    passages = pisco.compress([*PASSAGES, PASSAGES[0] * 6])
    wanted = [new.slots(zoo.tokenizer()(text)["input_ids"]) for text in (*PASSAGES, PASSAGES[0] * 6)]
    for passage, want in zip(passages, wanted):
        assert torch.allclose(passage.embeds, want, atol=1e-4)
    model = with_rows(tuned(new.base, new.lora), new.embed, new.head)
    documents = "".join(f"Document {j}:" + "<MEM>" * len(want) for j, want in enumerate(wanted[:2]))
    text = chat(new.decoder_tokenizer, f"\n\nBackground:{documents}\n Question: {QUESTION}")
    target = new.decoder_tokenizer("in Warsaw", add_special_tokens=False)["input_ids"]
    hand = logits_by_hand(model, new.decoder_tokenizer, text, ["<MEM>"], torch.cat(wanted[:2]), target)
    (found,) = pisco.reader.target_logits([pisco_prompt(pisco.reader, passages[:2], QUESTION)], [target])
    assert found.shape == hand.shape
    assert torch.allclose(found, hand, atol=1e-4)


def test_2026_is_written_with_its_reader_and_encoder(tmp_path, new, reader):
    folder = new.write(tmp_path / "pisco")
    weights = {n: t.clone() for n, t in reader.model.state_dict().items()}
    ignored = import_to("pisco", folder, tmp_path / "out", reader)
    assert set(ignored.values()) >= {"the embedding rows as they were before training"}
    loaded, memory = load_compressor(tmp_path / "out"), import_checkpoint("pisco", folder, reader)
    a, b = (c.compress(PASSAGES) for c in (loaded, memory))
    assert all(torch.equal(x.embeds, y.embeds) for x, y in zip(a, b))
    assert loaded.reader.fingerprint == memory.reader.fingerprint
    assert all(torch.equal(t, weights[n]) for n, t in reader.model.state_dict().items())


NEW_DAMAGE = {
    "connector": (dict(connector={"0.weight": torch.zeros(20, 24)}), r"lacks 0\.bias"),
    "connector shape": ("2.weight", torch.zeros(31, 20), r"2\.weight is \(31, 20\)"),
    "connector key": ("4.weight", torch.zeros(2), r"4\.weight"),
    "lora missing": (
        "model.layers.1.mlp.up_proj.lora_B.default.weight",
        None,
        r"lacks layers\.1\.mlp\.up_proj\.lora_B",
    ),
    "lora shape": ("model.layers.1.mlp.up_proj.lora_B.default.weight", torch.zeros(5, RANK), r"up_proj is \(5, 4\)"),
    "lora place": ("model.layers.8.mlp.up_proj.lora_B.default.weight", torch.zeros(64, RANK), r"layers\.8"),
    "unknown": ("adapter.thing", torch.zeros(2), r"adapter\.thing"),
    "rows": ("lm_head.modules_to_save.default.weight", torch.zeros(7, 32), "7 rows of the head"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", sorted(NEW_DAMAGE))
def test_2026_damage_is_refused_by_name(tmp_path, new, reader, damage):
    change = NEW_DAMAGE[damage]
    parts = {"connector": dict(new.connector), "state": dict(new.state)}
    if isinstance(change[0], dict):
        parts |= change[0]
    else:
        part = parts["connector" if damage.startswith("connector") else "state"]
        part[change[0]] = change[1]
        if change[1] is None:
            del part[change[0]]
    folder = new.write(tmp_path / "pisco", **parts)
    with pytest.raises(CheckpointError, match=change[-1]):
        import_to("pisco", folder, tmp_path / "out", reader)
    assert [p.name for p in tmp_path.iterdir()] == ["pisco"]


def test_2026_asks_for_what_it_lacks(tmp_path, new, reader):
    folder = new.write(tmp_path / "pisco", settings={})
    with pytest.raises(MissingOption, match="compr_rate"):
        import_checkpoint("pisco", folder, reader)
    with pytest.raises(MissingOption, match="base decoder"):
        import_checkpoint("pisco", folder)
    assert import_checkpoint("pisco", folder, reader, compr_rate=4).config.ratio == 4
    (folder / "compressor" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no model"):
        import_checkpoint("pisco", folder, reader, compr_rate=4)


# -- the first PISCO and COCOM -------------------------------------------------------------------------------------

LENGTH = 40  # doc_max_length
MEMS = [f"<MEM{i}>" for i in range(LENGTH // RATE)]


class Old:
    """adapters.pth and decoder_first_last_layers.pth, or (the first COCOM) the whole decoder with one adapter."""

    def __init__(self, zoo, several, first=False, kind=None, **changes):
        self.base, self.kind = zoo.model("llama", **changes), kind
        self.marks = MEMS if several else ["<MEM>"] * (1 if first else len(MEMS))
        self.tokenizer = spelled(
            legacy.tokenizer(kind) if kind else zoo.tokenizer(), *dict.fromkeys(self.marks), "<AE>", "<ENC>", "<SEP>"
        )
        rows = len(self.tokenizer)
        self.embed, self.head = torch.randn(rows, 32), torch.randn(rows, 32)
        self.encoder, self.decoder = lora(self.base, 1), lora(self.base, 2 if several else 1)
        self.several, self.first = several, first
        self.settings = {"model_type": "PISCO" if several else "COCOM", "compr_rate": RATE}
        self.settings |= {"different_mem_tokens": several, "compr_model_name": None, "sep": True}
        self.settings |= {} if first else {"doc_max_length": LENGTH}

    def write(self, folder, tokenizer=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.settings))
        if tokenizer:
            save_tokenizer(self.tokenizer, folder)
        if not self.first:
            # One adapter serves both where they were not trained apart.
            adapters = {"encoder_adapter": self.encoder} if self.several else {}
            adapters["decoder_adapter"] = self.decoder
            torch.save(
                {k: {f"{n}.weight": t for n, t in v.items()} for k, v in adapters.items()}, folder / "adapters.pth"
            )
            torch.save(
                {"embed_tokens.weight": self.embed, "lm_head.weight": self.head},
                folder / "decoder_first_last_layers.pth",
            )
        else:
            state = {f"decoder.base_model.model.{n}.default.weight": t for n, t in self.encoder.items()}
            for name, t in with_rows(self.base, self.embed, self.head).state_dict().items():
                module, leaf = name.rsplit(".", 1)
                tuned = module.rsplit(".", 1)[-1] in LINEARS
                state[f"decoder.base_model.model.{module}.{'base_layer.' if tuned else ''}{leaf}"] = t.clone()
            save_file(state, folder / "model.safetensors")
        return folder

    @torch.no_grad()
    def slots(self, text):
        model = tuned(with_rows(self.base, self.embed, self.head), self.encoder)
        ids = legacy.spelled(self.kind, "<ENC><s>" + text + "</s>", tokenizer=self.tokenizer)
        marks = self.marks * -(-(len(ids) - 3) // RATE) if self.first else self.marks
        ids += self.tokenizer.convert_tokens_to_ids(marks)
        return model.model(torch.tensor([ids])).last_hidden_state[0, -len(marks) :]


@pytest.fixture(scope="module", params=["pisco-v1", "one-mem", "first-cocom"])
def old(zoo, request):
    torch.manual_seed(0)
    return Old(zoo, request.param == "pisco-v1", request.param == "first-cocom")


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_older_layouts_compute_what_the_equations_give(tmp_path, old, reader, tokenizer):
    folder = old.write(tmp_path / "old", tokenizer)
    assert recognise(folder) == "cocom"
    cocom = import_checkpoint("cocom", folder, reader)
    passages = cocom.compress(PASSAGES)
    wanted = [old.slots(text) for text in PASSAGES]
    for passage, want in zip(passages, wanted):
        assert torch.allclose(passage.embeds, want, atol=1e-4)
    model = tuned(with_rows(old.base, old.embed, old.head), old.decoder)
    documents = "".join("".join(old.marks * (len(w) // len(old.marks))) + "<SEP>" for w in wanted)
    old.tokenizer.chat_template = reader.tokenizer.chat_template
    text = chat(old.tokenizer, f"Background:\n{documents}\n\nQuestion:{QUESTION}")
    target = old.tokenizer("in Warsaw", add_special_tokens=False)["input_ids"]
    hand = logits_by_hand(model, old.tokenizer, text, old.marks, torch.cat(wanted), target)
    (found,) = cocom.reader.target_logits([pisco_prompt(cocom.reader, passages, QUESTION, form="2025")], [target])
    assert found.shape == hand.shape
    assert torch.allclose(found, hand, atol=1e-4)


@pytest.mark.slow
def test_the_older_layouts_are_written_with_their_reader(tmp_path, old, reader):
    folder = old.write(tmp_path / "old")
    import_to("cocom", folder, tmp_path / "out", reader)
    loaded, memory = load_compressor(tmp_path / "out"), load_compressor(folder, reader)
    a, b = (c.compress(PASSAGES) for c in (loaded, memory))
    assert all(torch.equal(x.embeds, y.embeds) for x, y in zip(a, b))
    assert loaded.reader.fingerprint == memory.reader.fingerprint


def test_rows_of_a_tied_reader_are_written_once(tmp_path, zoo):
    torch.manual_seed(0)
    old = Old(zoo, True, tie_word_embeddings=True)
    folder = old.write(tmp_path / "old")
    torch.save({"model.embed_tokens.weight": old.embed}, folder / "decoder_first_last_layers.pth")
    tied = Reader.from_pretrained(copy.deepcopy(old.base), tokenizer=zoo.tokenizer())
    cocom = import_checkpoint("cocom", folder, tied)
    assert torch.equal(cocom.reader.model.get_output_embeddings().weight, old.embed)
    assert torch.allclose(cocom.compress(PASSAGES[:1])[0].embeds, old.slots(PASSAGES[0]), atol=1e-4)


def test_damage_of_the_older_layouts_is_refused_by_name(tmp_path, zoo, reader):
    torch.manual_seed(0)
    old = Old(zoo, True)
    folder = old.write(tmp_path / "old")
    file = folder / "adapters.pth"
    good = torch.load(file)
    one = "model.layers.0.mlp.up_proj.lora_A.weight"
    for change, named in (
        ({k: v for k, v in good["decoder_adapter"].items() if k != one}, r"missing layers\.0\.mlp\.up_proj\.lora_A"),
        ({**good["decoder_adapter"], "model.thing": torch.zeros(1)}, r"model\.thing"),
        ({**good["decoder_adapter"], "lm_head.lora_A.weight": torch.zeros(RANK, 32)}, r"lm_head\.lora_A"),
        ({**good["decoder_adapter"], one: torch.full((RANK, 32), torch.inf)}, "NaN or infinite"),
    ):
        torch.save({**good, "decoder_adapter": change}, file)
        with pytest.raises(CheckpointError, match=named):
            import_checkpoint("cocom", folder, reader)
    torch.save({**good, "query_reasoner_adapter": good["decoder_adapter"]}, file)
    with pytest.raises(CheckpointError, match="query_reasoner_adapter"):
        import_checkpoint("cocom", folder, reader)
    torch.save(good, file)
    torch.save({"embed_tokens.weight": old.embed}, folder / "decoder_first_last_layers.pth")
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        import_checkpoint("cocom", folder, reader)
    (folder / "config.json").write_text(json.dumps({**old.settings, "compr_model_name": "bert-base-uncased"}))
    with pytest.raises(CheckpointError, match="COCOM-light"):
        import_checkpoint("cocom", folder, reader)


# -- CLaRa ---------------------------------------------------------------------------------------------------------


class CLaRa(Old):
    """The layout of the first PISCO with one repeated memory token, and an adapter that reads questions."""

    def __init__(self, zoo, kind=None):
        super().__init__(zoo, several=False, kind=kind)
        self.decoder, self.asker = lora(self.base, 2), lora(self.base, 5)
        self.settings |= {"model_type": "CLaRa", "compr_model_name": "google-bert/bert-base-uncased"}

    def write(self, folder, tokenizer=False, **adapters):
        super().write(folder, tokenizer)
        held = {"encoder_adapter": self.encoder, "decoder_adapter": self.decoder, "query_reasoner_adapter": self.asker}
        held = {name: state for name, state in (held | adapters).items() if state is not None}
        torch.save({k: {f"{n}.weight": t for n, t in v.items()} for k, v in held.items()}, folder / "adapters.pth")
        return folder


@pytest.fixture(scope="module")
def clara(zoo):
    torch.manual_seed(0)
    return CLaRa(zoo)


def test_clara_computes_what_the_equations_give(tmp_path, clara, reader):
    folder = clara.write(tmp_path / "clara")
    assert recognise(folder) == "clara"
    made = import_checkpoint("clara", folder, reader)
    passages = made.compress([*PASSAGES, ""])
    wanted = [clara.slots(text) for text in PASSAGES]
    assert [p.slots for p in passages] == [len(MEMS), len(MEMS), 0]
    for passage, want in zip(passages, wanted):
        assert torch.allclose(passage.embeds, want, atol=1e-4)
    # The decoder reads [slots]<SEP> per document; its adapter is not the encoder's.
    model = tuned(with_rows(clara.base, clara.embed, clara.head), clara.decoder)
    documents = ("<MEM>" * len(MEMS) + "<SEP>") * 2
    clara.tokenizer.chat_template = reader.tokenizer.chat_template
    text = chat(clara.tokenizer, f"Background:\n{documents}\n\nQuestion:{QUESTION}")
    target = clara.tokenizer("in Warsaw", add_special_tokens=False)["input_ids"]
    hand = logits_by_hand(model, clara.tokenizer, text, ["<MEM>"], torch.cat(wanted), target)
    prompt = pisco_prompt(made.reader, passages[:2], QUESTION, form="2025")
    assert torch.allclose(made.reader.target_logits([prompt], [target])[0], hand, atol=1e-4)
    # Relevance is the cosine of all slots as one vector, the question's made by the third adapter.
    asked = Old.slots(clara_for_questions(clara), QUESTION).flatten()
    cosines = [torch.cosine_similarity(asked, want.flatten(), dim=0) for want in wanted]
    assert torch.allclose(made.relevance(QUESTION, passages[:2]), torch.stack(cosines), atol=1e-4)
    with pytest.raises(ValueError, match="Passage 2 holds no slots"):
        made.relevance(QUESTION, passages)
    with pytest.raises(ValueError, match="1 to 40 tokens"):
        made.relevance(QUESTION * 20, passages[:2])


@pytest.mark.parametrize("kind", legacy.RELEASED)
@pytest.mark.parametrize("tokenizer", [True, False])
def test_clara_spells_text_as_the_tokenizer_does_behind_a_special_token(zoo, tmp_path, kind, tokenizer):
    clara = CLaRa(zoo, kind)
    folder = clara.write(tmp_path / "clara", tokenizer)
    reader = Reader(copy.deepcopy(clara.base), legacy.tokenizer(kind))
    texts = [PASSAGES[1], "Hi", "(1911)\n"]
    for text, passage in zip(texts, import_checkpoint("clara", folder, reader).compress(texts)):
        assert torch.allclose(passage.embeds, clara.slots(text), atol=1e-4)


def clara_for_questions(clara):
    other = copy.copy(clara)
    other.encoder = clara.asker
    return other


def test_clara_is_written_with_its_reader_and_query_encoder(tmp_path, clara, reader):
    folder = clara.write(tmp_path / "clara")
    import_to("clara", folder, tmp_path / "out", reader)
    loaded, memory = load_compressor(tmp_path / "out"), load_compressor(folder, reader)
    a, b = (c.compress(PASSAGES) for c in (loaded, memory))
    assert all(torch.equal(x.embeds, y.embeds) for x, y in zip(a, b))
    assert torch.equal(loaded.relevance(QUESTION, a), memory.relevance(QUESTION, b))


def test_clara_without_an_adapter(tmp_path, clara, reader):
    made = import_checkpoint("clara", clara.write(tmp_path / "instruct", query_reasoner_adapter=None), reader)
    with pytest.raises(ValueError, match="no query encoder"):
        made.relevance(QUESTION, made.compress(PASSAGES))
    one = "model.layers.0.mlp.up_proj.lora_A"
    for i, (changes, named) in enumerate(
        (
            (dict(encoder_adapter=None), "lacks encoder_adapter"),
            (dict(other_adapter=clara.asker), "other_adapter"),
            (
                dict(query_reasoner_adapter={k: v for k, v in clara.asker.items() if k != one}),
                r"missing layers\.0\.mlp\.up_proj\.lora_A",
            ),
        )
    ):
        with pytest.raises(CheckpointError, match=named):
            import_checkpoint("clara", clara.write(tmp_path / str(i), **changes), reader)


# -- forms of the authors' code ------------------------------------------------------------------------------------


def released(reader, **settings) -> PublishedPISCO:
    return PublishedPISCO(PublishedPISCOConfig(**{"ratio": 4.0, "r": 4, **settings}), reader).eval()


def test_the_forms_of_the_authors_code(reader):
    pisco = released(reader, slots="plus-one", segment_tokens=32, prefix=(), decoder="none")
    assert pisco.segments(3) == [(3, 1)]
    assert pisco.segments(32) == [(32, 9)]
    assert pisco.segments(70) == [(32, 9), (32, 9), (6, 2)]
    fixed = released(reader, slots="fixed", segment_tokens=32, memory_tokens=8, decoder="none")
    assert fixed.segments(3) == [(3, 8)]
    assert fixed.segments(70) == [(23, 8), (23, 8), (24, 8)]
    assert fixed.compress([""])[0].slots == 0


def test_slots_go_by_what_the_encoder_reads_of_a_passage_that_opens_a_prompt(zoo):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "▁", "a", "b", "c", "▁b"])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    reader = Reader(zoo.model(), PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>"))
    text = "abca"  # "▁" "a" "b" "c" "a" where it opens a prompt
    assert len(reader.tokenize(text)) == 4
    slots = [released(reader, as_prompt=opens).compress([text])[0].slots for opens in (False, True)]
    assert slots == [1, 2]
