"""Policies for control: what to do on an observation, and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError


class Policy(nn.Module):
    """What acts in environments, and is trained.

    A policy of one's own overrides `act` and `evaluate_actions`; `forward` is the latter, so that
    models that are spread over ranks are called as all modules are.
    """

    def act(self, obs: Any, deterministic: bool = False) -> tuple[Any, Any, Any]:
        """What to do.

        Args:
            obs: observations of [envs, ...], or by name.
            deterministic: the most likely action in place of a random one.

        Returns:
            The action [envs, ...], the log of its probability and the observation's value, [envs].
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs an act(obs, deterministic).")

    def evaluate_actions(self, obs: Any, action: Any) -> tuple[Any, Any, Any]:
        """The log-probabilities of actions, entropies and values, [steps] each.

        Args:
            obs: observations of [steps, ...], or by name.
            action: what was done on them, [steps, ...].
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs evaluate_actions(obs, action).")

    def value(self, obs: Any) -> torch.Tensor:
        """The values of observations, [steps].

        Args:
            obs: as for `act`.
        """
        return self.act(obs, deterministic=True)[2]

    def forward(self, obs: Any, action: Any) -> tuple[Any, Any, Any]:
        return self.evaluate_actions(obs, action)


class ActorCritic(Policy):
    """A policy and a value function, each a network of its own on the encoded observation.

    Actions are categorical (Discrete), several categoricals (MultiDiscrete), Bernoulli
    (MultiBinary), or normal with a learnt deviation that is the same everywhere (Box). Vectors are
    taken as they are, bytes divided by 255, discrete observations one-hot, images (bytes of three
    dimensions, at least 36 x 36) by three convolutions (Mnih et al., 2015), dictionaries part by
    part.

    Args:
        observation_space, action_space: gymnasium's, of one environment.
        hidden: widths of the hidden layers.
    """

    def __init__(
        self, observation_space: Any, action_space: Any, hidden: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        self.actions = _actions(action_space)
        self.encoder = _encoder(observation_space)  # nothing in it is trained, but for images
        width = self.encoder.width
        self.policy_net = _tower(width, hidden, self.actions.width, 0.01)
        self.value_net = _tower(width, hidden, 1, 1.0)
        extra = self.actions.extra()
        self.log_std = None if extra is None else nn.Parameter(extra)

    def _both(self, obs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self.encoder(obs)
        return self.policy_net(encoded), self.value_net(encoded).squeeze(-1)

    def noise(self, generator: torch.Generator, *shape: int) -> torch.Tensor:
        """Random numbers from which `act` makes actions, [*shape, numbers of an action].

        Args:
            generator: where they come from.
            shape: such as steps and environments.
        """
        return self.actions.noise(generator, shape)

    def act(
        self, obs: Any, deterministic: bool = False, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What to do; see `Policy.act`.

        Args:
            obs: observations.
            deterministic: the most likely action.
            noise: from `noise`, of [envs, ...]; None for the global generator.
        """
        outputs, value = self._both(obs)
        if noise is None and not deterministic:
            noise = self.actions.noise(None, (len(outputs),)).to(outputs.device)
        action = self.actions.choose(outputs, self.log_std, None if deterministic else noise)
        return action, self.actions.log_prob(outputs, self.log_std, action), value

    def decide(self, obs: Any, noise: torch.Tensor) -> torch.Tensor:
        """The action of `act` alone; what it is worth may be computed later, of many steps at once.

        Args:
            obs: observations.
            noise: from `noise`, of [envs, ...].
        """
        return self.actions.choose(self.policy_net(self.encoder(obs)), self.log_std, noise)

    def evaluate_actions(self, obs: Any, action: Any) -> tuple[Any, Any, Any]:
        outputs, value = self._both(obs)
        return *self.actions.log_prob_and_entropy(outputs, self.log_std, action), value

    def value(self, obs: Any) -> torch.Tensor:
        return self.value_net(self.encoder(obs)).squeeze(-1)


class _Categoricals:
    """Several independent choices."""

    def __init__(self, sizes: Sequence[int], space: Any, start: Any = 0) -> None:
        self.sizes, self.shape, self.dtype = list(sizes), tuple(space.shape), space.dtype
        self.start = start
        self.width = sum(sizes)

    def extra(self) -> torch.Tensor | None:
        return None

    def _parts(self, outputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """The logits of each choice."""
        return [outputs] if len(self.sizes) == 1 else outputs.split(self.sizes, -1)

    def noise(self, generator: torch.Generator | None, shape: Sequence[int]) -> torch.Tensor:
        return torch.rand(*shape, len(self.sizes), generator=generator)

    def choose(self, outputs: torch.Tensor, _: Any, noise: torch.Tensor | None) -> torch.Tensor:
        chosen = []
        for i, part in enumerate(self._parts(outputs)):
            if noise is None:
                chosen.append(part.argmax(-1))
                continue
            # The inverse of the distribution, so that a number decides alone.
            total = part.double().softmax(-1).cumsum(-1)
            at = torch.searchsorted(total, (noise[:, i : i + 1].double() * total[:, -1:]))
            chosen.append(at.squeeze(-1).clamp(max=part.shape[-1] - 1))
        return self._joined(chosen).reshape(-1, *self.shape)

    def log_prob(self, outputs: torch.Tensor, _: Any, action: torch.Tensor) -> torch.Tensor:
        return self._chosen([part.log_softmax(-1) for part in self._parts(outputs)], action)

    def log_prob_and_entropy(
        self, outputs: torch.Tensor, _: Any, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logs = [part.log_softmax(-1) for part in self._parts(outputs)]
        each = [(log.exp() * log).sum(-1) for log in logs]
        entropy = -each[0] if len(each) == 1 else -torch.stack(each).sum(0)
        return self._chosen(logs, action), entropy

    @staticmethod
    def _chosen(logs: Sequence[torch.Tensor], action: torch.Tensor) -> torch.Tensor:
        """The log-probabilities of what was chosen."""
        flat = action.reshape(len(action), -1)
        chosen = [log.gather(-1, flat[:, i : i + 1]) for i, log in enumerate(logs)]
        return (chosen[0] if len(chosen) == 1 else torch.cat(chosen, -1).sum(-1, True)).squeeze(-1)

    @staticmethod
    def _joined(chosen: Sequence[torch.Tensor]) -> torch.Tensor:
        return chosen[0] if len(chosen) == 1 else torch.stack(chosen, -1)

    def to_environment(self, action: torch.Tensor) -> Any:
        return (action.cpu().numpy() + self.start).astype(self.dtype)


class _Normal:
    """Independent normal numbers, clipped to the space's bounds where the environment gets them."""

    def __init__(self, space: Any) -> None:
        self.shape, self.low, self.high = space.shape, space.low, space.high
        self.dtype = space.dtype
        self.width = math.prod(space.shape)

    def extra(self) -> torch.Tensor | None:
        return torch.zeros(self.width)

    def noise(self, generator: torch.Generator | None, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(*shape, self.width, generator=generator)

    def choose(
        self, outputs: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        flat = outputs if noise is None else outputs + log_std.exp() * noise
        return flat.reshape(-1, *self.shape)

    def log_prob(
        self, outputs: torch.Tensor, log_std: torch.Tensor, action: torch.Tensor
    ) -> torch.Tensor:
        z = (action.reshape(len(outputs), -1) - outputs) / log_std.exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def log_prob_and_entropy(
        self, outputs: torch.Tensor, log_std: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        one = (log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum()
        return self.log_prob(outputs, log_std, action), one.expand(len(outputs))

    def to_environment(self, action: torch.Tensor) -> Any:
        return action.cpu().numpy().astype(self.dtype).clip(self.low, self.high)


def _actions(space: Any) -> Any:
    kind = type(space).__name__
    if kind == "Discrete":
        return _Categoricals([int(space.n)], space, int(space.start))
    if kind == "MultiDiscrete":
        return _Categoricals([int(n) for n in space.nvec.flatten()], space, space.start)
    if kind == "MultiBinary":
        return _Categoricals([2] * math.prod(space.shape), space)
    if kind == "Box":
        return _Normal(space)
    raise ConfigError(
        f"ActorCritic takes actions of Discrete, MultiDiscrete, MultiBinary or Box, not {kind}: "
        "give a policy of your own (paceline.rl.Policy)."
    )


class _Vector(nn.Module):
    """A Box, flat; bytes from 0 to 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        flat = obs.float().flatten(1)
        return flat / 255 if obs.dtype == torch.uint8 else flat


class _OneHot(nn.Module):
    """One choice or several, one-hot."""

    def __init__(self, sizes: Sequence[int], start: Sequence[int]) -> None:
        super().__init__()
        self.sizes, self.start, self.width = list(sizes), list(start), sum(sizes)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        flat = obs.reshape(len(obs), -1).long()
        parts = [
            nn.functional.one_hot(flat[:, i] - start, size)
            for i, (size, start) in enumerate(zip(self.sizes, self.start, strict=True))
        ]
        return torch.cat(parts, -1).float()


class _Image(nn.Module):
    """Bytes of [height, width, channels] or [channels, height, width]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.last = shape[-1] < shape[0]
        channels = shape[-1] if self.last else shape[0]
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 8, 4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            self.width = self.convolutions(self._arranged(torch.zeros(1, *shape))).shape[1]

    def _arranged(self, obs: torch.Tensor) -> torch.Tensor:
        return (obs.permute(0, 3, 1, 2) if self.last else obs).float() / 255

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.convolutions(self._arranged(obs))


class _Parts(nn.Module):
    """The parts of a dictionary, side by side."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(parts)  # any text, which the names of modules may not be
        self.parts = nn.ModuleList(parts.values())
        self.width = sum(int(part.width) for part in parts.values())  # pyright: ignore[reportArgumentType]

    def forward(self, obs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen = [part(obs[name]) for name, part in zip(self.names, self.parts, strict=True)]
        return torch.cat(seen, -1)


def _encoder(space: Any) -> Any:
    kind = type(space).__name__
    if kind == "Box":
        image = len(space.shape) == 3 and str(space.dtype) == "uint8"
        image = image and sorted(space.shape)[1] >= 36  # what the convolutions need
        return _Image(space.shape) if image else _Vector(math.prod(space.shape))
    if kind == "Discrete":
        return _OneHot([int(space.n)], [int(space.start)])
    if kind == "MultiDiscrete":
        sizes = [int(n) for n in space.nvec.flatten()]
        return _OneHot(sizes, [int(s) for s in space.start.flatten()])
    if kind == "MultiBinary":
        return _Vector(math.prod(space.shape))
    if kind == "Dict":
        return _Parts({name: _encoder(part) for name, part in space.spaces.items()})
    raise ConfigError(
        f"ActorCritic takes observations of Box, Discrete, MultiDiscrete, MultiBinary or Dict, "
        f"not {kind}: give a policy of your own (paceline.rl.Policy)."
    )


def _tower(width: int, hidden: Sequence[int], outputs: int, gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [_orthogonal(nn.Linear(width, size), math.sqrt(2)), nn.Tanh()]
        width = size
    return nn.Sequential(*layers, _orthogonal(nn.Linear(width, outputs), gain))


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
