"""The reader recipe: tokenizer, made questions, packed rows and their exactness, the copying start, overlap, saving."""

from __future__ import annotations

import json
import lzma
import random

import pytest
import torch
from llama_index.core.prompts.default_prompts import DEFAULT_REFINE_PROMPT_TMPL, DEFAULT_TEXT_QA_PROMPT_TMPL
from nutgraf import Reader
from nutgraf.compressors.fidelity.questions import find_spans, make_questions
from nutgraf.recipes.data.answer_scores import exact_match, f1
from nutgraf.recipes.data.corpus import parse_record, read_documents, read_records
from nutgraf.recipes.data.overlap import HeldOut
from nutgraf.recipes.data.templates import LLAMA_INDEX_QA, LLAMA_INDEX_REFINE
from nutgraf.recipes.reader.groups import FORMATS, rename
from nutgraf.recipes.reader.init import start_copying
from nutgraf.recipes.reader.model import PackedReader, block_mask
from nutgraf.recipes.reader.pooled_contexts import draw_window, token_weights
from nutgraf.recipes.reader.rows import ReaderRows, RowSettings, collate_rows, find_places
from nutgraf.recipes.reader.task import ReaderTask
from nutgraf.recipes.reader.tokenizer import BOS, EOS, train_tokenizer
from nutgraf.recipes.training.schema import load_recipe
from nutgraf.recipes.training.trainer import run_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TESLA = (
    "In 1881, Nikola Tesla moved to Budapest to work under Ferenc Puskás at a telegraph company, the Budapest "
    "Telephone Exchange. He earned 300 florins a month, and the company was sold in 1884 by its owner."
)
OTHER = (
    "The river Danube rises in the Black Forest of Germany and flows through ten countries before it reaches the "
    "Black Sea. Its delta in Romania covers 4,152 square kilometres and was listed by UNESCO in 1991."
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of tiny data files in the shapes the recipe reads."""
    folder = tmp_path_factory.mktemp("data")
    text = "\n<|doc|>\n".join(f"# Title {i}\n\n{TESLA}\n\n{OTHER}" for i in range(3))
    for name in ("text_enwiki2018_0", "text_enwiki2014_0", "text_dev"):
        body = text if name != "text_dev" else "# Held\n\nNothing of this stands anywhere else."
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(body.encode()))
    asked = [("Who moved to Budapest?", "Nikola Tesla"), ("When was the company sold?", "1884")]
    rows = [
        {
            "id": str(i),
            "question": q,
            "answers": [a],
            "passages": [{"title": "", "text": TESLA}],
            "gold": 0,
            "source": s,
        }
        for i, ((q, a), s) in enumerate(zip(asked * 2, ["squad_30_articles"] * 2 + ["qamr_dev"] * 2))
    ]
    dev = [{**rows[0], "half": "tune", "passages": [{"title": "", "text": "A wholly different passage."}]}]
    for name, content in (("qa_train", rows), ("qa_dev_squad", dev), ("qa_dev_qamr", dev)):
        lines = "\n".join(json.dumps(row) for row in content)
        (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


@pytest.fixture(scope="module")
def recipe(data):
    return load_recipe(
        "reader",
        [
            f"data.dir={data}",
            "data.dev_limit=1",
            "tokenizer.vocab_size=320",
            "model.hidden_size=64",
            "model.intermediate_size=64",
            "model.num_hidden_layers=3",
            "model.num_attention_heads=2",
            "model.num_key_value_heads=1",
            "model.head_dim=16",
            "model.embedder=none",
            "stages.*.steps=2",
            "stages.*.batch_size=2",
            "stages.*.eval_every=null",
            "stages.*.mix.row_tokens=256",
            "stages.*.mix.copy_tokens=64",
            "stages.*.mix.point_groups=1",
        ],
    )


@pytest.fixture(scope="module")
def task(recipe):
    return ReaderTask(recipe)


def rows_of(task, count=4, **settings):
    return ReaderRows(task.corpus, task.tokenizer, RowSettings(row_tokens=512, **settings), "7/test", count)


def test_tokenizer_round_trips_and_splits_numbers_and_lines():
    tokenizer = train_tokenizer([TESLA, OTHER] * 3, 400)
    text = "Zoë’s 1963 — \t漢字\n\nQuestion: <|user|>?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == BOS + text
    assert tokenizer.tokenize("a\n\nb").count("Ċ") == 2
    assert all(sum(char.isdigit() for char in token) <= 2 for token in tokenizer.tokenize("In 1963 it cost 12345"))
    with pytest.raises(ValueError, match="256 bytes"):
        train_tokenizer([TESLA], 100)


def test_chat_template_ends_where_the_answer_begins(task):
    chat = [{"role": "user", "content": "Hi"}]
    prompt = task.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    whole = task.tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "ok"}], tokenize=False)
    assert prompt == "<|begin|><|user|>\nHi\n<|assistant|>"
    assert whole == prompt + " ok" + EOS


def test_corpus_files_and_wrong_records(data):
    assert len(list(read_documents(data / "text_enwiki2018_0.txt.xz"))) == 3
    assert read_records(data / "qa_dev_squad.jsonl.xz", half="report") == []
    with pytest.raises(ValueError, match="gold=3"):
        parse_record({"question": "?", "answers": ["a"], "passages": [{"text": "b"}], "gold": 3})
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.jsonl"):
        read_records(data / "nothing.jsonl")


def test_made_questions_are_answered_by_the_passage_and_follow_the_seed():
    pairs = make_questions(TESLA, 6, random.Random(3))
    assert len(pairs) >= 4
    assert all(answer in TESLA and answer.lower() not in question.lower() for question, answer in pairs)
    assert pairs == make_questions(TESLA, 6, random.Random(3))
    kinds = {TESLA[span.start : span.end]: span.kind for span in find_spans(TESLA)}
    assert kinds["1881"] == "date"
    assert kinds["Nikola Tesla"] == "name"
    assert kinds["300"] == "number"


def test_renaming_takes_whole_words_only():
    assert rename(["Ann met Anna. Ann?"], "Ann", "Bo") == ["Bo met Anna. Bo?"]


def test_rows_depend_on_seed_stage_and_index_alone(task):
    kinds = {"made": 0.4, "human": 0.3, "many": 0.1, "copy": 0.1, "repeat": 0.05, "text": 0.05}
    first, again = rows_of(task, kinds=kinds), rows_of(task, kinds=kinds)
    for index in (3, 0):
        assert all((first[index][key] == again[index][key]).all() for key in first[index])
    assert (first[0]["ids"] != first[1]["ids"]).any()
    with pytest.raises(IndexError):
        first[4]


def test_a_question_in_a_packed_row_reads_as_if_it_stood_alone(task):
    item = rows_of(task, kinds={"made": 0.5, "human": 0.5})[0]
    model = task.module.model.eval()
    batch = collate_rows([item])
    hidden = model.model(
        input_ids=batch["ids"],
        position_ids=batch["positions"],
        attention_mask=block_mask(batch["groups"], batch["branches"]),
    ).last_hidden_state[0]
    group, branch = batch["groups"][0], batch["branches"][0]
    assert branch.max() >= 2
    for number in range(1, int(branch[group == 1].max()) + 1):
        chosen = (group == 1) & ((branch == 0) | (branch == number))
        alone = model.model(input_ids=batch["ids"][:, chosen]).last_hidden_state[0]
        torch.testing.assert_close(hidden[chosen], alone, atol=2e-5, rtol=1e-4)


def test_only_answers_carry_the_answer_loss_and_they_end(task):
    item = rows_of(task, kinds={"human": 1.0}, unanswerable=0.0, swap=0.0)[0]
    said = task.tokenizer.decode(item["ids"][(item["kinds"] == 1) | (item["kinds"] == 4)])
    assert EOS in said
    assert {" Nikola Tesla", " 1884"} & set(said.split(EOS))
    assert "Question" not in said
    for end, place in item["pointers"][item["pointers"][:, 0] >= 0]:
        assert item["ids"][end + 1] == item["ids"][place]
        assert item["groups"][end] == item["groups"][place]
        assert item["branches"][place] == 0


def test_rare_tokens_weigh_more(task):
    core = task.tokenizer.backend_tokenizer
    texts = ["the cat", "the dog", "the bird", "the cow"]
    weights = token_weights(core, texts)
    common = core.encode("the", add_special_tokens=False).ids[0]
    rare = core.encode(" cow", add_special_tokens=False).ids[-1]
    assert weights.shape == (len(task.tokenizer),)
    assert weights[rare] > weights[common]
    assert {draw_window({4: 1.0, 8: 0.0}, random.Random(i)) for i in range(5)} == {4}


def test_rows_with_pooled_passages(task):
    settings = RowSettings(
        row_tokens=512, kinds={"human": 1.0}, swap=0.0, unanswerable=0.0, pooled=1.0, pool_windows={6: 1.0}
    )
    rows = ReaderRows(task.corpus, task.tokenizer, settings, "7/test", 3, task._token_weights())
    item = rows[0]
    assert item["slots"]
    assert (item["ids"][list(item["slots"])] == task.tokenizer.pad_token_id).all()
    assert (item["kinds"][list(item["slots"])] == 0).all()
    pointed = item["pointers"][item["pointers"][:, 0] >= 0]
    assert len(pointed)
    for end, place in pointed:  # the slot pointed at holds the token with which the answer begins
        held = {item["ids"][place]} if place not in item["slots"] else {token for token, _ in item["slots"][place]}
        assert item["ids"][end + 1] in held
        assert item["groups"][end] == item["groups"][place]
    assert all((item[key] == rows[0][key]).all() for key in item if key != "slots")
    batch = collate_rows([item, rows[1]])
    task.module.train()
    out = task.module(**batch)
    assert torch.isfinite(out["loss"])
    changed = task.module(**{**batch, "slot_tokens": batch["slot_tokens"].flip(0)})
    assert changed["loss"] != out["loss"]
    with pytest.raises(ValueError, match="need the weights"):
        ReaderRows(task.corpus, task.tokenizer, settings, "7/test", 3)
    with pytest.raises(ValueError, match="pool_windows"):
        RowSettings(pool_windows={0: 1.0})


def test_places_of_an_answer():
    assert find_places([5, 1, 2, 3, 1, 2, 4], [1, 2]) == [1, 4]
    assert find_places([5, 1], []) == []


def test_llama_index_format_is_the_default_template():
    assert (LLAMA_INDEX_QA, LLAMA_INDEX_REFINE) == (DEFAULT_TEXT_QA_PROMPT_TMPL, DEFAULT_REFINE_PROMPT_TMPL)
    shape = FORMATS["llama_index"]
    want = DEFAULT_TEXT_QA_PROMPT_TMPL.format(context_str="C", query_str="Q?")
    assert shape.head + "C" + shape.tail.format(question="Q?") == want


def test_unknown_settings_are_refused(task):
    with pytest.raises(ValueError, match="kinds names 'poems'"):
        RowSettings(kinds={"poems": 1.0})
    stage = task.recipe.stages[0].model_copy(update={"mix": {"point_groups": 9}})
    with pytest.raises(ValueError, match="point_groups is 9"):
        task.begin_stage(stage)
    stage = task.recipe.stages[0].model_copy(update={"mix": {"row_token": 3}})
    with pytest.raises(ValueError, match=r"unknown key stages\.copy\.mix\.row_token; did you mean 'row_tokens'"):
        task.dataset(stage)


def test_a_fresh_model_already_attends_where_copying_needs_it():
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=160,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    start_copying(model)
    segment = torch.randperm(490)[:12] + 10
    attention = model(input_ids=segment.repeat(3)[None], output_attentions=True).attentions
    assert attention[0][0, 0, 20].argmax() == 19  # the previous token
    assert attention[1][0, 0, 20].argmax() == 9  # what followed the present token last time
    assert model.model.embed_tokens.weight.std() > 0.5
    with pytest.raises(ValueError, match="content is"):
        start_copying(model, torch.zeros(3, 3))


def test_pointing_loss_falls_when_the_head_is_trained(task):
    module = PackedReader(task.module.model)
    module.point_weight = 1.0
    module.point_groups = module.model.config.num_key_value_heads
    batch = collate_rows([rows_of(task, kinds={"human": 1.0})[0]])
    module.train()
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    seen = []
    for _ in range(6):
        out = module(**batch)
        out["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        seen.append(float(out["loss/point"]))
    assert seen[-1] < seen[0]
    module.point_weight = 0.0
    assert "loss/point" not in module(**batch)


def test_overlap_finds_passages_and_questions():
    held = HeldOut(n=8)
    held.add_passage(TESLA)
    held.add_question("Who moved to Budapest in 1881 ?")
    assert held.has_passage("X " + TESLA[30:150])
    assert not held.has_passage(OTHER)
    assert held.has_question("who moved to Budapest, in 1881?")
    assert not held.has_question("Who moved to Vienna in 1881?")


def test_held_out_paragraphs_are_never_drawn(task):
    held, task.corpus.held_out = task.corpus.held_out, HeldOut(n=8)
    try:
        task.corpus.held_out.add_passage(TESLA)
        drawn = {task.corpus.paragraph(random.Random(seed)) for seed in range(30)}
        assert drawn == {OTHER}
    finally:
        task.corpus.held_out = held


def test_scores():
    assert exact_match("The Nikola Tesla.", ["nikola tesla"]) == f1("The Nikola Tesla.", ["nikola tesla"]) == 1.0
    assert exact_match("Tesla", ["Nikola Tesla", "x"]) == 0.0
    assert f1("Tesla", ["Nikola Tesla", "x"]) == pytest.approx(2 / 3)
    assert f1("", ["x"]) == 0.0


@pytest.mark.slow
def test_the_recipe_trains_scores_and_saves_a_loadable_reader(recipe, tmp_path):
    task = ReaderTask(recipe)
    final = run_recipe(recipe, task, tmp_path / "run")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("Who?", return_tensors="pt")["input_ids"]
    want = task.module.model.to(torch.bfloat16).eval()(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, want)
    scores = ReaderTask(recipe).evaluate(recipe.stages[0])
    assert {"copy_loss", "heldout_ppl", "em_squad", "f1_squad_none", "ended_qamr"} <= set(scores)


# -- a pretrained base ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(zoo, tmp_path_factory):
    """A tiny Llama that stands for a pretrained model, in a folder."""
    return zoo.saved("llama", tmp_path_factory.mktemp("base"), torch.bfloat16)


def on_base(data, base, *overrides):
    return load_recipe(
        "reader_smollm2",
        [
            f"data.dir={data}",
            "data.dev_questions=[qa_dev_squad.jsonl.xz]",
            "data.dev_limit=1",
            f"model.base={base}",
            "model.first_layer=1",
            "stages.*.steps=2",
            "stages.*.batch_size=2",
            "stages.*.mix.row_tokens=400",
            "stages.*.eval_every=null",
            *overrides,
        ],
    )


@pytest.mark.slow
def test_a_pretrained_base_becomes_an_adapter_that_a_reader_loads(data, base, tmp_path):
    recipe = on_base(data, base, "stages.*.lr=0.05")
    task = ReaderTask(recipe)
    before = {name: value.clone() for name, value in task.module.named_parameters()}
    final = run_recipe(recipe, task, tmp_path / "run")
    changed = {name for name, value in task.module.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name and ".layers.0." not in name for name in changed)
    assert {file.name for file in final.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    }
    reader, again = Reader.from_pretrained(final), Reader.from_pretrained(final, dtype=torch.float32)
    assert reader.fingerprint == again.fingerprint != Reader.from_pretrained(base).fingerprint
    ids = torch.tensor([reader.tokenize(TESLA)])
    with torch.no_grad():
        want, got = task.module.model.float().eval()(ids).logits, again.model(ids).logits
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)  # the adapter and the sum are stored in bfloat16
    with torch.no_grad():
        assert (got - Reader.from_pretrained(base, dtype=torch.float32).model(ids).logits).abs().max() > 0.2


@pytest.mark.slow
def test_rows_on_a_base_are_laid_out_in_its_own_chat_format(data, base):
    recipe = on_base(data, base, "stages.*.mix.formats={chat: 1.0}", "stages.*.mix.kinds={human: 1.0}")
    task = ReaderTask(recipe)
    reader = Reader.from_pretrained(base)
    row = task.dataset(recipe.stages[0])[0]
    ids, branches = row["ids"][row["groups"] == 1], row["branches"][row["groups"] == 1]
    asked = torch.tensor(ids[(branches == 0) | (branches == 1)])
    text = task.tokenizer.decode(asked)
    question, answer = text.split("Question: ")[1].split("\nAnswer:")[0], text.split("\n")[-1].removesuffix("</s>")
    context = text.split("<|user|>\n")[1].split("\n\nQuestion")[0]
    assert answer == answer.strip()  # the template ends with a line of its own
    (plan,) = reader.plan([[f"{context}\n\nQuestion: {question}\nAnswer:"]], chat=True)
    assert asked.tolist()[: len(plan)] == list(plan.ids)


def test_the_small_reader_keeps_its_chat_format(task):
    rows = rows_of(task, formats={"chat": 1.0})
    names = [task.tokenizer.convert_ids_to_tokens(part) for part in (rows.chat.before, rows.chat.behind)]
    assert names == [[BOS, "<|user|>", "Ċ"], ["Ċ", "<|assistant|>"]]
    assert rows.prompts.bos_ids == [task.tokenizer.bos_token_id]


EVERYWHERE = ("model.target_modules=all-linear", "model.first_layer=0")


@pytest.mark.slow
def test_rows_on_a_base_give_what_each_prompt_gives_alone(data, zoo, tmp_path):
    for name in ("llama", "qwen3", "gemma3_text", "gpt_neox", "olmo2"):
        model = zoo.model(name).float().eval()
        task = ReaderTask(on_base(data, zoo.saved(name, tmp_path / name), *EVERYWHERE))
        module = PackedReader(model)
        batch = collate_rows([rows_of_base(task)])
        got = module(**batch)
        losses = []
        ids, groups, branches, kinds = (batch[key][0] for key in ("ids", "groups", "branches", "kinds"))
        for group in range(1, int(groups.max()) + 1):
            for branch in range(1, int(branches[groups == group].max()) + 1):
                chosen = (groups == group) & ((branches == 0) | (branches == branch))
                logits = model(ids[chosen][None]).logits[0, :-1]
                wanted = kinds[chosen][1:] > 0
                losses.append(
                    torch.nn.functional.cross_entropy(logits[wanted], ids[chosen][1:][wanted], reduction="none")
                )
        torch.testing.assert_close(got["loss"], torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)


def rows_of_base(task):
    settings = RowSettings(row_tokens=400, kinds={"human": 1.0}, text_share=0.0)
    return ReaderRows(task.corpus, task.tokenizer, settings, "7/test", 1)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.first_layer=3"], "first_layer is 3.*3 layers"),
        (["model.rank=3"], "unknown key model.rank"),
        (["model.target_modules=all-linear"], "all-linear means every layer; with first_layer name the modules"),
        (["tokenizer={vocab_size: 300}"], "remove tokenizer"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(data, base, overrides, message):
    with pytest.raises(ValueError, match=message):
        ReaderTask(on_base(data, base, *overrides))


def test_pointing_heads_are_refused_on_a_base(data, base):
    recipe = on_base(data, base, "stages.*.mix.point=0.5")
    with pytest.raises(ValueError, match=r"mix\.point"):
        ReaderTask(recipe).begin_stage(recipe.stages[0])


def test_a_missing_data_folder_is_named(recipe):
    with pytest.raises(ValueError, match=r"data\.dir"):
        ReaderTask(recipe.model_copy(update={"data": {}}))
