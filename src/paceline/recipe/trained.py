"""Loads a trained model from its run: built from the recipe, with a checkpoint's weights."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.checkpoint.engine import Checkpoint
from paceline.checkpoint.export import Weights, find_checkpoint, read_weights
from paceline.checkpoint.native_engine import load_tree
from paceline.checkpoint.state import load_model_state
from paceline.errors import ConfigError
from paceline.log.kept_code import CODE_FOLDER, RECIPE_FILE, folder_of_step
from paceline.log.secrets import MASK
from paceline.recipe.builder import Builder, build_trainer
from paceline.recipe.code import code_apart
from paceline.recipe.compose import compose
from paceline.recipe.parts import each
from paceline.recipe.recipe import Recipe, check
from paceline.world.seeding import seed_everything

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


def load_model(
    run_dir: Path | str,
    *,
    weights: Weights = "auto",
    checkpoint: str = "latest",
    model: str | None = None,
    trust: Collection[str] = (),
) -> torch.nn.Module:
    """Loads the model of a run that was trained from a recipe.

    Unlike commands that only read a run, this imports the code in the run folder: call it only on
    runs that you would train. The code is that which trained the checkpoint, and stays apart from
    modules of the same names that this process has imported. The settings are
    `load_recipe(run_dir / "recipe.yaml")`.

    Args:
        run_dir: the run folder.
        weights: "auto" for the weights that the run validated with, averaged ones if a callback
            swapped them in; "live" for the trained weights, "averaged" for those that a
            callback such as `AveragedWeights` kept.
        checkpoint: "latest", "best" or a name such as "step_00000120".
        model: the model's name, if the recipe has several.
        trust: as for `load_recipe`.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        RecipeError: the recipe has mistakes, or the model cannot be built.
        ConfigError: there is no recipe, no `model:` in it, or no such checkpoint.
        CheckpointError: the checkpoint is damaged, or has no averaged weights.
        MismatchError: the model that was built differs from the saved one.
    """
    if not (Path(run_dir) / RECIPE_FILE).is_file():
        raise ConfigError(
            f"{run_dir} has no {RECIPE_FILE} to build the model from. For a run built in Python, "
            "load the files that `paceline export` writes into your model."
        )
    found = find_checkpoint(run_dir, checkpoint)
    folder = folder_of_step(Path(run_dir), found.step)
    path = folder / RECIPE_FILE
    with code_apart(folder / CODE_FOLDER):
        # A model takes no credentials, which the kept recipe lacks.
        recipe = check(compose(path).filled(MASK), trust)
        with _as_the_run_began(recipe.seed):
            made = _models(recipe)
    name = model or (next(iter(made)) if len(made) == 1 else "")
    if name not in made:
        raise ConfigError(_not_there(path, model, made))
    # A single model has no name in the recipe; the trainer's attribute is its name.
    load_model_state(made[name], read_weights(found, weights)[name or "model"], "the model")
    return made[name].eval()


@dataclass(frozen=True)
class Trained:
    """A run's trainer, built anew, and the checkpoint to load into it.

    Attributes:
        trainer: as the recipe describes it, without a run folder.
        checkpoint: verified.
        logged: what the run's validation at that step logged; None if there was none.
    """

    trainer: Trainer
    checkpoint: Checkpoint
    logged: dict[str, Any] | None


def load_trainer(
    run_dir: Path | str,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str = "latest",
    trust: Collection[str] = (),
) -> Trained:
    """Builds the trainer of a run from its recipe, to evaluate a checkpoint or predict with it.

    This imports the code in the run folder, that which trained the checkpoint.

    Args:
        run_dir: the run folder.
        overrides: changes to the recipe, as for `load_recipe`.
        checkpoint: "latest", "best" or a name such as "step_00000120".
        trust: as for `load_recipe`.

    Raises:
        RecipeError: the recipe has mistakes, or cannot be built.
        ConfigError: there is no recipe, or no such checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    if not (Path(run_dir) / RECIPE_FILE).is_file():
        raise ConfigError(
            f"{run_dir} has no {RECIPE_FILE} to build the trainer from. For a run built in Python, "
            "make its Trainer and call evaluate(checkpoint=...) or predict(...)."
        )
    found = find_checkpoint(run_dir, checkpoint)
    path = folder_of_step(Path(run_dir), found.step) / RECIPE_FILE
    # Nothing is sent anywhere, so that no credential is needed.
    recipe = check(compose(path, overrides).filled(MASK), trust)
    # Nothing is trained, so that a step of the run need not fit this number of processes.
    trainer = build_trainer(recipe, resume="fresh")
    trainer.run_dir, trainer.seed = None, recipe.seed
    progress = load_tree(found.path, parts=("progress",)).get("progress", {})
    here = progress.get("validated_at") == found.step
    return Trained(trainer, found, dict(progress["metrics"]) if here else None)


def _models(recipe: Recipe) -> dict[str, torch.nn.Module]:
    """The models that a recipe describes, by name; that of a single one is empty."""
    if recipe.config is not None:
        trainer: Any = build_trainer(recipe, resume="fresh")
        seed_everything(recipe.seed)
        trainer.make("tokenizer", "model")
        given = trainer.model
        return dict(given) if isinstance(given, Mapping) else {"": given}
    build = Builder(recipe.composed.mistakes().locate).build
    return {name: build(component) for name, component in each(recipe.parts.get("model"))}


def _not_there(path: Path, model: str | None, known: Collection[str]) -> str:
    if not known:
        return f"{path}: no `model:` in it, its trainer makes its own; export them."
    if "" in known:
        return f"{path}: its one model has no name; leave model={model!r} out."
    return f"{path}: model={model!r} is none of its models: {', '.join(known)}."


@contextmanager
def _as_the_run_began(seed: int) -> Iterator[None]:
    """The random state in which the run built its model; the caller's own is restored afterwards.

    So random values that no checkpoint holds (non-persistent buffers) are the same again.
    """
    python, numpy = random.getstate(), np.random.get_state()
    # The devices seeded below.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
