"""Runs of PPO in environments, which are killed and stopped at chosen places."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scripted import Walks

from paceline import CheckpointPolicy
from paceline.rl import PPO, ActorCritic, Environment, Evaluation, GymEnvironment, RLTrainer

EPOCHS = 3


@dataclass(frozen=True)
class Strike:
    """A signal that a rank sends itself, once in a run's whole life.

    Attributes:
        number: the signal.
        experience: in which it comes.
        step: of the environments, at which it comes; None for between two minibatches.
        rank: that gets it.
        lasting: seconds that the environment's step then takes.
    """

    number: int
    experience: int = 1
    step: int | None = 7
    rank: int = 0
    lasting: float = 0.0


class Striking(Environment):
    """Environments in which a signal may come."""

    strike: Strike | None = None
    folder: Path = Path()
    taken = 0

    def make(self, count: int) -> Any:
        vector = super().make(count)
        real, evaluates = vector.step, count != 4 // int(os.environ.get("WORLD_SIZE", "1"))

        def step(actions: Any) -> Any:
            if not evaluates:
                self.struck()
            return real(actions)

        vector.step = step
        return vector

    def struck(self) -> None:
        strike = self.strike
        here = self.taken // self.steps, self.taken % self.steps
        self.taken += 1
        if strike is None or strike.step is None or here != (strike.experience, strike.step):
            return
        if strike.rank == _rank() and once(self.folder):
            os.kill(os.getpid(), strike.number)
            time.sleep(strike.lasting)


class StrikingGym(Striking, GymEnvironment):
    """Of gymnasium's."""


class StrikingWalks(Striking, Walks):
    """Of the tests' own, observed in parts."""


SCALED: dict[str, Any] = {
    "num_envs": 4,
    "steps": 16,
    "normalize_observations": True,
    "normalize_rewards": True,
}
ENVIRONMENTS: dict[str, Callable[[], Striking]] = {
    "cartpole": lambda: StrikingGym("CartPole-v1", **SCALED),
    "pendulum": lambda: StrikingGym("Pendulum-v1", **SCALED),
    "vector": lambda: StrikingGym("CartPole-v1", vectorization="vector_entry_point", **SCALED),
    "walks": lambda: StrikingWalks(num_envs=4, steps=16),
}


def once(folder: Path) -> bool:
    """Whether this is the first time."""
    try:
        os.close(os.open(folder / "struck", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def trainer_of(
    folder: Path, strike: Strike | None = None, kind: str = "cartpole", **changes: Any
) -> RLTrainer:
    """PPO with four environments of 16 steps and two passes in minibatches of 24."""
    environment = ENVIRONMENTS[kind]()
    environment.strike, environment.folder = strike, folder

    def on_step_end(metrics: Any) -> None:
        if strike is None or strike.step is not None or strike.rank != _rank():
            return
        here = trainer.current_epoch == strike.experience and trainer.global_step % 6 == 4
        if here and once(folder):
            os.kill(os.getpid(), strike.number)
            time.sleep(strike.lasting)

    torch.manual_seed(0)
    model = ActorCritic(*environment.traits[:2], hidden=(16,))
    settings: dict[str, Any] = {
        "environment": environment,
        "model": model,
        "algorithm": PPO(None, passes=2, minibatch=24, entropy_coef=0.01),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-3),
        "evaluation": Evaluation(episodes=6, every=2),
        "checkpoint": CheckpointPolicy(every_epochs=None, every_steps=2, save_best=False),
        "epochs": EPOCHS,
        "progress": False,
        "log_every": 1,
        "max_grad_norm": 0.5,
        "run_dir": folder / "run",
    }
    trainer = RLTrainer(**{**settings, **changes})
    trainer.on_step_end = on_step_end
    return trainer


def train(folder: Path, strike: Strike | None = None, kind: str = "cartpole") -> str:
    """One rank of one start; returns why it stopped, if it did not leave."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return trainer_of(folder, strike, kind).train(seed=11).stopped_by
