"""What ranks and commands of the tests import and prepare as they go, which each would do anew."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra.core.plugins import Plugins
from typer.main import get_command

import paceline
from paceline.cli.app import app
from paceline.recipe import load_recipe

for _module in pkgutil.walk_packages(paceline.__path__, "paceline."):
    # Trackers' libraries are imported in processes of their own.
    if _module.name != "paceline.__main__" and ".trackers.libraries." not in _module.name:
        importlib.import_module(_module.name)
# Of the recipes on digits, of whoever compiles, and of language models.
for _name in (
    *("sklearn.datasets", "sklearn.model_selection", "functorch.compile", "networkx"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
):
    importlib.import_module(_name)
Plugins.instance()  # imports Hydra's
get_command(app)
# The first recipe of a process is slow: grammars build their tables, and schemas their validators.
with TemporaryDirectory() as _folder:
    _recipe = Path(_folder) / "recipe.yaml"
    _recipe.write_text("""\
run: {project: p, name: n, dir: "runs/${run.name}"}
trainer: {_target_: paceline.Trainer, epochs: 2}
model: {_target_: torch.nn.Linear, in_features: 1, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: torch.utils.data.TensorDataset, _args_: []}
""")
    load_recipe(_recipe, ["trainer.epochs=1", "+checkpoint={every_steps: 1}"])
