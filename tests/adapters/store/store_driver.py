"""Writers of a store that are killed, that race, and that may not write; run by test_store_faults in a process of its own.

Importing torch takes long, so one process forks all of them. It touches no store before it has forked the last one.

    python store_driver.py FOLDER KILLS  -> one JSON object: what happened
"""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from nutgraf import CompressedPassage
from nutgraf.adapters.store import Entry, LanceStore, PassageKey, StoreError
from nutgraf.adapters.store.upkeep import compact, verify

BATCH = 3


def entry(number: int, slots: int = 4, width: int = 64) -> Entry:
    """A passage that follows from its number alone."""
    text = f"passage {number}"
    embeds = torch.randn(slots + number % 3, width, generator=torch.Generator().manual_seed(number))
    passage = CompressedPassage("embeds", 4 * slots, "compressor", "reader", embeds=embeds)
    return Entry(PassageKey.of(text, compressor="compressor", reader="reader"), passage, text)


def right(store: LanceStore, numbers: list[int]) -> list[int]:
    """Those of the passages that are not there, or not as they were put."""
    wanted = [entry(number) for number in numbers]
    found = store.get_many([one.key for one in wanted])
    same = [got is not None and torch.equal(got.embeds, one.passage.embeds) for got, one in zip(found, wanted)]
    return [number for number, good in zip(numbers, same) if not good]


def fork(work: Callable[[], None]) -> int:
    """Runs ``work`` in a child; its exit status says whether it came to its end."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def write_for_ever(folder: Path, first: int, ready: int, acknowledged: Path, compacting: bool) -> None:
    """Puts batch after batch, and notes each that was acknowledged."""
    log = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if compacting:
        os.write(ready, b"r")  # this one may be killed while it opens the store, or makes it
    store = LanceStore(folder)
    os.write(ready, b"r")
    for batch in range(10_000):
        numbers = list(range(first + batch * BATCH, first + (batch + 1) * BATCH))
        store.put_many([entry(number) for number in numbers])
        os.write(log, (json.dumps(numbers) + "\n").encode())
        if compacting and batch % 3 == 2:
            try:
                compact(store)
            except StoreError as error:
                if "another process" not in str(error):
                    raise


def kill_writers(folder: Path, kills: int, seed: int = 0) -> dict:
    """Kills one writer after the other at random moments, two at a time; what is there afterwards."""
    rng = random.Random(seed)
    acknowledged = folder.with_suffix(".acknowledged")
    crashed = 0
    for kill in range(0, kills, 2):
        children = []
        for one in range(2):
            out, ready = os.pipe()
            first = (kill + one) * 100_000
            work = lambda f=first, r=ready, c=bool(one): write_for_ever(folder, f, r, acknowledged, c)  # noqa: E731
            children.append(fork(work))
            os.read(out, 1)
            os.close(out)
            os.close(ready)
        for child in children:
            time.sleep(rng.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
            crashed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL
    lines = acknowledged.read_text().splitlines() if acknowledged.exists() else []
    return {"crashed": crashed, "acknowledged": [number for line in lines for number in json.loads(line)]}


def race(folder: Path, writers: int = 3, batches: int = 6) -> list[int]:
    """Exit statuses of writers that put the same passages, and some of their own, at the same time."""

    def work(writer: int) -> None:
        store = LanceStore(folder)
        for batch in range(batches):
            own = 1000 * (writer + 1) + batch
            store.put_many([entry(batch), entry(own)])
            if writer == 0:
                compact(store)

    children = [fork(lambda w=writer: work(w)) for writer in range(writers)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def read_only(folder: Path) -> dict:
    """What a user without the right to write sees. This process gives its own rights up, so it comes last."""
    LanceStore(folder).put_many([entry(1)])
    for path in [folder, *folder.rglob("*")]:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o555 | 0o444)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    store = LanceStore(folder)
    out = {"wrong": right(store, [1]), "read_only": store.read_only, "passages": store.stats.passages}
    for name, attempt in (
        ("put", lambda: store.put_many([entry(2)])),
        ("compact", lambda: compact(store)),
        ("new", lambda: LanceStore(folder / "new").put_many([entry(2)])),
    ):
        try:
            attempt()
            out[name] = "it was written"
        except StoreError as error:
            out[name] = str(error)
    return out


def main() -> None:
    """Runs everything and prints it."""
    warnings.simplefilter("ignore")
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    out: dict = {"killed": kill_writers(folder / "killed", kills), "race": race(folder / "race")}
    store = LanceStore(folder / "killed")
    numbers = out["killed"]["acknowledged"]
    out["killed"] |= {
        "wrong": right(store, numbers),
        "problems": [problem.what for problem in verify(store)],
        "before": sum(store._slabs.sizes().values()),
        "duplicates": compact(store, 0.0).duplicates,
        "after": sum(store._slabs.sizes().values()),
        "wrong_after": right(LanceStore(folder / "killed"), numbers),
        "nbytes": store.stats.nbytes,
        "slabs": len(store._slabs.sizes()),
    }
    raced = LanceStore(folder / "race")
    everything = [*range(6), *(1000 * w + b for w in (1, 2, 3) for b in range(6))]
    out["race_wrong"] = right(raced, everything)
    compact(raced)
    out["race_wrong_after"] = right(raced, everything)
    out["race_rows"] = [raced._table._table.count_rows(), len(everything)]
    out["read_only"] = read_only(folder / "read_only")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
