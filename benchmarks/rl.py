"""What PPO among environments costs, beside Stable-Baselines3 and a hand-written script.

CartPole at Stable-Baselines3's settings: 8 environments of 32 steps, minibatches of 256, 20 passes,
two networks of 64-64. CPU time of an environment step, training included, by the slope between two
run lengths.

    python benchmarks/rl.py [--rounds 5]
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

ENVS, STEPS, BATCH, PASSES = 8, 32, 256, 20
GAMMA, LAM, CLIP, RATE, NORM = 0.98, 0.8, 0.2, 1e-3, 0.5
LENGTHS = 4, 24  # experiences
BY_HAND, PEER, OURS = "hand-written script", "Stable-Baselines3", "Paceline"
FUSED = "Paceline, Adam(fused=True)"  # as recipes/cartpole.yaml has it


def by_hand(experiences: int, _: Path) -> None:
    """PPO as one writes it in one file, with acting and training in torch."""
    import gymnasium
    import numpy as np
    import torch
    from torch import nn

    def linear(width: int, outputs: int, gain: float) -> nn.Linear:
        layer = nn.Linear(width, outputs)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
        return layer

    def tower(outputs: int, gain: float) -> nn.Sequential:
        return nn.Sequential(
            linear(4, 64, 2**0.5), nn.Tanh(), linear(64, 64, 2**0.5), nn.Tanh(),
            linear(64, outputs, gain),
        )  # fmt: skip

    actor, critic = tower(2, 0.01), tower(1, 1.0)
    weights = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(weights, lr=RATE, eps=1e-5)
    modes = gymnasium.vector.AutoresetMode
    envs = gymnasium.make_vec(
        "CartPole-v1", num_envs=ENVS, vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": modes.SAME_STEP},
    )  # fmt: skip
    obs = torch.as_tensor(envs.reset(seed=0)[0])
    shape = STEPS, ENVS
    seen = torch.zeros(*shape, 4)
    actions = torch.zeros(shape, dtype=torch.long)
    logps, values, rewards, ends = (torch.zeros(shape) for _ in range(4))
    for _experience in range(experiences):
        with torch.no_grad():
            for t in range(STEPS):
                choice = torch.distributions.Categorical(logits=actor(obs))
                seen[t], actions[t] = obs, choice.sample()
                logps[t], values[t] = choice.log_prob(actions[t]), critic(obs)[:, 0]
                after, reward, over, cut, info = envs.step(actions[t].numpy())
                rewards[t] = torch.as_tensor(reward)
                if cut.any():
                    last = np.stack([o if o is not None else after[i]
                                     for i, o in enumerate(info["final_obs"])])  # fmt: skip
                    rewards[t] += GAMMA * critic(torch.as_tensor(last))[:, 0] * torch.tensor(cut)
                ends[t] = torch.as_tensor(over | cut)
                obs = torch.as_tensor(after)
            later, ahead = torch.zeros(ENVS), critic(obs)[:, 0]
            advantages = torch.zeros(shape)
            for t in reversed(range(STEPS)):
                lasts = 1 - ends[t]
                later = rewards[t] + GAMMA * ahead * lasts - values[t] + GAMMA * LAM * lasts * later
                advantages[t], ahead = later, values[t]
            returns = (advantages + values).flatten()
        rows = [seen.flatten(0, 1), actions.flatten(), logps.flatten(), advantages.flatten()]
        for _pass in range(PASSES):
            for pick in torch.randperm(ENVS * STEPS).split(BATCH):
                o, a, old, gain = (row[pick] for row in rows)
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                choice = torch.distributions.Categorical(logits=actor(o))
                ratio = (choice.log_prob(a) - old).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.min(ratio * gain, clipped * gain).mean()
                loss = loss + 0.5 * nn.functional.mse_loss(critic(o)[:, 0], returns[pick])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(weights, NORM)
                optimizer.step()
    envs.close()


def peer(experiences: int, _: Path) -> None:
    """Stable-Baselines3's PPO."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    model = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", ENVS, seed=0), n_steps=STEPS, batch_size=BATCH,
        n_epochs=PASSES, gamma=GAMMA, gae_lambda=LAM, clip_range=CLIP, learning_rate=RATE,
        max_grad_norm=NORM, device="cpu", seed=0,
    )  # fmt: skip
    model.learn(experiences * ENVS * STEPS)


def ours(experiences: int, folder: Path) -> None:
    """Paceline, with its rows of metrics, and no checkpoint, as the others have none."""
    trainer(experiences, folder).train(seed=0)


def ours_fused(experiences: int, folder: Path) -> None:
    """The same with the fused kernel of Adam, which the others do not ask for either."""
    trainer(experiences, folder, fused=True).train(seed=0)


def trainer(experiences: int, folder: Path, *, fused: bool | None = None, **changes: Any) -> Any:
    """PPO on CartPole with the settings above."""
    import torch

    from paceline.rl import PPO, ActorCritic, GymEnvironment, RLTrainer

    environment = changes.pop("environment", None) or GymEnvironment(
        "CartPole-v1", num_envs=ENVS, steps=STEPS
    )
    model = ActorCritic(*environment.traits[:2])
    settings: dict[str, Any] = {
        "algorithm": PPO(None, gamma=GAMMA, lam=LAM, passes=PASSES, minibatch=BATCH),
        "checkpoint": None,
        "max_grad_norm": NORM,
        "log_every": PASSES * ENVS * STEPS // BATCH,  # a row an experience, as the peer has it
        "run_dir": folder / "run",
    }
    return RLTrainer(
        environment=environment,
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=RATE, eps=1e-5, fused=fused),
        epochs=experiences,
        progress=False,
        **{**settings, **changes},
    )


CONTESTANTS = {BY_HAND: by_hand, PEER: peer, OURS: ours, FUSED: ours_fused}


def answer(contestant: str, experiences: int) -> Any:
    """In a contestant's process: CPU seconds of one run."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        start = time.process_time()
        CONTESTANTS[contestant](experiences, Path(folder))
        return time.process_time() - start


def main() -> None:
    options = common.arguments(__doc__, rounds=5).parse_args()
    at = common.machine()
    missing = common.report_missing(["stable-baselines3"])
    names = [name for name in CONTESTANTS if not (missing and name == PEER)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {n: stack.enter_context(Worker([__file__, "--serve"])) for n in names}
        for i in range(options.rounds + 1):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                short, long = (workers[name].ask(contestant=name, experiences=n) for n in LENGTHS)
                if i > 0:
                    taken = (LENGTHS[1] - LENGTHS[0]) * ENVS * STEPS
                    rates[name].append(taken / (long - short))
    ratios = {n: [o / p for o, p in zip(rates[OURS], rates[n], strict=True)] for n in names}
    rows = [
        [name, common.spread(rates[name]), f"{statistics.median(ratios[name]):.2f}"]
        for name in names
    ]
    text = "## PPO among environments\n\n"
    text += f"CartPole, {ENVS} environments of {STEPS} steps, minibatches of {BATCH}, "
    text += f"{PASSES} passes; environment steps a second of CPU time, training included. The "
    text += "contestants draw other random numbers, so their weights are not compared.\n\n"
    text += common.table(["", "steps a CPU second", "Paceline is so many times as fast"], rows)
    common.save("rl", text, {"steps a CPU second": rates}, at)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        common.serve(answer)
    else:
        main()
