"""A run that is killed, at any moment, and started again ends with the log and the weights of one that never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nutgraf.recipes.training.checkpoints import CheckpointStore, Progress, checkpoint_name, replacing_folder
from nutgraf.recipes.training.run import only_run

DRIVER = Path(__file__).parent / "resume_driver.py"
TEXT = "# Rain\n\n" + "\n\n".join(
    f"In the year 19{n} the town of Bergen had rain on {n * 2} days, and Ivar measured it. The rain fell on hill {n}."
    for n in range(10, 30)
)
# Each point at an early call and at a later one: in the first stage's first checkpoint, in a later one, between stages.
MOMENTS = [
    ("forward", 5),
    ("weights", 2),
    ("sync", 4),
    ("rename", 2),
    ("optimiser", 2),
    ("delete", 5),
    ("log", 2),
]


def drive(folder: Path, runs) -> list:
    """Run the driver; one entry a child: its run, its moment, its exit status, the files it left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run(
        [sys.executable, str(DRIVER), str(folder)],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def curve(out: Path) -> list:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s")} for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_like_whole_ones(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    chance = random.Random(0)
    anywhere = (chance.choice(["forward", "sync"]), chance.randint(1, 6))
    children = drive(tmp_path, {"whole": [], "killed": [*MOMENTS, anywhere]})
    statuses = [status for *_, status, _ in children]
    assert statuses.count(-signal.SIGKILL) >= 6  # a later moment may lie behind the end of the run
    assert statuses[-1] == 0
    assert any(".partial-" in name for *_, names in children[:-1] for name in names)  # a checkpoint was cut off
    assert not any(".partial-" in name for name in children[-1][-1])
    whole, killed = curve(tmp_path / "whole"), curve(tmp_path / "killed")
    assert [row["step"] for row in whole] == [3, 6, 7, 3, 6, 7]
    assert killed == whole
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_half_written_checkpoints_do_not_count(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    for step in (5, 10, 15):
        content = store.partial("work")
        content.mkdir(parents=True)
        Progress(stage=0, step=step, window={"loss": [0.1 + 0.2]}).write(content)
        store.publish(content, checkpoint_name(0, "only", step))
    (tmp_path / checkpoint_name(0, "only", 20)).mkdir()  # no progress: not one of ours
    half = store.partial(checkpoint_name(0, "only", 25))
    half.mkdir()
    Progress(step=25).write(half)
    assert store.latest() == tmp_path / "00-only-0000015"
    store.prune(2)
    assert [path.name for path in store.all()] == ["00-only-0000010", "00-only-0000015"]
    store.clean()
    assert not half.exists()
    assert Progress.read(store.latest()).window == {"loss": [0.1 + 0.2]}
    store.clear()
    assert store.all() == []


def test_a_failed_save_leaves_the_old_artefact(tmp_path):
    target = tmp_path / "final"
    for value in ("old", "new"):
        with replacing_folder(target) as folder:
            (folder / "weights").write_text(value)
    assert (target / "weights").read_text() == "new"

    def fail():
        with replacing_folder(target) as folder:
            (folder / "weights").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (target / "weights").read_text() == "new"


HOLDER = """
import sys
from pathlib import Path
from nutgraf.recipes.training.run import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_one_process_trains_in_a_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"Another process trains in .*run"), only_run(tmp_path / "run"):
            pass
        with only_run(tmp_path / "other"):
            pass
        holder.kill()
        holder.wait()
    with only_run(tmp_path / "run"):
        pass
