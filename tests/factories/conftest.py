"""A trainer with factories of its own, in the module that recipes name and in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from builders import code_forgotten
from command import Paceline
from paceline import registry
from paceline.testing import Ranks

CODE = '''
from __future__ import annotations

import torch

from paceline.factories import (
    CheckpointEngine,
    Config,
    DataConfig,
    DataFactory,
    DataSource,
    DataSourceConfig,
    FactoryTrainer,
    HumanFloat,
    HumanInt,
    ModelFactory,
    TrainerConfig,
)


class TinyConfig(Config):
    width: HumanInt = 4


class Tiny(ModelFactory):
    name = "tiny"
    config: TinyConfig

    def create_model(self, model_config):
        width = model_config.width
        return torch.nn.Sequential(
            torch.nn.Linear(3, width), torch.nn.Dropout(0.1), torch.nn.Linear(width, 1)
        )


class Wide(ModelFactory):
    name = "wide"

    def create_model(self, model_config):
        return torch.nn.Linear(3, 1)


class RowsConfig(DataSourceConfig):
    rows: HumanInt = 16


class Rows(DataSource):
    """Rows that differ, and others for validation."""

    name = "rows"
    config_type = RowsConfig

    def load(self, config, split):
        generator = torch.Generator().manual_seed(3 if split == "train" else 4)
        x = torch.randn(config.rows, 3, generator=generator)
        return list(zip(x, x.sum(1, keepdim=True), strict=True))


class PairsConfig(DataConfig):
    free = frozenset({"note"})
    note: str = ""
    noise: float = 0.0


class Pairs(DataFactory):
    name = "pairs"
    config_type = PairsConfig


class MineConfig(TrainerConfig):
    free = frozenset({"remark"})
    scale: HumanFloat = 1.0
    remark: str = ""


class Mine(FactoryTrainer):
    name = "mine"
    config: MineConfig
    model_factory: Tiny | None
    data_factory_type = Pairs

    def loss(self, batch):
        x, y = batch
        scale = 1.0 if self.config is None else self.config.scale
        return scale * (self.model(x) - y).square().mean()


class Sums(CheckpointEngine):
    """Writes the sum of the weights, and then waits to be killed if asked to."""

    name = "sums"
    saves = []

    def save(self, model):
        import os

        self.saves.append(self.checkpoint_dir.name)
        total = sum(float(p.sum()) for p in model.parameters())
        (self.checkpoint_dir / "sum").write_text(repr(total))
        if os.environ.get("DIES_IN_SAVE") == self.checkpoint_dir.name:
            os._exit(9)
'''

RECIPE = """\
code: mine.py
trainer: {type: mine, epochs: 3, scale: 50%, progress: false}
model: {width: 8}
data:
  micro_batch_size: 4
  sources: [{type: rows, rows: 2^4}]
optimizer: {type: sgd, lr: 1e-2}
run: {dir: run}
"""


@pytest.fixture(autouse=True)
def _names_and_code_forgotten() -> Iterator[None]:
    """What a test registers or imports is gone after it."""
    with registry.restored(), code_forgotten():
        yield


Write = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the recipe into the working folder, with top-level keys replaced; None leaves out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)

    def write(text: str = RECIPE, **keys: object) -> Path:
        path = tmp_path / "r.yaml"
        if keys:
            tree = yaml.safe_load(text) | keys
            text = yaml.safe_dump({k: v for k, v in tree.items() if v is not None}, sort_keys=False)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def paceline(tmp_path: Path, ranks: Ranks) -> Iterator[Paceline]:
    """The command line, in the folder of the recipe."""
    runner = Paceline(tmp_path, ranks)
    yield runner
    runner.close()
