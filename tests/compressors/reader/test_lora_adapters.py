"""LoRA adapters are added to their base's weights exactly as PEFT computes them, or are refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from nutgraf import Reader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TEXT = "The treaty was signed in 1648 in Westphalia."


@pytest.fixture(scope="module")
def base(zoo, tmp_path_factory):
    return zoo.saved("qwen3", tmp_path_factory.mktemp("base"), torch.bfloat16)


@pytest.fixture(scope="module")
def tied(zoo, tmp_path_factory):
    """A folder with a model whose head is its embedding table."""
    folder = tmp_path_factory.mktemp("tied")
    zoo.model("qwen3", tie_word_embeddings=True).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def adapter(base, folder, *, rows=None, **settings):
    """A random LoRA on `base`, resized to `rows` first; returns the PEFT model and its folder."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.2)
    peft.save_pretrained(str(folder))
    return peft.float().eval(), folder


def check_same(reader, peft, tolerance=1e-4):
    ids = torch.tensor([reader.tokenize(TEXT)])
    with torch.no_grad():
        got, want = reader.model(ids).logits, peft(ids).logits
    torch.testing.assert_close(got, want, atol=tolerance * float(want.abs().max()), rtol=0)
    return got


def test_an_adapter_is_added_to_its_base(base, tmp_path):
    peft, folder = adapter(base, tmp_path / "adapter")
    reader = Reader.from_pretrained(folder, dtype=torch.float32)
    assert not any("lora" in name for name, _ in reader.model.named_modules())
    plain = Reader.from_pretrained(base, dtype=torch.float32)
    assert reader.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    got = check_same(reader, peft, 0.02)  # the sum is rounded to bfloat16
    ids = torch.tensor([reader.tokenize(TEXT)])
    assert (got - plain.model(ids).logits).abs().max() > 0.1 * got.abs().max()


def test_its_fingerprint_is_that_of_the_sum_in_every_precision(base, tmp_path):
    _, folder = adapter(base, tmp_path / "adapter")
    readers = [Reader.from_pretrained(folder, dtype=dtype) for dtype in ("auto", torch.bfloat16, torch.float32)]
    (fingerprint,) = {reader.fingerprint for reader in readers}
    assert fingerprint != Reader.from_pretrained(base).fingerprint
    readers[0].model.save_pretrained(tmp_path / "whole")
    readers[0].tokenizer.save_pretrained(tmp_path / "whole")
    assert Reader.from_pretrained(tmp_path / "whole").fingerprint == fingerprint


def test_a_dtype_may_be_named(base, zoo, tmp_path):
    _, folder = adapter(base, tmp_path / "adapter")
    for source in (folder, base):
        assert Reader.from_pretrained(source, dtype="float32").dtype == torch.float32
    assert (
        Reader.from_pretrained(zoo.model("llama"), tokenizer=zoo.tokenizer(), dtype="bfloat16").dtype == torch.bfloat16
    )
    for wrong in ("float31", "int8", torch.int8):
        with pytest.raises(ValueError, match="dtype must be auto, float32"):
            Reader.from_pretrained(folder, dtype=wrong)


def test_an_adapter_cannot_be_added_to_quantised_weights(base, tmp_path):
    _, folder = adapter(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="cannot be quantised: save the reader"):
        Reader.from_pretrained(folder, quantization_config={"load_in_8bit": True})


def test_a_tokenizer_beside_the_adapter_is_taken(base, zoo, tmp_path):
    _, folder = adapter(base, tmp_path / "adapter")
    longer = zoo.tokenizer().__class__.from_pretrained(base)
    longer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    longer.save_pretrained(folder)
    assert Reader.from_pretrained(folder).tokenizer.chat_template == longer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"ensure_weight_tying": True, "target_modules": ["q_proj"]}])
def test_lora_on_a_tied_head_leaves_the_embeddings_alone(tied, tmp_path, settings):
    peft, folder = adapter(tied, tmp_path / "adapter", **{"target_modules": ["q_proj", "lm_head"], **settings})
    reader = Reader.from_pretrained(folder)
    check_same(reader, peft)
    before = AutoModelForCausalLM.from_pretrained(tied).get_input_embeddings().weight
    torch.testing.assert_close(reader.model.get_input_embeddings().weight, before)
    reader.model.save_pretrained(tmp_path / "whole")
    reader.tokenizer.save_pretrained(tmp_path / "whole")
    again = Reader.from_pretrained(tmp_path / "whole")
    check_same(again, peft)
    assert again.fingerprint == reader.fingerprint


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following")  # a pattern without a targeted module
@given(
    r=st.integers(1, 5),
    alpha=st.floats(0.5, 16),
    use_rslora=st.booleans(),
    targets=st.sampled_from([["q_proj", "lm_head"], r".*\.(k|up)_proj", "all-linear", ["v_proj", "down_proj"]]),
    layers=st.sampled_from([None, [0, 2], 1]),
    ranks=st.sampled_from([{}, {"q_proj": 2, "down_proj": 7}]),
    alphas=st.sampled_from([{}, {"q_proj": 3, "up_proj": 1}]),
    start=st.sampled_from([True, False, "gaussian"]),
)
@settings(max_examples=12, deadline=None, phases=[Phase.generate])
def test_any_plain_lora_is_what_peft_computes(
    tied, tmp_path_factory, r, alpha, use_rslora, targets, layers, ranks, alphas, start
):
    if layers is not None and not isinstance(targets, list):
        layers = None  # PEFT takes layers with names only
    peft, folder = adapter(
        tied,
        tmp_path_factory.mktemp("adapter"),
        r=r,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        target_modules=targets,
        layers_to_transform=layers,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        init_lora_weights=start,
    )
    check_same(Reader.from_pretrained(folder), peft)


def change(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


# Fields of PEFT's LoraConfig that may have any value, or several. A new field of PEFT's is refused until it is added.
ANY = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "r", "lora_alpha"}
ANY |= {
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "eva_config",
}
ANY |= {"layers_to_transform", "layers_pattern", "fan_in_fan_out", "ensure_weight_tying", "megatron_core"}
ANY |= {"qalora_group_size"}
OTHERS = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in ANY]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OTHERS, "a_setting_of_next_year"])
def test_every_other_setting_is_refused_by_name(base, tmp_path, name):
    _, folder = adapter(base, tmp_path / "adapter")
    change(folder, **{name: "pissa"})
    with pytest.raises(ValueError, match=rf"more than plain LoRA.*{name}='pissa'"):
        Reader.from_pretrained(folder)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}]
)
def test_more_than_plain_lora_is_refused(base, tmp_path, settings):
    _, folder = adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=f"more than plain LoRA.*{next(iter(settings))}="):
        Reader.from_pretrained(folder)


@pytest.mark.parametrize(("text", "said"), [("[]", "JSON object"), ("{", "cannot be read"), ("{}", "no peft_type")])
def test_a_damaged_config_is_refused(base, tmp_path, text, said):
    _, folder = adapter(base, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        Reader.from_pretrained(folder)


def test_an_adapter_on_other_layers_than_linear_ones_is_refused(base, tmp_path):
    _, folder = adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens.*LoRA on linear layers"):
        Reader.from_pretrained(folder)


def test_no_weight_of_an_adapter_is_made_up_or_left_out(base, tmp_path):
    _, folder = adapter(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    first = next(iter(state))
    save_file({name: t for name, t in state.items() if name != first}, file)
    with pytest.raises(ValueError, match=f"lacks {first}"):
        Reader.from_pretrained(folder)
    save_file({**state, first.replace("layers.0", "layers.9"): state[first].clone()}, file)
    with pytest.raises(ValueError, match=r"without a place in the base model, .*layers\.9"):
        Reader.from_pretrained(folder)
    save_file({**state, "base_model.model.model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(ValueError, match=r"holds model\.norm\.weight, which is neither LoRA"):
        Reader.from_pretrained(folder)
    save_file(state, file)
    change(folder, r=5)
    with pytest.raises(ValueError, match="does not fit its base model"):
        Reader.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "base"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_added_tokens_come_with_their_rows(request, zoo, tmp_path, kind, targets):
    peft, folder = adapter(
        request.getfixturevalue(kind), tmp_path / "adapter", rows=zoo.VOCAB + 3, target_modules=targets
    )
    tokenizer = zoo.tokenizer().__class__.from_pretrained(request.getfixturevalue(kind))
    tokenizer.add_tokens(["<a>", "<b>", "<c>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    if kind == "base" and len(targets) == 2:  # PEFT saves the head's rows alone
        with pytest.raises(ValueError, match="600 embeddings and 603 rows of the head"):
            Reader.from_pretrained(folder)
        return
    reader = Reader.from_pretrained(folder, dtype=torch.float32)
    assert reader.vocab_size == zoo.VOCAB + 3
    check_same(reader, peft, 0.02)
    ids = torch.tensor([[5, zoo.VOCAB, zoo.VOCAB + 2]])
    with torch.no_grad():
        got, want = reader.model(ids).logits, peft(ids).logits
    torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)
