"""Teacher logits on disk: the same distillation as with a live teacher, reused, never half-written, never another's."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from nutgraf.compressors.objectives.distillation import KLDistillationLoss
from nutgraf.compressors.objectives.teacher import TeacherLogits
from nutgraf.recipes.tasks.compressor import CompressorTask
from nutgraf.recipes.tasks.module import CompressorModule
from nutgraf.recipes.tasks.teacher_cache import TeacherCache
from nutgraf.recipes.training.schema import parse_recipe
from nutgraf.recipes.training.trainer import run_recipe

ROWS, WIDTH, VOCABULARY = 40, 8, 53


def entry(rows: int, seed: int = 0, k: int = 4) -> TeacherLogits:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, WIDTH, generator=generator)
    return TeacherLogits.of(logits, lambda h: h @ torch.ones(WIDTH, VOCABULARY).cumsum(1).cos(), k)


def cache(folder: Path, teacher: str = "t", k: int = 4, **changes: object) -> TeacherCache:
    return TeacherCache(folder, teacher=teacher, top_k=k, **changes)  # type: ignore[arg-type]


def same(a: TeacherLogits | None, b: TeacherLogits) -> bool:
    return a is not None and torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs)


# -- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [7, 100])
def test_kept_logits_give_the_live_divergence(temperature: float, chunk: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, VOCABULARY, dtype=torch.float64)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    weights = torch.rand(ROWS, dtype=torch.float64)

    def head(h: torch.Tensor) -> torch.Tensor:
        return h @ weight

    live = KLDistillationLoss(head, temperature, top_k=6, chunk=chunk)
    kept = TeacherLogits.of(teacher, head, 6, temperature)
    wanted = torch.autograd.grad(live(hidden, teacher, weights), hidden)[0]
    assert torch.allclose(live(hidden, kept, weights), live(hidden, teacher, weights), atol=1e-12)
    assert torch.allclose(torch.autograd.grad(live(hidden, kept, weights), hidden)[0], wanted, atol=1e-12)


def test_what_the_tail_loses_is_what_is_stated() -> None:
    torch.manual_seed(0)
    weight = 2 * torch.randn(WIDTH, VOCABULARY, dtype=torch.float64)
    hidden, teacher = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    kept = TeacherLogits.of(teacher, lambda h: h @ weight, 5)
    p, q = (teacher @ weight).softmax(-1), (hidden @ weight).softmax(-1)
    rest = torch.ones_like(p).scatter(-1, kept.ids, 0.0)
    tail_p, tail_q = (p * rest).sum(-1), (q * rest).sum(-1)
    inside = (rest * p / tail_p[:, None] * ((p / tail_p[:, None]) / (q / tail_q[:, None])).log()).sum(-1)
    loss = KLDistillationLoss(lambda h: h @ weight)
    lost = loss(hidden, teacher) - loss(hidden, kept)
    assert 0 < lost == pytest.approx(float((tail_p * inside).mean()), abs=1e-10)
    assert torch.allclose(kept.logprobs.exp().sum(-1), torch.ones(ROWS, dtype=torch.float64))
    with pytest.raises(ValueError, match="below the vocabulary"):
        TeacherLogits.of(teacher, lambda h: h @ weight, VOCABULARY)
    with pytest.raises(ValueError, match="same target positions"):
        loss(hidden, kept[:3])


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_entries_come_back_and_are_written_in_few_files(tmp_path: Path) -> None:
    made = {TeacherCache.key(f"prompt {n}", [n], "float32"): entry(n % 5 + 1, n) for n in range(30)}
    first = cache(tmp_path, rows=32)
    for key, value in made.items():
        assert first.get([key]) == [None]
        first.put(key, value)
        assert same(first.get([key])[0], value)
    first.flush()
    first.flush()  # nothing more to write
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    again = cache(tmp_path)
    assert len(again) == 30
    assert all(same(found, value) for found, value in zip(again.get(list(made)), made.values()))
    assert again.get([b"0" * 16]) == [None]
    assert (again.hits, again.misses) == (30, 1)
    again.put(next(iter(made)), entry(9))
    again.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # what is there is not written again
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 90 * (8 * 4 + 4) + 30 * 24 + 3 * 600


def test_the_key_is_prompt_target_and_dtype() -> None:
    key = TeacherCache.key("a b", [1, 2], "float32")
    assert key == TeacherCache.key("a b", (1, 2), "float32")  # type: ignore[arg-type]
    others = [("a  b", [1, 2], "float32"), ("a b", [12], "float32"), ("a b", [1, 2], "bfloat16")]
    assert len({key, *(TeacherCache.key(*other) for other in others)}) == 4


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    first = cache(tmp_path)
    first.put(b"k" * 16, entry(2))
    first.flush()
    for changes, name in (
        ({"teacher": "u"}, "teacher is 't' there"),
        ({"k": 5}, "top_k"),
        ({"temperature": 2.0}, "temp"),
    ):
        with pytest.raises(ValueError, match=f"logits of another teacher: {name}"):
            cache(tmp_path, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps 4 tokens"):
        first.put(b"n" * 16, entry(2, k=5))
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        cache(tmp_path)
    file.unlink()
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        cache(tmp_path)
    (tmp_path / "about.json").unlink()
    assert len(cache(tmp_path, "u")) == 0


def write_for_ever(folder: Path, made: TeacherLogits) -> None:
    writer = cache(folder, rows=64)
    n = 0
    while True:
        writer.put(n.to_bytes(16, "big"), made)
        n += 1


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_files_alone(tmp_path: Path) -> None:
    made = entry(8)
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path, made))
    writer.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.safetensors"))) < 20:
        assert writer.is_alive()
        assert time.monotonic() < deadline
    writer.kill()
    writer.join()
    left = cache(tmp_path)
    assert len(left) >= 20 * 8
    assert len(left) % 8 == 0  # files of 64 rows hold 8 entries each
    assert all(same(found, made) for found in left.get([n.to_bytes(16, "big") for n in range(len(left))]))


# -- in a recipe -----------------------------------------------------------------------------------------------------


def recipe(folder: Path, **stage: object):  # type: ignore[no-untyped-def]
    rows = [
        {"id": str(n), "question": f"Who lives in {city}?", "answers": [who], "passages": [{"title": "", "text": text}]}
        | {"gold": 0, "source": "toy"}
        for n, (city, who) in enumerate([("Bergen", "Ada"), ("Lima", "Ivar"), ("Perth", "Nora")])
        for text in [f"{who} lives in {city} by the river, in a house of {n + 2} rooms with a garden."]
    ]
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = {"name": "answers", "steps": 3, "batch_size": 3, "lr": 1e-2, "precision": "fp32", "mix": {"human": 1.0}}
    base |= {"objectives": {"kl": 1.0}, "teacher_top_k": 16, "save_every": 2, "log_every": 1}
    data = {"dir": str(folder), "questions": ["qa.jsonl"], "max_chars": 300}
    made = {"name": "toy", "kind": "compressor", "reader": "unused", "data": data, "stages": [{**base, **stage}]}
    return parse_recipe({**made, "compressor": {"method": "icae", "mem_size": 16, "r": 2}})


@pytest.mark.slow
def test_a_recipe_trains_the_same_from_the_cache(tmp_path: Path, zoo, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    reader = zoo.reader("llama")
    folder = str(tmp_path / "logits")

    def losses(out: str, **stage: object) -> list[float]:
        made = recipe(tmp_path, **stage)
        run_recipe(made, CompressorTask(made, reader), tmp_path / out)
        return [json.loads(line)["loss"] for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]

    live = losses("live")
    assert losses("filling", teacher_cache=folder) == pytest.approx(live, rel=1e-4)
    assert list((tmp_path / "logits").glob("*.safetensors"))

    def asleep(self: object, *args: object) -> list[torch.Tensor]:
        raise AssertionError("The teacher was asked although everything is in the cache.")

    monkeypatch.setattr(CompressorModule, "teacher_hidden", asleep)
    assert losses("filled", teacher_cache=folder) == pytest.approx(live, rel=1e-4)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="top_k is 16 there and 8 here"):
        losses("other", teacher_cache=folder, teacher_top_k=8)
    made = recipe(tmp_path, teacher_cache=folder)
    with pytest.raises(ValueError, match="another teacher: teacher is"):
        CompressorTask(made, zoo.reader("llama", seed=1)).begin_stage(made.stages[0])


def test_a_cache_needs_few_tokens_and_distillation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_top_k"):
        recipe(tmp_path, teacher_cache="x", teacher_top_k=None)
    with pytest.raises(ValueError, match="give an objective with a teacher"):
        recipe(tmp_path, teacher_cache="x", objectives={"lm": 1.0})
    with_cache, without = recipe(tmp_path, teacher_cache="x"), recipe(tmp_path)
    assert with_cache.identity() == without.identity()  # where it lies changes nothing of what is trained
    assert math.isfinite(without.stages[0].lr)
