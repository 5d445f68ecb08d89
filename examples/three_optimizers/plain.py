"""Soft actor-critic on recorded transitions: actor, critic and temperature, each with an optimizer,
and a copy of the critic that follows it slowly (Haarnoja et al., 2018, arXiv:1812.05905).

A point is pushed about on a plane and rewarded for being near the middle. Random numbers: actions
are drawn with noise from a generator of the loop's own, and the transitions are in a fixed order.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.utils.data import DataLoader, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]
STATES, ACTIONS = 4, 2
DISCOUNT, FOLLOW, TARGET_ENTROPY = 0.95, 0.01, -float(ACTIONS)
RATE = 1e-3


class Actor(nn.Module):
    """States [n, 4] and noise [n, 2] to actions [n, 2] in -1..1 and their log probabilities [n]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(STATES, width), nn.ReLU(), nn.Linear(width, 2 * ACTIONS)
        )

    def forward(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.layers(state).chunk(2, dim=1)
        log_std = log_std.clamp(-5, 2)
        before = mean + noise * log_std.exp()
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        squash = 2 * (math.log(2) - before - softplus(-2 * before))  # log of tanh's derivative
        return before.tanh(), (gaussian - squash).sum(1)


class Critic(nn.Module):
    """States and actions to two estimates [n, 2] of the value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(STATES + ACTIONS, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return self.layers(torch.cat([state, action], dim=1))


class Temperature(nn.Module):
    """The weight of the entropy, as its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))


def transitions(n: int) -> TensorDataset:
    """State, action, reward and next state, for random states and actions."""
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(n, STATES, generator=generator)
    action = torch.rand(n, ACTIONS, generator=generator) * 2 - 1
    place, speed = state.chunk(2, dim=1)
    speed = 0.9 * speed + 0.2 * action
    place = place + 0.2 * speed
    return TensorDataset(state, action, -place.norm(dim=1), torch.cat([place, speed], dim=1))


def make(n: int, width: int) -> tuple[Actor, Critic, Temperature, Loader]:
    """The three models and the transitions."""
    torch.manual_seed(0)
    actor, critic, temperature = Actor(width), Critic(width), Temperature()
    return actor, critic, temperature, DataLoader(transitions(n), 128)


def train(epochs: int = 5, n: int = 10_000, width: int = 64) -> dict[str, nn.Module]:
    """Trains, prints a line of what came of it, and returns the models."""
    actor, critic, temperature, loader = make(n, width)
    target = copy.deepcopy(critic).requires_grad_(False)
    noise = torch.Generator().manual_seed(2)
    optimizer_actor = torch.optim.Adam(actor.parameters(), lr=RATE)
    optimizer_critic = torch.optim.Adam(critic.parameters(), lr=RATE)
    optimizer_temperature = torch.optim.Adam(temperature.parameters(), lr=RATE)
    for _ in range(epochs):
        for state, action, reward, next_state in loader:
            alpha = temperature.log.exp().detach()
            with torch.no_grad():
                draw = torch.randn(len(state), ACTIONS, generator=noise)
                next_action, log_p = actor(next_state, draw)
                value = target(next_state, next_action).min(dim=1).values - alpha * log_p
                goal = reward + DISCOUNT * value
            optimizer_critic.zero_grad()
            mse_loss(critic(state, action), goal[:, None].expand(-1, 2)).backward()
            optimizer_critic.step()

            draw = torch.randn(len(state), ACTIONS, generator=noise)
            new_action, log_p = actor(state, draw)
            optimizer_actor.zero_grad()
            (alpha * log_p - critic(state, new_action).min(dim=1).values).mean().backward()
            optimizer_actor.step()

            optimizer_temperature.zero_grad()
            (-temperature.log * (log_p.detach() + TARGET_ENTROPY)).mean().backward()
            optimizer_temperature.step()

            with torch.no_grad():
                for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                    slow.lerp_(fast, FOLLOW)
    print(f"temperature {temperature.log.exp().item():.4f}")
    return {"actor": actor, "critic": critic, "temperature": temperature, "target": target}


if __name__ == "__main__":
    train()
