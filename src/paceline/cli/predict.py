"""`paceline predict`: the outputs of a trained model for each sample, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli.options import (
    Checkpoint,
    Nproc,
    Overrides,
    Run,
    Trust,
    Weights,
    WhichWeights,
)
from paceline.cli.ranks import start_ranks
from paceline.errors import ConfigError, nearest


def predict(
    run: Run,
    overrides: Overrides = None,
    to: Annotated[
        Path,
        typer.Option(metavar="FILE", help="A .jsonl or .npz file to write.", show_default=False),
    ] = ...,  # type: ignore[assignment]
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A loader of the recipe.  [default: val_dataloader]"),
    ] = None,
    checkpoint: Checkpoint = "latest",
    weights: WhichWeights = Weights.auto,
    nproc: Nproc = None,
    trust: Trust = None,
) -> None:
    """Writes the outputs of a run's model, one for each sample, in the order of the data.

    This imports the run's own code. Nothing else is written.
    """
    from paceline.log.predictions import open_predictions

    if to.suffix not in (".jsonl", ".npz"):
        raise ConfigError(f"--to {to}: name a file that ends in .jsonl or .npz.")
    start_ranks(nproc)
    from paceline.cli.reports import own_output_apart
    from paceline.recipe.trained import load_trainer

    with own_output_apart():
        allowed = tuple(trust or ())
        trained = load_trainer(run, overrides or (), checkpoint=checkpoint, trust=allowed)
        trainer, path = trained.trainer, trained.checkpoint.path
        loader = None if data is None else _loader(trainer, data)
        asked = {"checkpoint": path, "weights": weights.value}
        with trainer.predicting(loader, **asked) as predictions:
            if trainer.world.is_main:
                with open_predictions(to) as file:
                    for outputs in predictions:
                        file.write(outputs)
                    count = file.count
            else:
                count = sum(1 for _ in predictions)
    if trainer.world.is_main:
        from paceline.runs.text import printable

        print(printable(f"{to}: {count} samples, from {path.name}"))


def _loader(trainer: Any, name: str) -> Any:
    """A loader of the trainer's by name."""
    loaders = {n: getattr(trainer, n) for n in ("train_dataloader", "val_dataloader")}
    several = loaders["val_dataloader"]
    if isinstance(several, dict):
        loaders = {"train_dataloader": loaders["train_dataloader"], **several}
    if loaders.get(name) is None:
        known = ", ".join(n for n, loader in loaders.items() if loader is not None)
        hint = nearest(name, loaders) or "."
        raise ConfigError(f"--data {name}: the recipe has no such loader{hint} It has: {known}.")
    return loaders[name]
