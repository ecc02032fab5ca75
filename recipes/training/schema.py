"""Recipes: the schema of the YAML files, and how one is found, overridden and checked.

A recipe has a name, a kind (what it trains), its data and a list of stages. Every key is checked: an unknown one is refused
with the nearest key that exists, so no setting is silently ignored.

Example:
    >>> recipe = load_recipe("xrag", ["stages.0.steps=20", "data.dir=corpus", "stages.*.lr=1e-3"])
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...compressors import COMPRESSORS, SoftCompressor
from ...compressors.core.textfiles import check_strings
from ...compressors.objectives.registry import OBJECTIVES, needs_teacher
from ..tasks.registry import KINDS
from .yaml_values import load_yaml, parse_value

_RECIPES = __name__.rsplit(".", 2)[0]  # the package that holds the YAML files
Positive = Annotated[int, Field(gt=0)]
Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Span(_Strict):
    """A closed range: compression ratios are drawn log-uniformly, passage counts uniformly."""

    min: float = Field(gt=0)
    max: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Span:
        if self.max < self.min:
            raise ValueError(f"a range needs min <= max; got min={self.min:g} and max={self.max:g}")
        return self


class StopWhen(_Strict):
    """Ends the stage once a logged or evaluated metric passes a threshold `patience` times in a row."""

    metric: str
    below: float | None = None
    above: float | None = None
    patience: Positive = 1

    @model_validator(mode="after")
    def _one_side(self) -> StopWhen:
        if (self.below is None) == (self.above is None):
            raise ValueError("stop_when needs exactly one of below and above")
        return self

    def reached(self, value: float) -> bool:
        """Whether `value` is past the threshold."""
        return value < self.below if self.below is not None else value > float(self.above or 0.0)


class Stage(_Strict):
    """A stretch of training with one mix of objectives and one optimiser.

    Attributes:
        steps: optimiser steps. `batch_size` is per device and accumulation step.
        warmup: optimiser steps of linear warm-up, or a share of `steps` if below 1.
        schedule: after the warm-up. `wsd` holds the rate, then lowers it linearly in the last `decay` share of steps.
        min_lr: final rate, as a share of `lr`.
        precision: `auto` is bfloat16 autocast if the device supports it, else float32.
        trainable: parts that train, named by the task (`projector`, `lora`, `all`, ...).
        objectives: weights of registered objectives (`ae`, `lm`, `kl`, `match`, ...) or of the method's own.
        temperature, teacher_top_k: settings of distillation.
        reverse_kl: share of the reverse divergence in distillation.
        teacher_cache: folder that stores the teacher's `teacher_top_k` most likely tokens for reuse.
        ratios: compression ratios to draw from, one per batch; None: the compressor's own.
        passages: number of passages in a prompt; a number, a list to draw from or a range.
        mix: kinds of training items, named by the task, each with its weight or settings.
        log_every, save_every, eval_every: in optimiser steps; `eval_every` None never evaluates.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    steps: Positive
    batch_size: Positive = 8
    accumulate: Positive = 1
    lr: float = Field(gt=0)
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    warmup: float = Field(default=0.03, ge=0)
    decay: float = Field(default=0.2, gt=0, le=1)
    min_lr: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = Field(default=1.0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    trainable: str | list[str] = "all"
    objectives: dict[str, Annotated[float, Field(ge=0)]] = {}
    temperature: float = Field(default=1.0, gt=0)
    teacher_top_k: Positive | None = None
    reverse_kl: float = Field(default=0.0, ge=0, le=1)
    teacher_cache: str | None = None
    ratios: Annotated[list[Annotated[float, Field(ge=1)]], Field(min_length=1)] | Span | None = None
    passages: Positive | Annotated[list[Positive], Field(min_length=1)] | Span = 1
    mix: dict[str, Any] = {}
    stop_when: StopWhen | None = None
    log_every: Positive = 10
    save_every: Positive = 200
    eval_every: Positive | None = None

    @model_validator(mode="after")
    def _cache_of_few(self) -> Stage:
        active = [name for name, weight in self.objectives.items() if weight]
        if self.teacher_cache is not None and (self.teacher_top_k is None or not needs_teacher(active)):
            raise ValueError(
                "teacher_cache keeps the teacher's most likely tokens: give an objective with a teacher (kl) a weight, and set "
                "teacher_top_k (64, say)"
            )
        return self

    @property
    def warmup_steps(self) -> int:
        """Optimiser steps of warm-up."""
        return round(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)


class Checkpoints(_Strict):
    """Number of checkpoints of a run that stay on disk (`keep`)."""

    keep: Positive = 2


class Output(_Strict):
    """The finished artefact: `folder` inside the run's folder, weights stored as `dtype` (None: as trained)."""

    folder: str = Field(default="final", pattern=r"^[A-Za-z0-9_.-]*[A-Za-z0-9_-]$")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` as a torch dtype."""
        return None if self.dtype is None else getattr(torch, self.dtype)


class Recipe(_Strict):
    """Everything that one training run needs. See `Stage` for the stages.

    Attributes:
        kind: what trains: `compressor`, `tokens` (a token classifier), `reader` or `inversion` (an attacker); see
            `tasks.registry`.
        reader: of all but reader recipes: folder, hub id or the name of a shipped reader.
        compressor: compressor and token recipes: `method` and the settings of that method's config.
        model, tokenizer: reader and inversion recipes: settings of the task.
        data: folder (`dir`) and files; checked by the task.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    kind: str
    description: str = ""
    seed: int = Field(default=0, ge=0)
    data: dict[str, Any] = {}
    reader: str | None = None
    compressor: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    output: Output = Output()
    checkpoints: Checkpoints = Checkpoints()
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {twice[0]!r}; stage names must differ")
        if self.kind not in KINDS:
            raise ValueError(f"there is no kind {self.kind!r} of recipes{_nearest(self.kind, KINDS, 'kinds')}")
        kind = KINDS[self.kind]
        missing = [key for key in kind.sections if getattr(self, key) is None]
        if "compressor" in kind.sections and "method" not in (self.compressor or {}):
            raise ValueError(f"a recipe of kind {self.kind!r} needs compressor.method")
        if missing:
            raise ValueError(f"a recipe of kind {self.kind!r} needs {missing[0]}")
        if kind.objectives:
            self._check_objectives()
        return self

    def _check_objectives(self) -> None:
        cls = COMPRESSORS.get((self.compressor or {})["method"])
        own = cls.own_objectives() if cls is not None and issubclass(cls, SoftCompressor) else {}
        known = [*OBJECTIVES, *own]
        for stage in self.stages:
            if unknown := [name for name in stage.objectives if name not in known]:
                raise ValueError(
                    f"stage {stage.name!r} names the objective {unknown[0]!r}{_nearest(unknown[0], known, 'objectives')}"
                )
            if not any(stage.objectives.values()):
                raise ValueError(f"stage {stage.name!r} needs objectives with at least one weight above 0")

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share: all but paths, logging and saving intervals."""
        whole = self.model_dump(mode="json", exclude={"output", "checkpoints", "description"})
        whole["data"].pop("dir", None)
        for stage in whole["stages"]:
            for key in ("log_every", "save_every", "teacher_cache"):
                stage.pop(key)
            if not stage["reverse_kl"]:  # later than the first recipes, whose runs still resume
                stage.pop("reverse_kl")
        return whole


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files(_RECIPES)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies overrides and checks it.

    Args:
        name_or_path: name of a shipped recipe or path of a YAML file.
        overrides: `key=value`, with dots for nesting and YAML values: `stages.0.steps=200` (also `stage.`, or the stage's
            name instead of its number, or `*` for every stage), `data.dir=corpus`, `seed=3`.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if a key is unknown (names the nearest known one) or a value has the wrong type.
    """
    where = str(name_or_path)
    path = Path(name_or_path)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif where in recipe_names():
        text = (resources.files(_RECIPES) / f"{where}.yaml").read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(f"There is no recipe {where!r}: no such file, and the package ships {recipe_names()}.")
    raw = load_yaml(text, where)
    for override in check_strings("overrides", overrides, "key=value settings"):
        _apply(raw, override)
    return parse_recipe(raw, where)


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Checks a recipe given as plain data; ValueError with one clause per problem."""
    return validate(Recipe, raw, where)


def validate(model: type[Model], raw: dict[str, Any], where: str, section: str = "") -> Model:
    """Validates `raw` as a `model`; ValueError with one clause per problem, unknown keys with the nearest known one.

    Args:
        where: name of the recipe in messages.
        section: key of the recipe that holds `raw`.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        clauses = [_explain(detail, model, section) for detail in error.errors()]
        raise ValueError(f"The recipe {where!r} cannot be used: {'; '.join(dict.fromkeys(clauses))}.") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with defaults."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets one `key=value` in `raw`; refuses unknown keys."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError(f"The override {override!r} is not of the form key=value, such as stages.0.steps=200.")
    if parts[0] == "stage":
        parts[0] = "stages"
    if parts[0] not in Recipe.model_fields:
        hint = _nearest(parts[0], Recipe.model_fields)
        raise ValueError(f"The override {override!r} names no key of a recipe{hint}.")
    value = parse_value(text)
    if parts[0] == "stages" and len(parts) > 1:
        for stage in _stages(raw, parts[1], override):
            if len(parts) < 3 or parts[2] not in Stage.model_fields:
                hint = _nearest(parts[2] if len(parts) > 2 else "", Stage.model_fields)
                raise ValueError(f"The override {override!r} names no key of a stage{hint}.")
            _put(stage, parts[2:], value, override)
    else:
        _put(raw, parts, value, override)


def _stages(raw: dict[str, Any], which: str, override: str) -> list[dict[str, Any]]:
    stages = raw.get("stages") or []
    if which == "*":
        return stages
    if which.isdigit() and int(which) < len(stages):
        return [stages[int(which)]]
    if found := [stage for stage in stages if stage.get("name") == which]:
        return found
    have = ", ".join(f"{number} ({stage.get('name')})" for number, stage in enumerate(stages))
    raise ValueError(f"The override {override!r} names stage {which!r}; the recipe's stages are {have}.")


def _put(target: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    for part in parts[:-1]:
        inner = target.setdefault(part, {})
        if inner is None:
            inner = target[part] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"The override {override!r} goes into {part!r}, which holds {inner!r} and no keys.")
        target = inner
    target[parts[-1]] = value


def _nearest(key: str, known: Iterable[str], what: str = "keys") -> str:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known {what} are {', '.join(known)}"


def _explain(detail: Any, model: type[BaseModel], section: str) -> str:
    """Turns one pydantic error into a clause."""
    location = [part for part in detail["loc"] if isinstance(part, int) or part.isidentifier()]
    where = ".".join(map(str, [*([section] if section else []), *location])) or "recipe"
    if detail["type"] == "extra_forbidden":
        if model is Recipe and len(location) > 1:
            sections: dict[Any, type[BaseModel]] = {"stages": Stage, "output": Output, "checkpoints": Checkpoints}
            model = sections.get(location[0], Recipe)
            model = StopWhen if "stop_when" in location[:-1] else model
        key = str(detail["loc"][-1])
        if not key.isidentifier():
            where = f"{key!r:.60}" if where == "recipe" else f"{key!r:.60} in {where}"
        return f"unknown key {where}{_nearest(key, model.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if detail["type"] in ("missing", "value_error"):
        return f"{where}: {message}"
    return f"{where}: {message}, got {detail['input']!r}"
