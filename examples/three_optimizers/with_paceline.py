"""The loop of `plain.py` with Paceline; it ends with the same bits.

Models and optimizers are attributes that `configure` assigns; `backward(loss, only=NAME)` gives
gradients to one optimizer's parameters, although the actor's loss goes through the critic. The copy
of the critic is a model without an optimizer: it is placed and saved like the others.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from paceline import Trainer, Window
from plain import ACTIONS, DISCOUNT, FOLLOW, RATE, TARGET_ENTROPY, make


class SACTrainer(Trainer):
    """Steps critic, actor and temperature on every batch."""

    def __init__(self, n: int, width: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.n, self.width = n, width
        self.noise = torch.Generator().manual_seed(2)

    def configure(self) -> None:
        self.actor, self.critic, self.temperature, self.train_dataloader = make(self.n, self.width)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=RATE)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=RATE)
        self.temperature_adam = torch.optim.Adam(self.temperature.parameters(), lr=RATE)

    def draw(self, n: int) -> Tensor:
        return torch.randn(n, ACTIONS, generator=self.noise)

    def step(self, window: Window) -> None:
        for (state, action, reward, next_state), _ in window:
            alpha = self.temperature.log.exp().detach()
            with torch.no_grad():
                next_action, log_p = self.actor(next_state, self.draw(len(state)))
                value = self.target(next_state, next_action).min(dim=1).values - alpha * log_p
                goal = reward + DISCOUNT * value
            critic_loss = mse_loss(self.critic(state, action), goal[:, None].expand(-1, 2))
            self.backward(critic_loss, only="critic_adam")
            self.optimizer_step("critic_adam")

            new_action, log_p = self.actor(state, self.draw(len(state)))
            value = self.critic(state, new_action).min(dim=1).values
            self.backward((alpha * log_p - value).mean(), only="actor_adam")
            self.optimizer_step("actor_adam")

            surplus = log_p.detach() + TARGET_ENTROPY
            self.backward((-self.temperature.log * surplus).mean(), only="temperature_adam")
            self.optimizer_step("temperature_adam")

            with torch.no_grad():
                fast = self.critic.parameters()
                for slow, following in zip(self.target.parameters(), fast, strict=True):
                    slow.lerp_(following, FOLLOW)


def make_trainer(epochs: int = 5, n: int = 10_000, width: int = 64, **settings: Any) -> SACTrainer:
    """The run of `plain.py`; further settings of the Trainer may be given."""
    return SACTrainer(n, width, epochs=epochs, **settings)


def train(**sizes: int) -> SACTrainer:
    """Trains, prints a line of what came of it, and returns the trainer."""
    trainer = make_trainer(progress=False, **sizes)
    trainer.train()
    print(f"temperature {trainer.temperature.log.exp().item():.4f}")
    return trainer


if __name__ == "__main__":
    train()
