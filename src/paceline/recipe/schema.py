"""The keys of a recipe: settings with their types, and the sections that hold components."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import pydantic

from paceline.recipe.components import signature_of
from paceline.recipe.mistakes import Mistakes, Path, near, suggestion
from paceline.trainer.slots import TRAINER_SLOTS, slots_of
from paceline.trainer.trainer import Trainer

_ELSEWHERE = {
    "save_every_n_steps": "`checkpoint.every_steps`",
    "permanent_save_every_n_steps": "`checkpoint.keep_every_steps`",
    "save_every_n_epochs": "`checkpoint.every_epochs`",
    "save_last_k": "`checkpoint.keep_last`",
    "project_dir": "`run.dir`",
    "exp_dir": "`run.dir`",
    "checkpoint_dir": "`run.dir`, which holds checkpoints/",
    "exp_name": "`run.name`",
    "config_dict": "nothing: the run's folder keeps recipe.yaml",
    "logging_config": "`loggers:`",
    "even_batches": "nothing: each sample counts once, on any number of ranks",
    "warmup_params": "`lr_scheduler: {type: warmup_cosine, warmup: n}`",
    "dump_config": "the command's `--dry-run`",
    "resume_from_checkpoint": "the command's `--resume`",
    "auto_reusme_from_latest_ckpt": "nothing: a run resumes by itself",
    "resume": "the command's `--resume`",
    "init_from": "the command's `--init-from`",
    "run_dir": "`run.dir`",
    "name": "`run.name`",
    "project": "`run.project`",
}
_MAY_BE_EMPTY = ("run", "trainer", "parallel")
_NAME_BYTES = 200  # file systems take 255; runs of several seeds add to the name


def folder_name(value: str) -> str:
    """`value`, if it can be the name of one folder; else a ValueError."""
    if not re.fullmatch(r"[\w.+=,@\[\]-]+", value) or set(value) == {"."}:
        raise ValueError(f"expected the name of one folder, got {value!r}")
    return folder_path(value)


def folder_path(value: str) -> str:
    """`value`, if file systems take it as the path of a folder; else a ValueError."""
    if not value.isprintable():
        raise ValueError(f"expected the path of a folder, got {value!r}")
    longest = max(value.split("/"), key=lambda name: len(name.encode()))
    if len(longest.encode()) > _NAME_BYTES:
        raise ValueError(f"a name may have {_NAME_BYTES} bytes, {longest[:20] + '...'!r} has more")
    return value


def different_seeds(seeds: list[int]) -> list[int]:
    """`seeds`, if there are any and no two are equal; else a ValueError."""
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if not seeds or twice:
        what = (
            f"{', '.join(map(str, twice))} appear more than once" if twice else "the list is empty"
        )
        raise ValueError(f"expected the seeds of different runs; {what}.")
    return seeds


Seed = Annotated[int, pydantic.Field(ge=0)]
FolderName = Annotated[str, pydantic.AfterValidator(folder_name)]
FolderPath = Annotated[str, pydantic.AfterValidator(folder_path)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class RunSection(_Section):
    """`run:`, what the run is called and where it is written.

    Attributes:
        project: by default the recipe file's stem.
        name: one run of the project.
        dir: the run folder; by default `runs/<project>/<name>`.
    """

    project: FolderName | None = None
    name: FolderName = "baseline"
    dir: FolderPath | None = None


class Schema(_Section):
    """The keys of a recipe's top level that hold no component."""

    seed: Seed = 0
    seeds: Annotated[list[Seed], pydantic.AfterValidator(different_seeds)] | None = None
    run: RunSection = RunSection()
    code: str | None = None
    trainer: dict[str, Any] = {}
    parallel: dict[str, Any] = {}
    checkpoint: Any = {}
    tune: dict[str, Any] | None = None  # checked and used by `paceline.tune`


def parse(values: Mapping[str, Any], mistakes: Mistakes) -> Schema:
    """Checks the keys that hold no component.

    Args:
        values: the resolved recipe.
        mistakes: collects the mistakes.

    Returns:
        The keys without mistakes, with defaults for the rest.
    """
    values = {name: values[name] for name in Schema.model_fields if name in values}
    # A section with nothing below it is one without settings.
    values = {
        name: value
        for name, value in values.items()
        if value is not None or name not in _MAY_BE_EMPTY
    }
    if values.get("seed") is not None and values.get("seeds") is not None:
        text = f"there is `seed: {values['seed']}` too; give one of them (`~seed` takes it out)."
        mistakes.add(("seeds",), text)
    while True:
        try:
            return Schema.model_validate(values)
        except pydantic.ValidationError as error:
            for part in error.errors():
                path = tuple(str(key) for key in part["loc"])
                mistakes.add(path, _told(path, part["type"], part["msg"], part["input"]))
                values.pop(path[0], None)


def find_sections(
    values: Mapping[str, Any],
    trainer: type[Trainer] | None,
    own: Collection[str],
    mistakes: Mistakes,
) -> dict[str, Any]:
    """Finds the sections that fill the slots of the recipe's trainer.

    Args:
        values: the resolved recipe.
        trainer: the trainer's class; None if it is not known.
        own: the recipe's own keys, which other keys refer to and which may hold anything.
        mistakes: collects the unknown keys.

    Returns:
        The value of each section that is not null, in the order of the slots.
    """
    slots = slots_of(trainer or Trainer)
    known = [*Schema.model_fields, *slots]
    for name in values:
        if name in known or name in own:
            continue
        # If the trainer is not known, this may be one of its sections.
        text = _meant_key(name, trainer or Trainer, known)
        if text is not None or trainer is not None:
            text = text or suggestion(name, known)
            mistakes.add((name,), f"there is no such key{text}")
    return {name: values[name] for name in slots if values.get(name) is not None}


def foreign(name: str) -> str | None:
    """What another system's key, or one of ours in the wrong place, is called in a recipe."""
    return _ELSEWHERE.get(name)


def _meant_key(name: str, trainer: type[Trainer], known: list[str]) -> str | None:
    """Where an unknown key belongs, or which key it resembles; None if neither is clear."""
    if name in _ELSEWHERE:
        return f"; it is {_ELSEWHERE[name]}."
    if name in signature_of(trainer).named and name not in TRAINER_SLOTS:
        return " here; it belongs under `trainer:`."
    return None if near(name, known) is None else suggestion(name, known)


def _told(path: Path, kind: str, message: str, value: Any) -> str:
    if kind == "extra_forbidden":
        return f"there is no such key{suggestion(path[-1], RunSection.model_fields)}"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return f"{message.replace('Input should be', 'expected')}, got {value!r}"
