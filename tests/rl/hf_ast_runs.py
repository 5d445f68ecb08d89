"""Small runs of red-teaming, which are killed while they sample, score and train."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from paceline import CheckpointPolicy
from paceline.rl import GRPO, ASTSampler, HFASTSystem, RLTrainer
from paceline.rl.text.local import LocalEngine

PROMPTS = ["look at", "one more", "tell me about", "say how you", "go home"]
EPISODES, WIDTH, TOKENS, EPOCHS = 3, 3, 4, 3


class Strike:
    """Kills a rank at the n-th time that something happens.

    Args:
        where: "sampling", in front of a token; "scoring", of a text; "training", after a step.
        after: how often it happens before.
    """

    def __init__(self, where: str, after: int) -> None:
        self.where, self.left = where, after

    def here(self, where: str) -> None:
        last = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if where == self.where and int(os.environ.get("RANK", "0")) == last:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


NONE = Strike("nowhere", 0)


class Counted(LocalEngine):
    """Says when it is about to choose tokens."""

    strike = NONE  # of the class: settings of engines are compared at a resume

    def generate(self, requests: Any) -> Any:
        asked = self.check_stop

        def check_stop() -> None:
            self.strike.here("sampling")
            asked()

        self.check_stop = check_stop
        return super().generate(requests)


def trainer_of(folder: Path | None, strike: Strike = NONE, **changes: Any) -> RLTrainer:
    """GRPO on dialogues, two passes in minibatches of 4; every step is saved."""
    Counted.strike = strike

    def vowels(text: str) -> float:
        strike.here("scoring")
        return sum(text.count(letter) for letter in "aeiou") / max(1, len(text))

    rewards = {"vowels": (1.0, vowels), "likelihood": 0.01}
    system = HFASTSystem("tiny", "tiny", rewards=rewards, max_new_tokens=TOKENS)
    settings: dict[str, Any] = {
        "sampler": ASTSampler(system, PROMPTS, WIDTH, 1, episodes=EPISODES),
        "algorithm": GRPO(system, beta=0.05, passes=2, minibatch=4),
        "engine": Counted,
        "optimizer": torch.optim.Adam(system.parameters(), lr=1e-2),
        "epochs": EPOCHS,
        "progress": False,
        "log_every": 1,
        "checkpoint": None
        if folder is None
        else CheckpointPolicy(every_epochs=None, every_steps=1, save_best=False),
        "run_dir": None if folder is None else folder / "run",
    }
    trainer = RLTrainer(**{**settings, **changes})
    trainer.on_step_end = lambda metrics: strike.here("training")
    return trainer


def train(folder: Path, where: str = "nowhere", after: int = 0) -> None:
    """One rank of one start."""
    trainer_of(folder, Strike(where, after)).train(seed=5)


def weights_after() -> torch.Tensor:
    """The auditor's weights after two experiences."""
    trainer = trainer_of(None, epochs=2)
    # Adam would make a step of the rounding of gradients that are nearly 0.
    trainer.optimizer = torch.optim.SGD(trainer.algorithm.system.parameters(), lr=0.1)
    trainer.train(seed=5)
    model = getattr(trainer.system.auditor, "module", trainer.system.auditor)
    return torch.cat([p.detach().flatten() for p in model.parameters()])
