"""Training within a time budget: a compressor and rows come out, whatever the speed."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from nutgraf.benchmarks.gpu_training import main
from nutgraf.benchmarks.loading import SAMPLE_ARTICLES, SAMPLE_QUESTIONS
from nutgraf.compressors import Reader, load_compressor


@pytest.mark.slow
def test_a_compressor_and_its_scores_come_out_in_time(zoo, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for file in (SAMPLE_ARTICLES, SAMPLE_QUESTIONS):
        shutil.copy(file, data)
    rows = [json.loads(line) for line in SAMPLE_QUESTIONS.read_text().splitlines()[:40]]
    (data / "dev.jsonl").write_text("\n".join(json.dumps(row | {"half": "tune"}) for row in rows))
    stage = {
        "batch_size": 2,
        "lr": 1e-3,
        "ratios": [2, 4],
        "objectives": {"lm": 1.0},
        "mix": {"both": 0.5, "made": 0.5},
    }
    recipe = {
        "name": "toy",
        "kind": "compressor",
        "reader": str(zoo.saved("llama", tmp_path / "reader")),
        "data": {"texts": [SAMPLE_ARTICLES.name], "questions": [SAMPLE_QUESTIONS.name]},
        "compressor": {"method": "mean-pool", "r": 2, "tune_reader": True, "reader_r": 2, "dropped_layers": 1},
        "stages": [{"name": name, "steps": 50_000, **stage} for name in ("one", "two")],
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    main(
        [str(tmp_path / "toy.yaml")],
        data=data,
        out=out,
        work=tmp_path / "work",
        seconds=8.0,
        scoring=4.0,
        limit=4,
        ratio=[2.0],
        dev=["dev.jsonl"],
        settings=["stages.*.batch_size=3"],
    )
    (row,) = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert (row["method"], row["ratio_asked"], row["n"], row["half"]) == ("mean-pool", 2.0, 4, "tune")
    assert {"f1", "f1_shuffled", "f1_full", "f1_none", "f1_full_tuned"} <= set(row)
    log = [json.loads(line) for line in (tmp_path / "work" / "toy" / "run" / "log.jsonl").read_text().splitlines()]
    assert 2 <= row["steps"] < 100_000
    assert {line["stage"] for line in log} <= {"one", "two"}
    compressor = load_compressor(out / "toy", Reader.from_pretrained(tmp_path / "reader"))
    assert compressor.fingerprint == row["compressor"]
