"""Encrypted stores: nothing of a passage is readable without the key, and nothing opens that was changed."""

from __future__ import annotations

import base64
import fcntl
import json
import pickle
import secrets
from pathlib import Path

import pytest
import torch
from fakes import stored_entry as entry
from hypothesis import given
from hypothesis import strategies as st
from nutgraf import CompressedPassage
from nutgraf.adapters.store import Entry, LanceStore, PassageKey, StoreError, upkeep
from nutgraf.adapters.store.encryption import Cipher, new_key
from nutgraf.adapters.store.upkeep import compact, copy, forget, rotate, verify
from nutgraf.cli import app
from typer.testing import CliRunner

KEY, OTHER = "ab" * 32, "cd" * 32
SECRET = "Marie Curie signed it in Warsaw"


@pytest.fixture(autouse=True)
def no_key_from_outside(monkeypatch):
    monkeypatch.delenv("NUTGRAF_STORE_KEY", raising=False)


def filled(folder: Path, n: int = 4, **options) -> LanceStore:
    store = LanceStore(folder, keys=KEY, **options)
    store.put_many([entry(i).with_facts(entry(i).facts) for i in range(n)])
    passage = CompressedPassage("text", 9, "compressor", None, text=SECRET, n_tokens=9, spans=((0, 5),))
    key = PassageKey.of(SECRET * 2, compressor="compressor", reader="reader")
    store.put_many([Entry(key, passage, SECRET * 2, [0.5, 0.25], {"file": SECRET})])
    return store


def same(store: LanceStore, n: int = 4) -> bool:
    found = store.get_many([entry(i).key for i in range(n)])
    return all(p is not None and torch.equal(p.embeds, entry(i).passage.embeds) for i, p in enumerate(found))


@given(st.binary(max_size=300), st.text(max_size=20))
def test_records_open_as_they_were_sealed(data, about):
    cipher = Cipher([OTHER, KEY])
    sealed = Cipher(KEY).seal(data, about)
    assert bytes(cipher.open(sealed, about)) == data
    assert not cipher.is_current(sealed)
    assert cipher.is_current(cipher.seal(data, about))
    assert cipher.seal(data, about) != cipher.seal(data, about)  # a nonce of its own for each
    with pytest.raises(StoreError, match="changed, or belongs to another"):
        cipher.open(sealed, about + "x")


@given(st.integers(8, 40), st.integers(1, 255))
def test_a_changed_bit_does_not_open(place, change):
    sealed = bytearray(Cipher(KEY).seal(b"twelve bytes", "a"))
    sealed[place % len(sealed)] ^= change
    with pytest.raises(StoreError, match=r"changed|encrypted with the key"):
        Cipher(KEY).open(sealed, "a")


@pytest.mark.parametrize("layout", ["slabs", "table"])
def test_nothing_is_readable_in_the_files_and_everything_through_the_key(tmp_path, layout):
    store = filled(tmp_path / "s", layout=layout)
    written = b"".join(file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file())
    assert SECRET.encode() not in written
    assert entry(0).text.encode() not in written
    assert entry(0).passage.embeds.numpy().tobytes() not in written
    opened = LanceStore(tmp_path / "s", keys=lambda: [base64.b64encode(bytes.fromhex(KEY)).decode()])
    assert opened.encrypted
    assert same(opened)
    found = {held.key: held for held in opened.entries()}
    key = PassageKey.of(SECRET * 2, compressor="compressor", reader="reader")
    assert found[key].passage.text == SECRET
    assert found[key].text == SECRET * 2
    assert found[key].facts.vector == (0.5, 0.25)
    assert opened.listed([key.id])[key.id].about == {"file": SECRET}
    assert verify(opened) == []
    assert same(pickle.loads(pickle.dumps(store)))
    with pytest.raises(ValueError, match="cannot be searched"):
        opened.search([0.5, 0.25])
    assert forget(opened, file=SECRET) == 1
    assert compact(opened, 0.0).duplicates == 0
    assert same(opened)


def test_a_wrong_or_missing_key_is_told_and_writes_nothing(tmp_path, monkeypatch):
    filled(tmp_path / "s")
    with pytest.raises(ValueError, match="NUTGRAF_STORE_KEY"):
        LanceStore(tmp_path / "s")
    wrong = LanceStore(tmp_path / "s", keys=OTHER)
    for attempt in (
        lambda: wrong.get_many([entry(0).key]),
        lambda: list(wrong.entries()),
        lambda: wrong.facts([entry(0).key]),
        lambda: wrong.put_many([entry(9)]),
        lambda: rotate(wrong),
        lambda: verify(wrong, drop=True),
    ):
        with pytest.raises(StoreError, match="encrypted with the key"):
            attempt()
    assert wrong.missing([entry(9).key])
    monkeypatch.setenv("NUTGRAF_STORE_KEY", KEY)
    assert same(LanceStore(tmp_path / "s"))
    for bad in ("short", "x" * 64, b"1" * 31, [""], []):
        with pytest.raises(ValueError, match="key"):
            LanceStore(tmp_path / "new", keys=bad)
    assert not (tmp_path / "new").exists()


def test_records_cannot_be_exchanged_or_changed(tmp_path):
    store = filled(tmp_path / "s")
    store._table.replace(
        [{"key": entry(0).key.id, "header": row["header"]} for row in store._table.look_up([entry(1).key.id], ["header"])],
        ["header"],
    )  # fmt: skip
    again = LanceStore(tmp_path / "s", keys=KEY)
    with pytest.raises(StoreError, match="belongs to another passage"):
        again.get_many([entry(0).key])
    (problem,) = verify(again, drop=True)
    assert problem.key == entry(0).key.id
    assert again.missing([entry(0).key])


def test_plain_stores_stay_plain_and_are_copied_into_encrypted_ones(tmp_path, monkeypatch):
    plain = LanceStore(tmp_path / "plain")
    plain.put_many([entry(i) for i in range(4)])
    with pytest.raises(ValueError, match="not encrypted"):
        LanceStore(tmp_path / "plain", keys=KEY)
    monkeypatch.setenv("NUTGRAF_STORE_KEY", KEY)
    with pytest.raises(ValueError, match="not encrypted"):
        LanceStore(tmp_path / "plain", encrypt=True)
    monkeypatch.delenv("NUTGRAF_STORE_KEY")
    with pytest.raises(ValueError, match="not encrypted"):
        rotate(plain)
    monkeypatch.setenv("NUTGRAF_STORE_KEY", KEY)
    assert not LanceStore(tmp_path / "plain").encrypted
    assert not LanceStore(tmp_path / "other", encrypt=False).encrypted
    target = LanceStore(tmp_path / "copy")
    assert target.encrypted
    assert copy(plain, target) == 4
    assert same(target)


def test_keys_are_replaced_without_loss_and_the_old_one_can_go(tmp_path):
    filled(tmp_path / "s")
    both = LanceStore(tmp_path / "s", keys=[OTHER, KEY])
    assert rotate(both) == 5
    assert rotate(both) == 0
    compact(both, 0.0)
    new = LanceStore(tmp_path / "s", keys=OTHER)
    assert same(new)
    assert {held.text for held in new.entries()} == {SECRET * 2, *(entry(i).text for i in range(4))}
    assert verify(new) == []
    with pytest.raises(StoreError, match="encrypted with the key"):
        LanceStore(tmp_path / "s", keys=KEY).get_many([entry(0).key])


def test_keys_are_not_replaced_while_the_store_is_compacted(tmp_path):
    filled(tmp_path / "s")
    both = LanceStore(tmp_path / "s", keys=[OTHER, KEY])
    with open(tmp_path / "s" / ".compacting", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="being compacted"):
            rotate(both)
    assert same(both)
    assert rotate(both) == 5


class Killed(BaseException):
    """What nothing catches."""


def test_a_rotation_that_is_cut_off_loses_nothing_and_goes_on(tmp_path, monkeypatch):
    """It ends between the batches, and between the slots of a batch and its rows."""
    monkeypatch.setattr(upkeep, "_BATCH", 2)
    filled(tmp_path / "s", 6).close()
    for ends_at in (1, 2, 3):
        both = LanceStore(tmp_path / "s", keys=[OTHER, KEY])
        calls = iter(range(1, 10))

        def replace(*given, real=both._table.replace, calls=calls, ends_at=ends_at):
            if next(calls) == ends_at:
                raise Killed
            real(*given)

        monkeypatch.setattr(both._table, "replace", replace)
        with pytest.raises(Killed):
            rotate(both)
        assert same(LanceStore(tmp_path / "s", keys=[KEY, OTHER]), 6)
    both = LanceStore(tmp_path / "s", keys=[OTHER, KEY])
    assert rotate(both) == 1  # 7 passages, of which the cut-off runs did 0, 2 and 4
    compact(both, 0.0)
    assert same(LanceStore(tmp_path / "s", keys=OTHER), 6)


def test_the_command_line_makes_and_replaces_keys(tmp_path, monkeypatch):
    first, second = new_key(), CliRunner().invoke(app, ["store", "new-key"]).output.strip()
    assert len(base64.b64decode(second)) == 32
    monkeypatch.setenv("NUTGRAF_STORE_KEY", first)
    LanceStore(tmp_path / "s").put_many([entry(0)])
    shown = CliRunner().invoke(app, ["store", "show", str(tmp_path / "s")]).output
    assert "encrypted: True" in " ".join(shown.split())
    monkeypatch.setenv("NUTGRAF_STORE_KEY", f"{second}, {first}")
    done = CliRunner().invoke(app, ["store", "rotate", str(tmp_path / "s")])
    assert "1 passages encrypted anew" in done.output
    monkeypatch.setenv("NUTGRAF_STORE_KEY", secrets.token_hex(32))
    told = CliRunner().invoke(app, ["store", "verify", str(tmp_path / "s")])
    assert told.exit_code == 2
    assert "encrypted with the key" in told.output
    assert json.dumps(first)[1:-1] not in told.output
