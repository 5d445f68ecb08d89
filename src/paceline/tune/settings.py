"""The section `tune:` of a recipe: what a study searches, how, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from paceline.errors import nearest
from paceline.recipe.mistakes import Mistakes, suggestion
from paceline.recipe.schema import Seed, different_seeds

Direction = Literal["min", "max"]
SECTION = "tune"
_WORDS = {"minimize": "min", "maximize": "max", "minimise": "min", "maximise": "max"}


def _direction(value: Any) -> Any:
    if isinstance(value, list):
        return [_direction(one) for one in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _typed(value: Any) -> Any:
    """`tpe` stands for `{type: tpe}`."""
    return {"type": value} if isinstance(value, str) else value


def _with_type(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("type"), str):
        raise ValueError("expected `type:` and its arguments")
    return value


Chosen = Annotated[
    dict[str, Any], pydantic.BeforeValidator(_typed), pydantic.AfterValidator(_with_type)
]
Metrics = str | Annotated[list[str], pydantic.Field(min_length=1)]
Directions = Annotated[
    Direction | Annotated[list[Direction], pydantic.Field(min_length=1)],
    pydantic.BeforeValidator(_direction),
]
Count = Annotated[int, pydantic.Field(ge=1)]


class TuneSettings(pydantic.BaseModel):
    """The settings of a study.

    Attributes:
        metric: the validation metric that is optimised, or several.
        direction: "min" or "max", for each metric.
        value: whether a trial's value is that of its last validation or of its best one.
        trials: how many, over all starts and workers; trials that go on after they were pruned
            (`--revive`) are not counted.
        timeout: seconds after which a start begins no further trial; None for no limit.
        sampler: `type:` and arguments of what suggests the values.
        pruner: `type:` and arguments of what ends trials early.
        seeds: each trial trains one run for each of them; None for one run with the recipe's seed.
        over_seeds: what a trial's value is of those of its seeds: their mean, or the worst.
        storage: where the trials are kept; None for `study.db` in the study's folder.
        first: values of parameters, by dotted key, that the first trials take.
        max_failures: the study ends once as many trials in a row have failed.
        max_restarts: how often a trial whose worker process died is tried again.
        audit: the share of pruned trials that is trained to the end nevertheless, to measure what
            pruning costs.
        reports: at as many equal shares of a trial's steps trials are compared by the pruner.
        space: what is searched: a parameter for each dotted key of the recipe.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    metric: Metrics = "val/loss"
    direction: Directions = "min"
    value: Literal["last", "best"] = "last"
    trials: Count = 20
    timeout: Annotated[float, pydantic.Field(gt=0)] | None = None
    sampler: Chosen = {"type": "tpe"}
    pruner: Chosen = {"type": "none"}
    seeds: Annotated[list[Seed], pydantic.AfterValidator(different_seeds)] | None = None
    over_seeds: Literal["mean", "worst"] = "mean"
    storage: str | None = None
    first: list[dict[str, Any]] = []
    max_failures: Count = 5
    max_restarts: Annotated[int, pydantic.Field(ge=0)] = 3
    audit: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    reports: Count = 20
    space: dict[str, Any] = {}

    @property
    def metrics(self) -> list[str]:
        """The metrics, one or several."""
        return [self.metric] if isinstance(self.metric, str) else list(self.metric)

    @property
    def directions(self) -> list[Direction]:
        """A direction for each metric; one that is given alone holds for all of them."""
        if isinstance(self.direction, str):
            return [self.direction] * len(self.metrics)
        return list(self.direction)


def read_settings(section: Mapping[str, Any], mistakes: Mistakes, *, at: str = SECTION) -> Any:
    """Reads a section `tune:`.

    Args:
        section: its plain values.
        mistakes: collects what is wrong.
        at: the section's name; empty for settings that are given in Python.

    Returns:
        The `TuneSettings`, with defaults in place of what is wrong.
    """
    values = dict(section)
    place = (at,) if at else ()
    while True:
        try:
            settings = TuneSettings.model_validate(values)
            break
        except pydantic.ValidationError as error:
            for part in error.errors():
                path = tuple(str(key) for key in part["loc"])
                # Behind a union pydantic adds the name of the alternative.
                known = path[:1] if path[0] in ("metric", "direction") else path
                mistakes.add((*place, *known), _said(path, part, values))
                values.pop(path[0], None)
    _check_together(settings, place, mistakes)
    return settings


def _said(path: tuple[str, ...], part: Any, values: Mapping[str, Any]) -> str:
    if part["type"] == "extra_forbidden":
        return f"there is no such key{suggestion(path[-1], TuneSettings.model_fields)}"
    if path[0] == "direction":
        known = ["min", "max"]
        near = nearest(str(values.get("direction")), known)
        return f"expected 'min' or 'max', got {values.get('direction')!r}{near}"
    if part["type"] == "value_error":
        return f"{part['msg'].removeprefix('Value error, ')}, got {part['input']!r}"
    return f"{part['msg'].replace('Input should be', 'expected')}, got {part['input']!r}"


def _check_together(settings: TuneSettings, place: tuple[str, ...], mistakes: Mistakes) -> None:
    """Settings that exclude each other."""
    count = len(settings.metrics)
    if len(settings.directions) != count:
        mistakes.add(
            (*place, "direction"),
            f"expected one for each of the {count} metrics, got {len(settings.directions)}.",
        )
    if len(set(settings.metrics)) != count:
        mistakes.add((*place, "metric"), f"a metric is there twice: {settings.metrics}.")
    kind = settings.pruner["type"]
    if count > 1 and kind != "none":
        mistakes.add(
            (*place, "pruner"),
            f"{kind!r} compares trials by one metric, and `metric:` has {count}: leave it out "
            "(`{type: none}`).",
        )
    if kind == "wilcoxon" and len(settings.seeds or ()) < 2:
        mistakes.add(
            (*place, "pruner"), "'wilcoxon' compares the seeds' values: give `seeds:`, at least 2."
        )
    if settings.audit and kind == "none":
        mistakes.add((*place, "audit"), "nothing is pruned: choose a `pruner:`, or leave it out.")
