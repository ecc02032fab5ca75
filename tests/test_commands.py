"""Every command tells an expected failure in one sentence, with exit status 2."""

from __future__ import annotations

import json

import pytest
import typer
from nutgraf import Reader
from nutgraf.cli import app
from nutgraf.compressors.importers import IMPORTERS, options
from nutgraf.console import friendly_errors
from typer.testing import CliRunner


def run(*arguments: object, text: bytes | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments], input=text)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.output


def fail(*arguments: object, text: bytes | None = None) -> str:
    status, said = run(*arguments, text=text)
    assert status == 2, said
    assert len(said.strip().splitlines()) == 1, said
    return said


INSPECT = ("inspect", "--compressor", "selective-context", "--reader", "reader-small")


@pytest.mark.parametrize("name", ["typo.txt", "typo.JSONL", "data/typo.md", "/no/such", "../typo", "my notes.txt"])
def test_a_mistyped_file_is_no_passage(name):
    assert f"There is no file {name}." in fail(*INSPECT, name)


@pytest.mark.slow
def test_inspect_reads_a_file_standard_input_or_the_text(tmp_path):
    text = "The war ended in 1918, U.S.A. and/or others signed."
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    shown = {run(*INSPECT, given, text=stdin) for given, stdin in (
        (tmp_path / "a.txt", None), (text, None), ("-", b"\xef\xbb\xbf" + text.encode()), ("-", text.encode())
    )}  # fmt: skip
    ((status, said),) = shown
    assert status == 0
    assert "\ufeff" not in said
    assert "is a folder" in fail(*INSPECT, tmp_path)
    (tmp_path / "b.txt").write_bytes(b"a\n\xff\xfe")
    assert "line 2 is not UTF-8" in fail(*INSPECT, tmp_path / "b.txt")
    assert "utf-8" in fail(*INSPECT, "-", text=b"\xff")


def test_a_reader_that_does_not_exist_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds no reader") as caught:
        Reader.from_pretrained(tmp_path)
    assert caught.value.__cause__ is caught.value.__context__ is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no-such-reader", "no/such"):
        with pytest.raises(FileNotFoundError, match=f"There is no reader '{name}'") as caught:
            Reader.from_pretrained(name)
        assert caught.value.__cause__ is caught.value.__context__ is None
        assert "\n" not in str(caught.value)
    assert "There is no reader 'no/such'" in fail("inspect", "Some text.", "--reader", "no/such")


QUESTION = {"question": "When?", "answers": ["1901"], "passages": [{"text": "In 1901."}], "gold": 0}


@pytest.mark.parametrize("change", [{"answers": [1901]}, {"passages": [{"contents": "a"}]}, {"question": None}])
@pytest.mark.parametrize("command", [("bench", "quality"), ("bench", "reading"), ("bench", "speed"), ("bench", "gate")])
def test_benchmarks_name_file_and_line_of_a_bad_row(tmp_path, change, command):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n" + json.dumps(QUESTION | change))
    assert f"{path}, line 2 " in fail(*command, path)


def test_failures_of_libraries_are_one_sentence_and_faults_are_not(capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    for error in (OutOfMemoryError("CUDA\n  out of memory"), ValueError("a\n b"), OSError("c"), MemoryError()):
        with pytest.raises(typer.Exit), friendly_errors():
            raise error
    said = capsys.readouterr().err.splitlines()
    assert said == ["Error: CUDA out of memory", "Error: a b", "Error: c", "Error: MemoryError"]
    with pytest.raises(AttributeError), friendly_errors():
        raise AttributeError("a fault of ours")


def test_import_help_lists_every_importer_and_its_settings():
    status, said = run("import", "--help")
    assert status == 0
    words = " ".join(said.replace("│", " ").split())
    for name in IMPORTERS:
        assert f"{name}: " in words
        for setting, default in options(name).items():
            assert (setting if default is None else f"{setting}={default}") in words
