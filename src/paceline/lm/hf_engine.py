"""The engine `huggingface`: saves a model as a folder that transformers loads, while it trains.

checkpoint: [{type: huggingface, every_steps: 500, at_end: true}]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paceline.checkpoint.files import Disk
from paceline.checkpoint.publication import make_durable
from paceline.errors import ConfigError
from paceline.factories.checkpoint import CheckpointEngine
from paceline.lm.export import model_of, read_folder, write_model
from paceline.lm.loading import reading
from paceline.trainer.pretrained import is_pretrained, save_configs, save_tokenizer, saved_config
from paceline.world.dtensors import copy_into, whole


class HFCheckpointEngine(CheckpointEngine):
    """Saves the trained weights, config, tokenizer and chat template; of several models each in a
    folder of its name. A model that FSDP2 or tensor parallelism has spread is saved whole.
    """

    name = "huggingface"

    def on_train_start(self, trainer: Any) -> None:
        super().on_train_start(trainer)
        models = trainer.model
        for model in models.values() if isinstance(models, Mapping) else [models]:
            if not is_pretrained(model):
                raise ConfigError(
                    f"the checkpoint engine {self.name!r} saves models of transformers, and "
                    f"{type(model).__name__} is none."
                )
        if trainer.parallel.pipeline > 1:
            raise ConfigError(
                f"the checkpoint engine {self.name!r} cannot save under parallel.pipeline, where "
                "no rank has the whole model: export a checkpoint instead (paceline export RUN "
                "--format huggingface)."
            )
        self._writes = trainer.world.is_main
        self._tokenizer = getattr(trainer, "tokenizer", None)

    def save(self, model: Any) -> None:
        if isinstance(model, Mapping):
            for name, one in model.items():
                self._save_one(one, self.checkpoint_dir / name)
        else:
            self._save_one(model, self.checkpoint_dir)

    def load(self, model: Any) -> None:
        if isinstance(model, Mapping):
            for name, one in model.items():
                _load_one(one, self.checkpoint_dir / name)
        else:
            _load_one(model, self.checkpoint_dir)

    def _save_one(self, model: torch.nn.Module, folder: Path) -> None:
        state: dict[str, torch.Tensor] = {}
        gathered: dict[int, torch.Tensor] = {}  # so that tied weights stay one
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in gathered:
                full = whole(tensor).detach()  # on all ranks, of which one keeps it
                gathered[id(tensor)] = full.cpu() if self._writes else torch.empty(0)
            state[name] = gathered[id(tensor)]
        if not self._writes:
            return
        folder.mkdir(exist_ok=True)
        made = model_of(copy.deepcopy(saved_config(model)), state)
        write_model(made, folder)
        with reading(f"{folder}"):
            save_configs(model, folder)
            save_tokenizer(self._tokenizer, folder)
        make_durable(folder, Disk())


def _load_one(model: torch.nn.Module, folder: Path) -> None:
    held = read_folder(folder).state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        copy_into(tensor, held[name])
