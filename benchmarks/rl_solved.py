"""How long PPO takes to balance the pole of CartPole, beside Stable-Baselines3.

Solved is an evaluated return of 475 over 100 fresh episodes, the likeliest action taken. Both are
evaluated every 8,192 environment steps; the time is that of the training till then, without the
evaluations. Paceline trains as `recipes/cartpole.yaml` has it, Stable-Baselines3 as its
collection of tuned settings (rl-zoo3) has it.

    python benchmarks/rl_solved.py [--rounds 5]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
from common import Worker

PEER, OURS = "Stable-Baselines3", "Paceline"
SOLVED, EPISODES, EVERY, MOST = 475, 100, 8192, 12
RECIPE = common.HERE.parent / "recipes" / "cartpole.yaml"


class Watch:
    """CPU and wall seconds of a training without its evaluations."""

    def __init__(self) -> None:
        self.start()
        self.solved: dict[str, float] | None = None
        self.steps = 0

    def start(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> tuple[float, float]:
        return time.process_time() - self._cpu, time.perf_counter() - self._wall

    def without(self, spent: tuple[float, float]) -> None:
        """Takes an evaluation's time out."""
        self._cpu += spent[0]
        self._wall += spent[1]

    def evaluated(self, reached: float) -> bool:
        """Counts an evaluation; whether the pole is balanced."""
        self.steps += EVERY
        if reached >= SOLVED and self.solved is None:
            cpu, wall = self.stop()
            self.solved = {"cpu": cpu, "wall": wall, "steps": self.steps, "return": reached}
        return self.solved is not None


def peer(seed: int, _: Path) -> Watch:
    """Stable-Baselines3, with a learning rate and a clipping range that fall to 0."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    fresh = make_vec_env("CartPole-v1", EPISODES, seed=10_000 + seed)

    class Evaluates(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % EVERY:
                return True
            before = Watch()
            reached, _ = evaluate_policy(self.model, fresh, EPISODES, deterministic=True)
            watch.without(before.stop())
            return not watch.evaluated(float(reached))

    model = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), n_steps=32, batch_size=256,
        n_epochs=20, gamma=0.98, gae_lambda=0.8, ent_coef=0.0, device="cpu", seed=seed,
        learning_rate=lambda left: left * 1e-3, clip_range=lambda left: left * 0.2,
    )  # fmt: skip
    watch = Watch()
    model.learn(MOST * EVERY, callback=Evaluates())
    return watch


def ours(seed: int, folder: Path) -> Watch:
    """Paceline, with the run folder that a run has: rows, checkpoints, the recipe."""
    from paceline.recipe import build_trainer, load_recipe

    changes = {"seed": seed, "run.dir": str(folder / "run"), "evaluation.every": 1}
    recipe = load_recipe(RECIPE, overrides=[f"{k}={v}" for k, v in changes.items()])
    trainer: Any = build_trainer(recipe)
    watch, before = Watch(), Watch()

    def on_metrics(metrics: Any) -> None:
        watch.without(before.stop())
        if watch.evaluated(metrics["val/return"]):
            trainer.request_stop("the pole is balanced")

    trainer.on_validation_start = before.start
    trainer.on_metrics = on_metrics
    watch.start()
    trainer.train(seed=seed)
    return watch


CONTESTANTS = {PEER: peer, OURS: ours}


def answer(contestant: str, seed: int) -> Any:
    """In a contestant's process: the seconds of one training."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        return CONTESTANTS[contestant](seed, Path(folder)).solved


def main() -> None:
    options = common.arguments(__doc__, rounds=5).parse_args()
    at = common.machine()
    missing = common.report_missing(["stable-baselines3"])
    names = [name for name in CONTESTANTS if not (missing and name == PEER)]
    found: dict[str, list[Any]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {n: stack.enter_context(Worker([__file__, "--serve"])) for n in names}
        for seed in range(1, options.rounds + 1):
            for name in names:
                found[name].append(workers[name].ask(contestant=name, seed=seed))
    rows = []
    for name in names:
        solved = [one for one in found[name] if one is not None]
        each = ((one["cpu"], one["wall"], one["steps"]) for one in solved)
        cpu, wall, steps = zip(*each, strict=True) if solved else ([0.0],) * 3
        rows.append(
            [
                name, f"{len(solved)} of {options.rounds}", f"{statistics.median(steps):,.0f}",
                f"{statistics.median(cpu):.1f} ({min(cpu):.1f} to {max(cpu):.1f})",
                f"{statistics.median(wall):.1f}",
            ]
        )  # fmt: skip
    text = "## The time to a balanced pole\n\n" + " ".join((__doc__ or "").split("\n\n")[1].split())
    text += " Medians over seeds.\n\n"
    head = ["", "seeds that solved it", "environment steps", "CPU seconds", "wall seconds"]
    text += common.table(head, rows)
    common.save("rl_solved", text, {"solved": found}, at)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        common.serve(answer)
    else:
        main()
