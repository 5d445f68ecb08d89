"""Optimizers from a typed section: decayed weights apart from biases, norms and other vectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import pydantic
import torch

from paceline.errors import ConfigError
from paceline.factories.bases import ModelFactory, OptimizerFactory
from paceline.recipe.typed import Config, HumanFloat
from paceline.registry import names


def decayed_and_not(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a model: weights that decay, and vectors and scalars that do not.

    Args:
        model: of whose parameters those are taken that are trained.
        weight_decay: of the first group; the second's is 0.

    Returns:
        The groups that have parameters.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class AdamWConfig(Config):
    """The settings of `torch.optim.AdamW`.

    Attributes:
        lr: the largest learning rate; schedules scale it.
        weight_decay: decoupled, for weights of two dimensions or more, but not for biases, norms
            and other vectors.
        betas: the decay rates of the running means of gradients and their squares.
        eps: added to the root of the second mean.
        fused: whether one kernel makes the whole step, rounded a little otherwise: small models
            train faster with it; null leaves it to torch.
    """

    lr: HumanFloat = pydantic.Field(5e-4, gt=0)
    weight_decay: HumanFloat = pydantic.Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: HumanFloat = pydantic.Field(1e-8, gt=0)
    fused: bool | None = None


class _PerModel(OptimizerFactory):
    """An optimizer for each model."""

    def create_optimizer(self, model: Any, optimizer_config: Any) -> Any:
        if model is None:
            raise ConfigError(
                "optimizer: the trainer has no model whose parameters it could take: give the "
                f"recipe a `model:` ({', '.join(names(ModelFactory.kind)) or 'none is registered'})"
                ", or the trainer class a model_factory."
            )
        if isinstance(model, Mapping):
            return {name: self.of_model(one, optimizer_config) for name, one in model.items()}
        return self.of_model(model, optimizer_config)

    @abstractmethod
    def of_model(self, model: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
        """The optimizer of one model.

        Args:
            model: whose parameters it takes.
            config: this factory's config.
        """
        raise NotImplementedError


class AdamWFactory(_PerModel):
    """`torch.optim.AdamW`."""

    name = "adamw"
    config_type = AdamWConfig

    def of_model(self, model: torch.nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
        groups = decayed_and_not(model, config.weight_decay)
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=config.fused
        )


class SGDConfig(Config):
    """The settings of `torch.optim.SGD`.

    Attributes:
        lr: the largest learning rate; schedules scale it.
        momentum: the decay rate of the running sum of gradients.
        weight_decay: for weights of two dimensions or more.
    """

    lr: HumanFloat = pydantic.Field(gt=0)
    momentum: HumanFloat = pydantic.Field(0.0, ge=0)
    weight_decay: HumanFloat = pydantic.Field(0.0, ge=0)


class SGDFactory(_PerModel):
    """`torch.optim.SGD`."""

    name = "sgd"
    config_type = SGDConfig

    def of_model(self, model: torch.nn.Module, config: SGDConfig) -> torch.optim.Optimizer:
        groups = decayed_and_not(model, config.weight_decay)
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
