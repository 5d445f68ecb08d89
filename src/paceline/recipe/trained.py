"""A trained model back from its run: built as the recipe says, with a checkpoint's weights."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from paceline.checkpoint.export import Weights, find_checkpoint, read_weights
from paceline.checkpoint.state import load_model_state
from paceline.errors import ConfigError
from paceline.recipe.builder import Builder
from paceline.recipe.parts import each
from paceline.recipe.recipe import load_recipe
from paceline.recipe.record import RECIPE_FILE
from paceline.world.seeding import seed_everything


def load_model(
    run_dir: Path | str,
    *,
    weights: Weights = "live",
    checkpoint: str = "latest",
    model: str | None = None,
    trust: Collection[str] = (),
) -> torch.nn.Module:
    """The model of a run that was trained from a recipe, on the CPU and in evaluation mode.

    Unlike commands that only look at a run, this imports the code that the run folder keeps: call
    it on runs that you would train. The settings are `load_recipe(run_dir / "recipe.yaml")`.

    Args:
        run_dir: the run folder.
        weights: "live", those that were trained, or "averaged", what a callback such as
            `AveragedWeights` kept.
        checkpoint: "latest", "best" or a name such as "step_00000120".
        model: which one, if the recipe has several by name.
        trust: as for `load_recipe`.

    Raises:
        RecipeError: the recipe has mistakes, or the model cannot be built.
        ConfigError: there is no recipe, no `model:` in it, or no such checkpoint.
        CheckpointError: the checkpoint is damaged, or has no averaged weights.
        MismatchError: the model that is built is not the one that was saved.
    """
    path = Path(run_dir) / RECIPE_FILE
    if not path.is_file():
        raise ConfigError(
            f"{run_dir} has no {RECIPE_FILE} to build the model from. For a run made in Python, "
            "load what `paceline export` writes into your model."
        )
    found = find_checkpoint(run_dir, checkpoint)
    recipe = load_recipe(path, trust=trust)
    components = dict(each(recipe.parts.get("model")))
    name = model or (next(iter(components)) if len(components) == 1 else "")
    if name not in components:
        raise ConfigError(_not_there(path, model, components))
    build = Builder(recipe.composed.mistakes().locate).build
    with _as_the_run_began(recipe.seed):
        made = {each_name: build(component) for each_name, component in components.items()}
    # A single model has no name in the recipe; the trainer's attribute is its name.
    load_model_state(made[name], read_weights(found, weights)[name or "model"], "the model")
    return made[name].eval()


def _not_there(path: Path, model: str | None, known: Collection[str]) -> str:
    if not known:
        return f"{path}: no `model:` in it, its trainer makes its own; export them."
    if "" in known:
        return f"{path}: its one model has no name; leave model={model!r} out."
    return f"{path}: model={model!r} is none of its models: {', '.join(known)}."


@contextmanager
def _as_the_run_began(seed: int) -> Iterator[None]:
    """The random state in which the run built its model; the caller's own comes back.

    What a model draws and no checkpoint holds (buffers that are not persistent) is the same again.
    """
    python, numpy = random.getstate(), np.random.get_state()
    # The devices that are seeded below.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
