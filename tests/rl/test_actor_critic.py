"""ActorCritic in every space: log-probabilities and entropies are those of torch.distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Text
from torch.distributions import Categorical, Independent, Normal

from paceline.errors import ConfigError
from paceline.rl import ActorCritic
from paceline.rl.control.collector import evaluated, evaluates_later, tensors

SEEN = Box(-1, 1, (3,), np.float32)
OBS = torch.tensor([[0.1, -0.4, 0.9], [0.3, 0.2, -0.7], [0.0, 0.5, 0.6], [1.0, -1.0, 0.2]])


def policy(actions: Space[Any], seen: Space[Any] = SEEN) -> ActorCritic:
    """With outputs that differ between actions and observations."""
    torch.manual_seed(0)
    made = ActorCritic(seen, actions, hidden=(8,))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def of_torch(made: ActorCritic, sizes: list[int] | None) -> list[Any]:
    """The distribution of each part of an action."""
    outputs = made.policy_net(OBS)
    if sizes is None:
        assert made.log_std is not None
        return [Independent(Normal(outputs, made.log_std.exp()), 1)]
    return [Categorical(logits=part) for part in outputs.split(sizes, -1)]


CASES = [
    (Discrete(3, start=5), [3]),
    (MultiDiscrete([2, 4, 3]), [2, 4, 3]),
    (MultiDiscrete([[2, 3], [4, 2]]), [2, 3, 4, 2]),
    (MultiBinary(3), [2, 2, 2]),
    (Box(-0.5, 0.5, (2,), np.float32), None),
]


@pytest.mark.parametrize(("space", "sizes"), CASES, ids=lambda one: str(one)[:20])
def test_probabilities_are_those_of_torch_distributions(
    space: Space[Any], sizes: list[int] | None
) -> None:
    made = policy(space)
    with torch.no_grad():
        action, logp, value = made.act(OBS)
        found, entropy, again = made.evaluate_actions(OBS, action)
        flat = action.reshape(4, -1)
        parts = of_torch(made, sizes)
        picks = [flat] if sizes is None else list(flat.unbind(-1))
        by_hand = sum(part.log_prob(one) for part, one in zip(parts, picks, strict=True))
        spread = sum(part.entropy() for part in parts)
    torch.testing.assert_close(logp, by_hand)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(entropy, spread)
    assert torch.equal(value, again)
    assert torch.equal(value, made.value(OBS))
    assert value.shape == (4,)
    for one in made.actions.to_environment(action):
        assert space.contains(one), one


@pytest.mark.parametrize(("space", "sizes"), CASES, ids=lambda one: str(one)[:20])
def test_noise_alone_decides_the_action(space: Space[Any], sizes: list[int] | None) -> None:
    """Whatever the global generator says, and whichever environments are in the batch."""
    made = policy(space)
    noise = made.noise(torch.Generator().manual_seed(3), 4)
    whole = made.act(OBS, noise=noise)[0]
    torch.rand(7)
    assert torch.equal(made.act(OBS, noise=noise)[0], whole)
    alone = torch.cat([made.act(OBS[i : i + 1], noise=noise[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(alone, whole)
    likely = made.act(OBS, deterministic=True)[0].reshape(4, -1)
    outputs = made.policy_net(OBS)
    by_hand = outputs if sizes is None else [p.argmax(-1) for p in outputs.split(sizes, -1)]
    expected = by_hand if sizes is None else torch.stack(list(by_hand), -1)
    assert torch.equal(likely, torch.as_tensor(expected))


def test_actions_come_as_often_as_their_probabilities_say() -> None:
    made = policy(Discrete(3))
    one = OBS[:1].expand(20_000, -1)
    with torch.no_grad():
        drawn = made.act(one, noise=made.noise(torch.Generator().manual_seed(0), 20_000))[0]
        expected = made.policy_net(OBS[:1]).softmax(-1)[0]
    torch.testing.assert_close(drawn.bincount(minlength=3) / 20_000, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("space", "convolves"),
    [
        (Discrete(4, start=2), False),
        (MultiDiscrete([3, 2], start=[1, 0]), False),
        (MultiBinary(4), False),
        (Box(0, 255, (40, 36, 3), np.uint8), True),
        (Box(0, 255, (4, 36, 40), np.uint8), True),
        (Box(0, 255, (8, 8, 3), np.uint8), False),
        (Dict({"a.b": Box(-1, 1, (2, 2)), "keys": MultiBinary(2), "room": Discrete(3)}), False),
    ],
    ids=str,
)
def test_observations_of_each_space_are_taken(space: Space[Any], convolves: bool) -> None:
    from gymnasium.vector.utils import batch_space

    made = ActorCritic(space, Discrete(2), hidden=(8,))
    many = batch_space(space, 3)
    many.seed(0)
    values = made.act(tensors(many.sample(), torch.device("cpu")))[2]
    assert values.shape == (3,)
    assert len(values.unique()) == 3, "observations are told apart"
    assert any(isinstance(m, torch.nn.Conv2d) for m in made.modules()) == convolves


def test_other_spaces_are_refused_with_what_to_do() -> None:
    for spaces in ((Text(3), Discrete(2)), (SEEN, Text(3))):
        with pytest.raises(ConfigError, match=r"not Text: .*paceline\.rl\.Policy"):
            ActorCritic(*spaces)


@pytest.mark.parametrize(("space", "sizes"), CASES, ids=lambda one: str(one)[:20])
def test_an_action_may_be_decided_on_alone(space: Space[Any], sizes: list[int] | None) -> None:
    """And what it is worth computed later, of all steps of an experience, some at a time."""
    made = policy(space)
    noise = made.noise(torch.Generator().manual_seed(3), 300, 4)
    with torch.no_grad():
        acted = [made.act(OBS + 0.001 * t, noise=noise[t]) for t in range(300)]
        action, logp, value = (torch.stack(part) for part in zip(*acted, strict=True))
        assert torch.equal(made.decide(OBS, noise[0]), action[0])
        seen = torch.stack([OBS + 0.001 * t for t in range(300)])
        found = evaluated(made, {"obs": seen, "action": action}, torch.device("cpu"))
    torch.testing.assert_close(found, {"logp": logp, "value": value})


def test_what_a_subclass_does_in_acting_is_heeded() -> None:
    class Bold(ActorCritic):
        def act(self, obs: Any, deterministic: bool = False, noise: Any = None) -> Any:
            return super().act(obs, True)

    class Named(ActorCritic):
        pass

    spaces = SEEN, Discrete(3)
    assert evaluates_later(Named(*spaces))
    assert not evaluates_later(Bold(*spaces))
