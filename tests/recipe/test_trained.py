"""`load_model`: a run's model comes back as it was trained, from its own folder."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline import Resume
from paceline.errors import ConfigError, MismatchError
from paceline.recipe import build_trainer, load_model, load_recipe
from paceline.testing import bits
from paceline.trainer.trainer import Trainer

RANDOM = """
class Random(Net):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("drawn", torch.randn(3), persistent=False)
"""


def train(path: Path, *overrides: str) -> Trainer:
    loaded = load_recipe(path, overrides)
    trainer = build_trainer(loaded)
    trainer.train(seed=loaded.seed)
    return trainer


def test_the_model_is_the_trained_one_bit_by_bit(recipe, tmp_path: Path) -> None:
    """Given a run whose own code has changed since, when it is loaded, the folder's copy counts."""
    path = recipe()
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + RANDOM)
    trainer = train(path, "model._target_=toy.Random", "seed=5")
    (tmp_path / "toy.py").write_text("raise ValueError('changed since')")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model = load_model("runs/toy/baseline")
    assert bits(model.state_dict()) == bits(trainer.model.state_dict())
    assert torch.equal(model.get_buffer("drawn"), trainer.model.get_buffer("drawn"))
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_averaged_weights_and_other_checkpoints_can_be_had(recipe) -> None:
    keep = "+checkpoint={every_epochs: 1, keep_last: null}"
    trainer = train(recipe(), "+callbacks=[{type: averaged_weights}]", keep)
    [average] = [c for c in trainer.callbacks if type(c).__name__ == "AveragedWeights"]
    averaged = load_model("runs/toy/baseline")  # the weights that were validated
    assert bits(averaged.state_dict()) == bits(average.averaged_state_dict())
    first = load_model("runs/toy/baseline", checkpoint="step_00000003")
    assert bits(first.state_dict()) != bits(trainer.model.state_dict())


def test_what_cannot_be_loaded_is_one_clear_error(recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe\.yaml"):
        load_model(tmp_path)
    path = recipe()
    train(path)
    stored = tmp_path / "runs/toy/baseline/recipe.yaml"
    text = stored.read_text()
    stored.write_text(text.replace("width: 4", "width: 5"))
    with pytest.raises(MismatchError, match=r"layers\.0\.weight"):
        load_model("runs/toy/baseline")
    stored.write_text(text.replace("_target_: toy.Net", "_target_: os.system"))
    with pytest.raises(ConfigError, match=r"os\.system"):
        load_model("runs/toy/baseline")


def test_one_of_several_models_is_asked_for_by_name(recipe) -> None:
    net, adam = {"_target_": "toy.Net", "width": 4}, {"_target_": "torch.optim.AdamW"}
    trainer = train(
        recipe(
            trainer={"_target_": "toy.Gan", "epochs": 1, "progress": False},
            model={"generator": net, "discriminator": net | {"width": 2}},
            optimizer={"generator": adam, "discriminator": adam},
        )
    )
    model = load_model("runs/toy/baseline", model="discriminator")
    assert bits(model.state_dict()) == bits(trainer.get_module("discriminator").state_dict())
    for name in (None, "critic"):
        with pytest.raises(ConfigError, match="generator, discriminator"):
            load_model("runs/toy/baseline", model=name)


HELPER = "\nfrom helper import WIDTH\n\nclass Helped(Net):\n    def __init__(self):\n"
HELPER += "        super().__init__(WIDTH)\n"


@pytest.fixture
def helped(recipe, tmp_path: Path) -> Path:
    """The folder of a run whose code imports a neighbour."""
    path = recipe(model={"_target_": "toy.Helped"}, checkpoint={"keep_last": 3})
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + HELPER)
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    train(path)
    return tmp_path / "runs/toy/baseline"


def test_a_run_keeps_what_its_code_imports_and_runs_from_anywhere(
    helped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(p.name for p in (helped / "code").iterdir()) == ["helper.py", "toy.py"]
    (tmp_path / "helper.py").write_text("WIDTH = 9\n")  # today's is another one
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = dict(sys.modules)
    assert load_model(helped).layers[0].out_features == 4
    assert sys.modules["helper"] is before["helper"]
    assert sys.modules["toy"] is before["toy"]
    for name in ("toy", "helper"):  # as a new process has it
        del sys.modules[name]
    sys.path.remove(str(tmp_path))
    assert train(helped / "recipe.yaml").model.layers[0].out_features == 4


def test_each_checkpoint_is_loaded_with_the_code_that_trained_it(helped: Path) -> None:
    kept = helped / "recipe.yaml"
    toy = helped.parents[2] / "toy.py"
    first = kept.read_text()
    toy.write_text(toy.read_text().replace("nn.Tanh()", "nn.ReLU()"))
    del sys.modules["toy"]
    recipe = load_recipe(helped.parents[2] / "toy.yaml", ["trainer.epochs=3"])
    build_trainer(recipe, resume=Resume(accept=("code",))).fit(seed=0)
    earlier = helped / "earlier/until_step_00000006"
    assert (earlier / "recipe.yaml").read_text() == first
    assert sorted(p.name for p in (earlier / "code").iterdir()) == ["helper.py", "toy.py"]
    now = load_model(helped)
    assert type(now.layers[1]).__name__ == "ReLU"
    then = load_model(helped, checkpoint="step_00000006")
    assert type(then.layers[1]).__name__ == "Tanh"
