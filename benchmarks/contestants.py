"""The contestants: each trains a task for so many optimizer steps in its own way.

Each is a function `(task, loader, steps, folder)` that returns the trained model; the imports of
each are its own, so that a process pays only for the one that it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tasks import Task
from torch import nn
from torch.utils.data import DataLoader

Contestant = Callable[[Task, DataLoader, int, Path], nn.Module]


def hand_written(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """What everybody writes first; the measure of all others."""
    model, optimizer = task.make()
    step = 0
    while True:
        for inputs, targets in loader:
            loss = task.loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == steps:
                return model


def indexed_by_hand(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """Without a DataLoader: batches cut out of the tensors, the fastest loop there is."""
    model, optimizer = task.make()
    inputs, targets = loader.dataset.tensors
    shuffle = type(loader.sampler).__name__ == "RandomSampler"
    step = 0
    while True:
        order = torch.randperm(len(inputs)) if shuffle else torch.arange(len(inputs))
        for index in order.split(task.batch_size):
            loss = task.loss_fn(model(inputs[index]), targets[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == steps:
                return model


def _paceline(task: Task, loader: DataLoader, steps: int, **settings: Any) -> nn.Module:
    from paceline import Trainer

    model, optimizer = task.make()
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        loss_fn=task.loss_fn,
        train_dataloader=loader,
        max_steps=steps,
        **settings,
    )
    trainer.train(seed=0)
    return model


def paceline_lean(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """Paceline with everything optional off."""
    return _paceline(task, loader, steps, loggers=[], callbacks=[], progress=False, checkpoint=None)


def paceline_defaults(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """Paceline as it comes: rows, progress, run record, checkpoints."""
    return _paceline(task, loader, steps, run_dir=folder / "run")


def _lightning_module(task: Task, *, logs: bool) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer = task.make()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            inputs, targets = batch
            loss = task.loss_fn(self.model(inputs), targets)
            if logs:
                self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return self.optimizer

    return Module()


def lightning_barebones(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """Lightning with `barebones=True`, its switch for measuring overhead."""
    import lightning

    module = _lightning_module(task, logs=False)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, barebones=True)
    trainer.fit(module, loader)
    return module.model


def lightning_defaults(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """Lightning with its progress bar, its default logger and one logged value; no checkpoints."""
    import lightning

    module = _lightning_module(task, logs=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader)
    return module.model


def _hugging_face(task: Task, loader: DataLoader, steps: int, **settings: Any) -> nn.Module:
    import transformers

    class Trainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **unused: Any) -> torch.Tensor:
            return task.loss_fn(model(inputs[0]), inputs[1])

        def get_train_dataloader(self) -> DataLoader:
            return loader

    model, optimizer = task.make()
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = transformers.TrainingArguments(
        max_steps=steps,
        per_device_train_batch_size=task.batch_size,
        max_grad_norm=0.0,  # the others do not clip
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **settings,
    )
    trainer = Trainer(
        model, arguments, train_dataset=loader.dataset, optimizers=(optimizer, constant)
    )
    trainer.train()
    return model


def hugging_face_quiet(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """Hugging Face Trainer without logging, progress bar and checkpoints."""
    return _hugging_face(
        task, loader, steps, output_dir=str(folder), logging_strategy="no", disable_tqdm=True
    )


def hugging_face_defaults(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """Hugging Face Trainer with its default logging and progress bar; no checkpoints."""
    return _hugging_face(task, loader, steps, output_dir=str(folder))


def accelerate(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """A hand-written loop under Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(*task.make(), loader)
    step = 0
    while True:
        for inputs, targets in loader:
            loss = task.loss_fn(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == steps:
                accelerator.end_training()
                return accelerator.unwrap_model(model)


def ignite(task: Task, loader: DataLoader, steps: int, folder: Path) -> nn.Module:
    """Ignite's engine without handlers."""
    from ignite.engine import Engine

    model, optimizer = task.make()

    def train_step(engine: Any, batch: Any) -> None:
        inputs, targets = batch
        loss = task.loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Engine(train_step).run(loader, max_iters=steps)
    return model


CONTESTANTS: dict[str, tuple[Contestant, str | None]] = {
    "hand-written loop": (hand_written, None),
    "hand-written, tensors indexed": (indexed_by_hand, None),
    "Paceline, lean": (paceline_lean, "paceline"),
    "Paceline, defaults": (paceline_defaults, "paceline"),
    "Ignite": (ignite, "ignite"),
    "Accelerate": (accelerate, "accelerate"),
    "Lightning, barebones": (lightning_barebones, "lightning"),
    "Lightning, default logging": (lightning_defaults, "lightning"),
    "Hugging Face Trainer, quiet": (hugging_face_quiet, "transformers"),
    "Hugging Face Trainer, default logging": (hugging_face_defaults, "transformers"),
}


def silence() -> None:
    """Turns off what the contestants print beside their work."""
    import logging

    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers", "ignite"):
        logging.getLogger(name).setLevel(logging.ERROR)
