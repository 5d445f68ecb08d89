"""Small runs of algorithms on text, with a tokenizer of letters and a random Llama of 64 tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from language_models import model_of
from paceline import CheckpointPolicy, Parallel
from paceline.rl.algorithms.grpo import GRPO
from paceline.rl.text.policy_system import PolicySystem
from paceline.rl.text.prompt_sampler import PromptSampler
from paceline.rl.trainer import RLTrainer
from paceline.world.dtensors import whole

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
PROMPTS = ["a cat", "the dog", "one more", "x", "so it is", "now"]


class Letters:
    """A token for each letter, from 3 on; further ids are decoded as "#"."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + LETTERS.index(letter) for letter in text]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        known = dict(enumerate(LETTERS, 3))
        return "".join(known.get(i, "#") for i in ids if i > 2)


def vowels(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Low ids are wanted: dense, and different for nearly all completions."""
    return [sum(i < 32 for i in ids) / len(ids) for ids in completion_ids]


def sampler_of(system: Any, **changes: Any) -> PromptSampler:
    settings = {"group_size": 4, "episodes": 3, "max_new_tokens": 6, **changes}
    return PromptSampler(system, settings.pop("source", PROMPTS), [vowels], **settings)


def trainer_of(
    folder: Path | None = None, algorithm: Any = None, sampler: Any = None, **changes: Any
) -> RLTrainer:
    """GRPO, two passes in minibatches of 5, a reference; a rank may be killed at a step."""
    system = changes.pop("system", None) or PolicySystem(model_of("Llama").eval(), Letters())
    if algorithm is None:
        algorithm = GRPO(system, beta=0.05, passes=2, minibatch=5)
    else:
        algorithm = algorithm(system)
    settings: dict[str, Any] = {
        "sampler": (sampler or sampler_of)(system),
        "algorithm": algorithm,
        "optimizer": torch.optim.Adam(system.auditor.parameters(), lr=1e-2),
        "epochs": 2,
        "progress": False,
        "log_every": 1,
        "checkpoint": None
        if folder is None
        else CheckpointPolicy(every_epochs=None, every_steps=1, save_best=False),
        "run_dir": None if folder is None else folder / "run",
    }
    return RLTrainer(**{**settings, **changes})


def train(folder: Path, kill_at: int | None = None) -> str:
    """One rank of one start."""
    trainer = trainer_of(folder)

    def on_step_end(metrics: Any) -> None:
        if kill_at is not None and trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.on_step_end = on_step_end
    return trainer.train(seed=7).stopped_by


def weights_after(accumulation: int = 1) -> torch.Tensor:
    """The policy's weights after a run of two experiences, in so many micro-batches."""
    trainer = trainer_of(gradient_accumulation_steps=accumulation)
    # Adam would make a step of the rounding of gradients that are nearly 0.
    trainer.optimizer = torch.optim.SGD(trainer.algorithm.system.parameters(), lr=0.1)
    trainer.train(seed=7)
    model = getattr(trainer.system.auditor, "module", trainer.system.auditor)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def sharded_weights_after(episodes: int, shards: int) -> torch.Tensor:
    """The policy's weights after a run of two experiences, sharded over so many ranks."""
    trainer = trainer_of(
        sampler=lambda system: sampler_of(system, episodes=episodes),
        algorithm=lambda system: GRPO(system, beta=0.05, passes=2, minibatch=4),
        parallel=Parallel(dp_shard=shards),
    )
    trainer.optimizer = torch.optim.SGD(trainer.algorithm.system.parameters(), lr=0.1)
    kept: list[torch.Tensor] = []

    def on_step_end(metrics: Any) -> None:
        parameters = [whole(p.detach()) for p in trainer.system.auditor.parameters()]
        kept.append(torch.cat([p.flatten() for p in parameters]).clone())

    trainer.on_step_end = on_step_end
    trainer.train(seed=7)
    return kept[-1]
