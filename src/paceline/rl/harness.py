"""Harness: experiences and losses for a training loop of one's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from paceline.errors import ConfigError, DataError, MissingExtraError
from paceline.parallel.ddp import unwrap
from paceline.rl.acting import acting
from paceline.rl.graph_collector import GraphCollector
from paceline.rl.source import number_of
from paceline.world.seeding import stream
from paceline.world.world import World

_log = logging.getLogger(__name__)


class Harness:
    """Collects experiences and computes losses; the loop around them is the user's.

        for batch in harness.experience():
            loss, logs = harness.step(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            harness.log_current_step(logs)

    Args:
        sampler: plays the episodes.
        algorithm: makes steps and losses of them.
        num_episodes_per_experience: episodes of one experience.
        use_wandb: whether logs go to Weights & Biases too.
        wandb_kwargs: for `wandb.init`.
        dataloader_kwargs: for the `DataLoader` of an experience's steps, such as `batch_size`.

    Raises:
        ConfigError: there are no episodes.
        MissingExtraError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        sampler: Any,
        algorithm: Any,
        num_episodes_per_experience: int = 32,
        use_wandb: bool = False,
        wandb_kwargs: Mapping[str, Any] | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if num_episodes_per_experience < 1:
            raise ConfigError(
                f"num_episodes_per_experience={num_episodes_per_experience}: expected at least 1."
            )
        self.sampler, self.algorithm = sampler, algorithm
        self.num_episodes_per_experience = num_episodes_per_experience
        self.dataloader_kwargs = dict(dataloader_kwargs or {})
        self._experiences = 0
        self._wandb = _wandb_run(wandb_kwargs or {}) if use_wandb else None

    def experience(self, seed: int | None = None) -> Iterator[Any]:
        """Plays all episodes with the weights as they are now, and gives their steps in batches.

        The global random generators are left as they were, and so are the models' modes.

        Args:
            seed: of every random number in it: the same seed and weights give the same batches.
                None for torch's initial seed and the number of experiences so far.

        Returns:
            An iterator with a length, of what the algorithm's `collate_fn` makes.

        Raises:
            DataError: no episode came to a step to train on.
        """
        if seed is None:
            seed, number = torch.initial_seed(), self._experiences
            self._experiences += 1
        else:
            number = 0
        self.sampler.episodes = self.num_episodes_per_experience
        collector = GraphCollector(
            self.sampler, self.algorithm, self._acting, version=lambda: 0, identity={}
        )
        collector.open(seed, World(), lambda: False)
        steps, row = collector.together([collector.collect(number)])
        steps = self.algorithm.prepare(steps)
        if not number_of(steps):
            raise DataError(
                f"no step to train on came of {_plain(row)}: look at rewards and skips."
            )
        if isinstance(steps, Mapping):
            columns = steps
            steps = [{k: v[i] for k, v in columns.items()} for i in range(number_of(columns))]
        # Without a generator of its own it would draw from the global one.
        order = torch.Generator().manual_seed(stream(seed, "order", number) >> 1)
        settings = {
            "collate_fn": self.algorithm.collate_fn,
            "generator": order,
            **self.dataloader_kwargs,
        }
        return iter(DataLoader(steps, **settings))  # pyright: ignore[reportArgumentType]

    def step(self, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch, with gradients, and the algorithm's logs as plain numbers.

        Args:
            batch: from `experience`.
        """
        loss, logs = self.algorithm.step(batch)
        return loss, {name: _number(value) for name, value in logs.items()}

    def log_current_step(self, current_logs: Mapping[str, Any]) -> None:
        """Logs numbers, by the logger of this module, and to Weights & Biases if asked for.

        Args:
            current_logs: by name.
        """
        if self._wandb is not None:
            self._wandb.log(dict(current_logs))
        _log.info("%s", dict(current_logs))

    @contextmanager
    def _acting(self) -> Iterator[None]:
        models = [v for v in vars(self.sampler.system).values() if isinstance(v, torch.nn.Module)]
        with acting([unwrap(model) for model in models]):
            yield


def _number(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().item()
    return value


def _plain(row: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in row.items())


def _wandb_run(settings: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports] - not ours to require
    except ImportError as error:
        raise MissingExtraError("use_wandb needs the package wandb: pip install wandb.") from error
    return wandb.init(**{"project": "paceline_rl", **settings})
