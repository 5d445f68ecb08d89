"""Dream Trainer at home: its page on `AbstractTrainer`, example and concepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paceline import AbstractTrainerConfig, DeviceParameters, Trainer
from paceline.testing import bits
from small import settings

IMPORTS = {
    "from dream_trainer.trainer import AbstractTrainer": "from paceline import AbstractTrainer",
    "from dream_trainer.configs import DeviceParameters": "from paceline import DeviceParameters",
}
EXAMPLE = """
from dream_trainer.trainer import AbstractTrainer
from dream_trainer.configs import DeviceParameters

class MyTrainer(AbstractTrainer):
    def configure(self):
        # Define models, optimizers, etc.
        self.model = torch.nn.Linear(10, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters())
    
    def setup(self):
        # Initialize components
        self.model = self.model.to(self.world.device)
    
    def named_models(self):
        return {"main": self.model}
    
    def named_optimizers(self):
        return {"adam": self.optimizer}
    
    def named_schedulers(self):
        return None  # No schedulers in this example
    
    def get_module(self, fqn: str):
        # Implement module lookup
        parts = fqn.split(".")
        module = self.named_models()[parts[0]]
        for part in parts[1:]:
            module = getattr(module, part)
        return module
    
    @property
    def train_dataloader(self):
        return self._train_dataloader
    
    @property
    def val_dataloader(self):
        return self._val_dataloader
    
    def state_dict(self):
        return {
            "models": {name: model.state_dict() for name, model in self.named_models().items()},
            "optimizers": {name: opt.state_dict() for name, opt in self.named_optimizers().items()},
            "trainer": {"global_step": self.global_step, "current_epoch": self.current_epoch}
        }
    
    def load_state_dict(self, state_dict):
        for name, model in self.named_models().items():
            model.load_state_dict(state_dict["models"][name])
        for name, opt in self.named_optimizers().items():
            opt.load_state_dict(state_dict["optimizers"][name])
        self.global_step = state_dict["trainer"]["global_step"]
        self.current_epoch = state_dict["trainer"]["current_epoch"]
    
    def fit(self):
        # Implement training loop
        pass
"""  # noqa: W293  as it stands there
CONCEPTS = """
# Access device
device = trainer.world.device

# Check if distributed
if trainer.world.size > 1:
    print(f"Running on {trainer.world.size} processes")

# Get rank
rank = trainer.world.rank

# Access models by name
models = trainer.named_models()  # {"encoder": encoder, "decoder": decoder}

# Access optimizers by name
optimizers = trainer.named_optimizers()  # {"adam": adam_opt}

# Access schedulers by name
schedulers = trainer.named_schedulers()  # {"cosine": cosine_scheduler}

# Global step (optimizer steps)
print(f"Step: {trainer.global_step}")

# Current epoch
print(f"Epoch: {trainer.current_epoch}")

# Local batches (since program start)
print(f"Batches: {trainer.local_batches}")
"""


def example() -> Any:
    """The page's class. Only its imports differ, and it is given the torch that it uses."""
    text = EXAMPLE
    for theirs, ours in IMPORTS.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    there: dict[str, Any] = {"torch": torch, "__name__": "a_page"}
    exec(compile(text, "abstract.md", "exec", dont_inherit=True), there)
    return there["MyTrainer"]


def made(config: Any) -> Any:
    trainer = example()(config)
    trainer.configure()
    trainer.setup()
    return trainer


CONFIG = AbstractTrainerConfig(
    seed=0,
    project="vision",
    group="baselines",
    experiment="first",
    device_parameters=DeviceParameters.SINGLE_DEVICE(compile_model=False),
)


@pytest.mark.parametrize("config", [CONFIG, None], ids=["configured", "bare"])
def test_DT_03_the_example_of_the_page_runs_as_it_stands(config: Any) -> None:
    """Constructed, trained by hand for a step, saved and loaded into another of its kind."""
    trainer, other = made(config), made(config)
    trainer.model(torch.randn(4, 10)).sum().backward()
    trainer.optimizer.step()
    trainer.global_step, trainer.current_epoch = 7, 2
    assert bits(other.state_dict()) != bits(trainer.state_dict())
    other.load_state_dict(trainer.state_dict())
    assert bits(other.state_dict()) == bits(trainer.state_dict())
    assert (other.global_step, other.current_epoch, other.local_batches) == (7, 2, 0)
    assert trainer.fit() is None


def test_a_trainer_of_the_interface_has_its_look_ups() -> None:
    trainer = made(CONFIG)
    assert trainer.config.seed == 0
    assert trainer.get_name_by_model(trainer.model) == "main"
    assert trainer.get_name_by_optimizer(trainer.optimizer) == "adam"
    assert trainer.get_model_by_optimizer("adam") is trainer.model
    assert trainer.get_optimizers_by_model("main") == [trainer.optimizer]
    assert trainer.get_module("main") is trainer.model


def test_schedulers_may_be_none() -> None:
    trainer = made(CONFIG)
    assert trainer.named_schedulers() is None
    assert trainer.get_scheduler_from_optimizer(trainer.optimizer) is None
    stranger = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
    with pytest.raises(ValueError, match="no scheduler of this trainer; there is: none"):
        trainer.get_name_by_scheduler(stranger)


class Layers(nn.Module):
    """`layer1.conv1` and what else an encoder has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Module()
        self.layer1.conv1 = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer1.conv1(x)


class Coder(Trainer):
    """Two models, an optimizer and a scheduler, named after the attributes that hold them."""

    def configure(self) -> None:
        self.encoder, self.decoder = Layers(), nn.Linear(3, 1)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.adam = torch.optim.Adam(parameters)
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, 10)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.decoder(self.encoder(x)), y)


def coder(**changes: Any) -> Any:
    given = {key: value for key, value in settings(**changes).items() if key not in MADE}
    return Coder(**given)


MADE = ("model", "optimizer", "loss_fn")


def concepts(trainer: Any) -> dict[str, Any]:
    """What the page's snippets find."""
    found: dict[str, Any] = {"trainer": trainer}
    exec(compile(CONCEPTS, "abstract.md", "exec"), found)
    return found


def test_the_concepts_of_the_page_hold_of_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten batches in windows of two, twice."""
    trainer = coder(gradient_accumulation_steps=2)
    trainer.fit(seed=0)
    found = concepts(trainer)
    assert (found["device"], found["rank"]) == (torch.device("cpu"), 0)
    assert found["models"] == {"encoder": trainer.encoder, "decoder": trainer.decoder}
    assert found["optimizers"] == {"adam": trainer.adam}
    assert found["schedulers"] == {"cosine": trainer.cosine}
    assert capsys.readouterr().out == "Step: 6\nEpoch: 2\nBatches: 10\n"


def concepts_on_ranks() -> tuple[int, int]:
    found: dict[str, Any] = {}

    class Looks(Coder):
        def on_train_start(self) -> None:
            found.update(concepts(self))

    made = settings(epochs=1)
    Looks(**{key: value for key, value in made.items() if key not in MADE}).fit()
    return found["rank"], found["trainer"].world.size


def test_the_concepts_of_the_page_hold_on_ranks(ranks: Any) -> None:
    assert ranks(concepts_on_ranks, 2) == [(0, 2), (1, 2)]


def test_DT_04_components_are_named_after_attributes_in_their_order() -> None:
    trainer = coder()
    trainer.configure()
    assert list(trainer.named_models()) == ["encoder", "decoder"]
    assert trainer.get_name_by_model(trainer.decoder) == "decoder"
    assert trainer.get_name_by_optimizer(trainer.adam) == "adam"
    assert trainer.get_name_by_scheduler(trainer.cosine) == "cosine"
    assert trainer.get_scheduler_from_optimizer(trainer.adam) is trainer.cosine
    assert trainer.get_model_by_optimizer("adam") is trainer.encoder
    assert trainer.get_optimizers_by_model("decoder") == [trainer.adam]
    stranger = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert trainer.get_scheduler_from_optimizer(stranger) is None
    for look_up, thing in (
        (trainer.get_name_by_model, nn.Linear(1, 1)),
        (trainer.get_name_by_optimizer, stranger),
        (trainer.get_name_by_scheduler, torch.optim.lr_scheduler.ConstantLR(stranger)),
    ):
        with pytest.raises(ValueError, match="of this trainer; there is: "):
            look_up(thing)


def test_DT_05_a_module_is_found_by_its_path() -> None:
    trainer = coder()
    trainer.configure()
    assert trainer.get_module("encoder.layer1.conv1") is trainer.encoder.layer1.conv1
    with pytest.raises(AttributeError, match="conv2"):
        trainer.get_module("encoder.layer1.conv2")
    with pytest.raises(AttributeError, match="no model 'encodr'; there is: encoder, decoder"):
        trainer.get_module("encodr.layer1")
