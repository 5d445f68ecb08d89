"""AbstractTrainer: the interface beneath, for a trainer written from nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from builders import Noisy, Regression, loader, make_model
from paceline import AbstractTrainer, AbstractTrainerConfig, DeviceParameters, Trainer
from paceline.errors import ConfigError
from paceline.testing import bits


class MyTrainer(AbstractTrainer):
    """Just the methods of the interface, as its documentation shows them."""

    def configure(self) -> None:
        self.model = nn.Sequential(nn.Linear(10, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 1)))
        self.optimizer = torch.optim.Adam(self.model.parameters())

    def setup(self) -> None:
        self.model = self.model.to(self.world.device)

    def named_models(self) -> dict[str, nn.Module]:
        return {"main": self.model}

    def named_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"adam": self.optimizer}

    def named_schedulers(self) -> None:
        return None

    def get_module(self, fqn: str) -> nn.Module:
        parts = fqn.split(".")
        module = self.named_models()[parts[0]]
        for part in parts[1:]:
            module = getattr(module, part)
        return module

    @property
    def train_dataloader(self) -> Any:
        return self._train_dataloader

    @property
    def val_dataloader(self) -> Any:
        return self._val_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {
            "models": {name: model.state_dict() for name, model in self.named_models().items()},
            "optimizers": {name: o.state_dict() for name, o in self.named_optimizers().items()},
            "trainer": {"global_step": self.global_step, "current_epoch": self.current_epoch},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, model in self.named_models().items():
            model.load_state_dict(state_dict["models"][name])
        for name, optimizer in self.named_optimizers().items():
            optimizer.load_state_dict(state_dict["optimizers"][name])
        self.global_step = state_dict["trainer"]["global_step"]
        self.current_epoch = state_dict["trainer"]["current_epoch"]

    def fit(self) -> None:
        pass


def made(trainer: AbstractTrainer) -> Any:
    trainer.configure()
    trainer.setup()
    return trainer


@pytest.mark.parametrize("config", [None, AbstractTrainerConfig(seed=0, project="p")])
def test_the_example_of_the_interface_runs(config: Any) -> None:
    trainer, other = made(MyTrainer(config)), made(MyTrainer(config))
    assert (trainer.world.device.type, trainer.world.size, trainer.world.rank) == ("cpu", 1, 0)
    trainer.global_step, trainer.current_epoch = 7, 2
    other.load_state_dict(trainer.state_dict())
    assert (other.global_step, other.current_epoch, other.local_batches) == (7, 2, 0)
    assert bits(other.state_dict()["models"]) == bits(trainer.state_dict()["models"])
    assert trainer.get_module("main.1.1").out_features == 1


def test_only_the_interface_is_abstract() -> None:
    assert AbstractTrainer.__abstractmethods__ == {
        *("configure", "setup", "fit", "named_models", "named_optimizers", "named_schedulers"),
        *("get_module", "train_dataloader", "val_dataloader", "state_dict", "load_state_dict"),
    }


def test_components_are_found_by_object_and_by_name() -> None:
    trainer = made(MyTrainer())
    assert trainer.get_name_by_model(trainer.model) == "main"
    assert trainer.get_name_by_optimizer(trainer.optimizer) == "adam"
    assert trainer.get_scheduler_from_optimizer(trainer.optimizer) is None
    assert trainer.get_model_by_optimizer("adam") is trainer.model
    assert trainer.get_optimizers_by_model("main") == [trainer.optimizer]
    with pytest.raises(ValueError, match="no model of this trainer; there is: main"):
        trainer.get_name_by_model(nn.Linear(1, 1))
    stranger = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no optimizer of this trainer; there is: adam"):
        trainer.get_name_by_optimizer(stranger)
    with pytest.raises(ValueError, match="no scheduler of this trainer; there is: none"):
        trainer.get_name_by_scheduler(torch.optim.lr_scheduler.LinearLR(stranger))
    with pytest.raises(ValueError, match="no optimizer is called 'sgd'; there is: adam"):
        trainer.get_model_by_optimizer("sgd")
    with pytest.raises(ValueError, match="no model is called 'side'; there is: main"):
        trainer.get_optimizers_by_model("side")


def test_a_trainers_components_are_named_after_its_attributes() -> None:
    class Pair(Trainer):
        def configure(self) -> None:
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)
            parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
            self.adam = torch.optim.Adam(parameters)
            self.warm = torch.optim.lr_scheduler.LinearLR(self.adam)

    trainer = Pair()
    trainer.configure()
    assert list(trainer.named_models()) == ["encoder", "decoder"]
    assert trainer.get_name_by_scheduler(trainer.warm) == "warm"
    assert trainer.get_scheduler_from_optimizer(trainer.adam) is trainer.warm
    assert trainer.get_model_by_optimizer("adam") is trainer.encoder
    assert trainer.get_optimizers_by_model("decoder") == [trainer.adam]


def test_counters_may_be_set() -> None:
    for trainer in (MyTrainer(), Trainer()):
        trainer.global_step, trainer.current_epoch, trainer.local_batches = 5, 2, 9
        assert (trainer.global_step, trainer.current_epoch, trainer.local_batches) == (5, 2, 9)


def test_a_trainers_modules_are_found_by_path() -> None:
    trainer = Regression(model=make_model())
    assert trainer.get_module("model.3") is trainer.model[3]
    with pytest.raises(AttributeError, match="no model 'modle'"):
        trainer.get_module("modle.3")
    with pytest.raises(AttributeError, match="9"):
        trainer.get_module("model.9")


def test_device_parameters_become_settings_of_a_trainer() -> None:
    model = make_model()
    trainer = Regression(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=loader(Noisy()),
        max_steps=2,
        progress=False,
        **DeviceParameters.SINGLE_DEVICE(param_dtype=torch.bfloat16).settings(),
    )
    seen = []
    trainer.on_before_backward = lambda loss: seen.append(torch.is_autocast_enabled("cpu"))
    trainer.training_step = lambda batch, idx: (
        seen.append(trainer.model(batch[0]).dtype) or trainer.model(batch[0]).float().mean()
    )
    trainer.train()
    assert seen == [torch.bfloat16, False] * 2


@pytest.mark.parametrize("preset", [DeviceParameters.FSDP, DeviceParameters.HSDP])
def test_presets_for_sharded_state(preset: Any) -> None:
    assert preset(dp_shard=2).parallel.dp_shard == 2
    with pytest.raises(ConfigError, match="param_dtype"):
        DeviceParameters.DDP(param_dtype=torch.int8)
