"""What may befall a store: killed and racing writers, full and read-only disks, files that are cut off or changed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from fakes import stored_entry as entry
from nutgraf import CompressedPassage
from nutgraf.adapters.store import Entry, LanceStore, StoreError
from nutgraf.adapters.store.upkeep import compact, verify


def drive(kills: int, **environment: str) -> dict:
    # Not pytest's own folder: another user is to reach it.
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        command = [sys.executable, str(Path(__file__).parent / "store_driver.py"), str(folder), str(kills)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "Traceback" not in done.stderr, done.stderr[-4000:]
        return json.loads(done.stdout)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["plain", "encrypted"])
def driven(request) -> dict:
    return drive(kills=24, NUTGRAF_STORE_KEY="" if request.param == "plain" else "ab" * 32)


def check_kills(killed: dict) -> None:
    assert killed["crashed"] == 0  # none ended by itself
    assert killed["acknowledged"]  # some came to write
    assert killed["wrong"] == []
    assert killed["problems"] == []  # nothing is half-written
    assert killed["wrong_after"] == []
    assert killed["after"] <= killed["before"]
    assert killed["after"] < 1.5 * killed["nbytes"] + 4096 * killed["slabs"]  # what nobody points at is gone
    assert killed["slabs"] <= 2


@pytest.mark.slow
def test_killed_writers_lose_nothing_and_leave_nothing_half_written(driven):
    check_kills(driven["killed"])


@pytest.mark.long
def test_a_hundred_kills():
    check_kills(drive(kills=100)["killed"])


@pytest.mark.slow
def test_writers_at_the_same_time_all_succeed(driven):
    assert driven["race"] == [0, 0, 0]
    assert driven["race_wrong"] == driven["race_wrong_after"] == []
    rows, passages = driven["race_rows"]
    assert rows == passages  # what two of them put at the same moment stands there once after compaction


@pytest.mark.slow
def test_a_read_only_store_is_read_and_says_so(driven):
    found = driven["read_only"]
    assert found["wrong"] == []
    assert found["read_only"]
    assert found["passages"] == 1
    assert "read-only" in found["put"]
    assert "read-only" in found["compact"]
    assert "cannot be opened" in found["new"]


@pytest.mark.parametrize("interface", ["embeds", "text"])  # the slots' file is full; the table's file is full
def test_a_full_disk_keeps_the_store_as_it_was(tmp_path, interface):
    store = LanceStore(tmp_path / "s")
    store.put_many([entry(1)])
    large = entry(2, slots=4000)
    if interface == "text":
        text = " ".join(map(str, torch.randint(10**9, (100_000,)).tolist()))
        passage = CompressedPassage("text", 9, "compressor", None, text=text, n_tokens=9)
        large = Entry(large.key, passage, large.text)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # no file may grow beyond it
    try:
        with pytest.raises(StoreError, match="cannot be written"):
            store.put_many([entry(3), large])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.missing([entry(1).key, entry(3).key, large.key]) == [entry(3).key, large.key]
    store.put_many([entry(3), large])
    assert store.stats.passages == 3
    assert verify(store) == []


def slab(store: LanceStore) -> Path:
    (path,) = (Path(store.uri) / "slabs").glob("*.slab")
    return path


def test_a_truncated_slab_is_told_dropped_and_made_good(tmp_path):
    store = LanceStore(tmp_path / "s")
    store.put_many([entry(i) for i in range(3)])
    reader = LanceStore(tmp_path / "s")
    assert reader.get_many([entry(0).key])[0] is not None  # it has the slab mapped
    os.truncate(slab(store), slab(store).stat().st_size - 100)
    for one in (reader, LanceStore(tmp_path / "s")):
        assert one.get_many([entry(0).key, entry(1).key])[1] is not None
        with pytest.raises(StoreError, match=r"cut off.*nutgraf store verify"):
            one.get_many([entry(2).key])
    with pytest.raises(StoreError, match="cut off"):
        list(store.entries())
    (problem,) = verify(store, drop=True)
    assert problem.key == entry(2).key.id
    assert store.missing([entry(i).key for i in range(3)]) == [entry(2).key]
    store.put_many([entry(2)])
    assert torch.equal(store.get_many([entry(2).key])[0].embeds, entry(2).passage.embeds)
    assert verify(store) == []


def test_a_changed_byte_is_noticed(tmp_path):
    store = LanceStore(tmp_path / "s")
    store.put_many([entry(0), entry(1)])
    with slab(store).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(StoreError, match="checksum"):
        LanceStore(tmp_path / "s").get_many([entry(1).key])
    assert [problem.key for problem in verify(store)] == [entry(1).key.id]


def test_missing_and_foreign_slabs(tmp_path):
    store = LanceStore(tmp_path / "s")
    store.put_many([entry(0)])
    path = slab(store)
    path.rename(tmp_path / "away")
    with pytest.raises(StoreError, match="No such file"):
        LanceStore(tmp_path / "s").get_many([entry(0).key])
    path.write_bytes(b"x" * 5000)
    with pytest.raises(StoreError, match="cannot be read as a slab"):
        LanceStore(tmp_path / "s").get_many([entry(0).key])


@pytest.mark.parametrize("part", ["data", "_versions"])
def test_a_truncated_table_is_told(tmp_path, part):
    LanceStore(tmp_path / "s").put_many([entry(0)])
    folder = tmp_path / "s" / "passages.lance" / part
    for file in [f for f in folder.iterdir() if f.suffix in (".lance", ".manifest")]:
        os.truncate(file, 10)
    with pytest.raises(StoreError, match=r"cannot be (opened|read).*nutgraf store verify"):
        LanceStore(tmp_path / "s").get_many([entry(0).key])


def test_a_reader_survives_another_process_compacting(tmp_path):
    store = LanceStore(tmp_path / "s")
    store.put_many([entry(i) for i in range(4)])
    store.close()
    reader, late = LanceStore(tmp_path / "s"), LanceStore(tmp_path / "s")
    (held,) = reader.get_many([entry(0).key])
    assert late._find([entry(1).key])  # knows the place, has not opened the slab
    other = LanceStore(tmp_path / "s")
    other.put_many([entry(9)])
    assert compact(other, 0.0).after > 0
    assert torch.equal(held.embeds, entry(0).passage.embeds)
    for one in (reader, late):
        found = one.get_many([entry(i).key for i in (0, 1, 2, 3, 9)])
        assert [torch.equal(p.embeds, entry(i).passage.embeds) for p, i in zip(found, (0, 1, 2, 3, 9))] == [True] * 5


def test_compaction_leaves_the_slab_of_a_living_writer(tmp_path):
    writer, other = LanceStore(tmp_path / "s"), LanceStore(tmp_path / "s")
    writer.put_many([entry(0)])
    other.put_many([entry(1)])
    living = writer._slabs._writer[0]
    compact(other)
    assert living in other._slabs.sizes()
    writer.put_many([entry(2)])
    found = other.get_many([entry(i).key for i in range(3)])
    assert all(torch.equal(p.embeds, entry(i).passage.embeds) for i, p in enumerate(found))
