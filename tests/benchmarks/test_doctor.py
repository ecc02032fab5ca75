"""`nutgraf doctor`: a sentence per finding, true of the reader, and an exit status."""

from __future__ import annotations

import pytest
import torch
from nutgraf.benchmarks.cli import doctor as module
from nutgraf.benchmarks.cli.doctor import extras, machine, reading, self_test, speed, versions
from nutgraf.cli import app
from typer.testing import CliRunner


def levels(reader):
    return [finding.level for finding in reading(reader)]


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        ("llama", ["ok", "ok", "ok"]),
        ("gemma3_text", ["ok", "ok", "ok"]),
        ("gpt_neox", ["ok", "ok", "ok"]),
        ("gpt2", ["ok", "ok", "ok"]),  # its keys cannot move, but stand where they were made here
        ("falcon", ["ok", "ok", "note"]),  # its attention is out of reach
    ],
)
def test_what_a_reader_takes(zoo, architecture, wanted):
    assert levels(zoo.reader(architecture)) == wanted


def test_a_reader_that_misreads_is_a_fault(zoo, monkeypatch):
    reader = zoo.reader("llama")
    own = type(reader).identity

    def other(self, text):
        return own(self, text[::-1])

    monkeypatch.setattr(type(reader), "identity", other)
    first, *others = reading(reader)
    assert first.level == "fault"
    assert "misreads prompt embeddings" in first.text
    assert [finding.level for finding in others] == ["ok", "ok"]


def test_versions_and_extras_are_told_with_the_command_that_mends_them(monkeypatch):
    assert {finding.level for finding in versions()} == {"ok"}
    have = module._version
    changed = {"torch": "2.1.0", "lancedb": None, "fastapi": None}
    monkeypatch.setattr(module, "_version", lambda name: changed[name] if name in changed else have(name))
    found = list(versions())
    assert [finding.level for finding in found] == ["ok", "fault"]
    assert "torch 2.1.0 is installed" in found[1].text
    assert "pip install 'torch" in found[1].text
    notes = {finding.text for finding in extras() if finding.level == "note"}
    assert any("The extra store lacks lancedb" in text and "nutgraf[store]" in text for text in notes)
    assert any("The extra ray lacks lancedb" in text for text in notes), "it takes in store"


def test_the_machine():
    found = [finding.text for finding in machine("cpu")]
    assert "cores" in found[0]
    assert "GFLOP/s" in found[-1]
    assert speed(torch.float32, "cpu", 64, 0.01) > 0
    assert speed(torch.float32, "cuda:99", 64, 0.01) == 0


def test_the_self_test_says_why_a_method_does_not_work(zoo):
    assert self_test(zoo.reader("llama")).level == "ok"
    found = self_test(zoo.reader("gpt2"))
    assert found.level == "note"
    assert "mixes positions into its keys" in found.text


@pytest.mark.slow
def test_the_command(zoo, tmp_path):
    folder = str(zoo.saved("llama", tmp_path / "reader"))
    done = CliRunner().invoke(app, ["doctor", "--reader", folder, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    lines = done.output.strip().splitlines()
    assert all(line.split()[0] in ("ok", "note") for line in lines)
    assert sum("takes" in line for line in lines) == 3
    bad = CliRunner().invoke(app, ["doctor", "--reader", str(tmp_path / "none"), "--device", "cpu"])
    assert bad.exit_code == 1
    assert "fault The reader cannot be loaded" in bad.output
