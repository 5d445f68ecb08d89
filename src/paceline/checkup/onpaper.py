"""A simulated training step: a recipe's own, in any layout, with tensors that have no memory."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from paceline.checkup.as_on_gpu import (
    AutocastAsOnGpu,
    exchanged_as_on_gpu,
    update_all_at_once,
)
from paceline.checkup.fake import (
    make_fake,
    meshes_made_real,
    parameters_made_fake,
    whole_shapes_found_apart,
)
from paceline.checkup.ledger import Ledger, Peak
from paceline.data.loader import is_indexed
from paceline.data.source import Draw
from paceline.parallel.fsdp import follow
from paceline.recipe.builder import build_trainer
from paceline.recipe.recipe import Recipe
from paceline.trainer.callback import Callback
from paceline.world.layout import Parallel
from paceline.world.paper import WorldOnPaper

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

STEPS = 2  # in the second step the optimizer's state exists from the beginning
_MICRO_BATCHES = 3  # a first, a middle and a last one stand for any number
PARAMETERS, GRADIENTS, STATE = "parameters", "gradients", "optimizer state"
EXCHANGE, BATCH, OTHER = "exchange buffers", "batch", "buffers, callbacks"
STAGES = (
    "components", "placement", "training data", "forward pass", "backward pass", "optimizer step",
)  # fmt: skip


class StepOnPaper:
    """Two optimizer steps of a recipe's Trainer on rank 0 of a layout, without memory or a device.

    In this way a model that fits nowhere can be built and trained. The Trainer's own code places
    and shards the model, applies activation checkpointing and takes the steps; each micro-batch is
    the first batch of the training data.

    Args:
        recipe: the checked recipe.
        parallel: the layout, which replaces the recipe's.
        ranks: the number of ranks.
        on_cpu: whether the devices are CPUs; otherwise torch behaves as on a GPU, as far as
            `as_on_gpu.py` covers it.

    Attributes:
        ledger: the memory used.
        micro_batches: micro-batches in a window on each rank.
        samples: samples in the first micro-batch, -1 if unknown.
    """

    def __init__(self, recipe: Recipe, parallel: Parallel, ranks: int, *, on_cpu: bool) -> None:
        self.recipe = recipe
        self.parallel = parallel
        self.ranks = ranks
        self.on_cpu = on_cpu
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = Ledger(self.fake, offloads=parallel.cpu_offload and not on_cpu)
        self.ledger.moment = STAGES[0]
        self.micro_batches = 0
        self.samples = -1

    def run(self) -> Peak:
        """Builds the trainer, takes the steps, and discards it.

        Raises:
            Exception: an error of the recipe's code, at the stage `ledger.moment`.
        """
        with TemporaryDirectory() as scratch, ExitStack() as making:
            making.enter_context(parameters_made_fake(self.fake))
            trainer = self._build(Path(scratch))
            with trainer.running(self.recipe.seed):
                making.close()
                self._hold(trainer)
                draw = self._first_batch(trainer)
                for _ in range(STEPS):
                    self._step(trainer, draw)
        del trainer
        gc.collect()  # a trainer has reference cycles
        return self.ledger.peak()

    def _build(self, scratch: Path) -> Trainer:
        alone = {**self.recipe.settings, "parallel": Parallel()}
        recipe = replace(self.recipe, run_dir=scratch, whole=None, settings=alone)
        trainer = build_trainer(recipe, resume="never")
        trainer.parallel = self.parallel
        trainer.world = WorldOnPaper(self.parallel, self.ranks)
        trainer.setup = partial(self._place, trainer, trainer.setup)
        trainer.callbacks.append(_Moments(self.ledger))
        trainer.loggers, trainer.checkpoint_policy = [], None
        trainer.show_progress = False
        trainer.on_nonfinite = "raise"
        if is_indexed(trainer.train_dataloader):
            trainer.train_dataloader.num_workers = 0  # they would read ahead
        return trainer

    def _place(self, trainer: Trainer, setup: Any) -> None:
        """Places the models as the trainer does, after making all of their tensors fake."""
        trainer.compile = False
        optimizers = trainer.named_optimizers().values()
        follow(optimizers, make_fake(_modules(trainer), self.fake))
        if not self.on_cpu and not self.ledger.offloads:
            for optimizer in optimizers:
                update_all_at_once(optimizer)
        self.ledger.moment = "placement"
        self.ledger.hold(PARAMETERS, _parameters(trainer))
        self.ledger.hold(OTHER, (b for m in trainer.named_models().values() for b in m.buffers()))
        assert isinstance(trainer.world, WorldOnPaper)
        with trainer.world.as_one_of_many(), meshes_made_real(), self._on_paper():
            setup()
        if self.ranks > 1 and not self.parallel.partitions_state:
            trainer.replicas.append(_ReplicaOnPaper(_parameters(trainer)))

    def _hold(self, trainer: Trainer) -> None:
        """Records the memory of the device before the first step."""
        trainer.optimization.scaler = None  # it takes no memory, and its step depends on values
        trainer.optimization.compared = True  # no other rank has values to compare
        self.ledger.hold(OTHER, filter(self.ledger.counts, gc.get_objects()))
        self.ledger.hold(PARAMETERS, _parameters(trainer))
        for replica in trainer.replicas:
            if isinstance(replica, _ReplicaOnPaper):
                self.ledger.reserve(EXCHANGE, replica.bucket_bytes)

    def _first_batch(self, trainer: Trainer) -> Draw:
        """The draw of a window whose micro-batches are all the first batch."""
        self.ledger.moment = "training data"
        trainer.source.start_epoch(0)
        draw = trainer.source.draw()
        assert draw is not None  # opening the data rejects an empty loader
        batch = tree_map_only(torch.Tensor, self.fake.from_tensor, draw.batch(0))
        if self.parallel.context == 1:
            self.ledger.hold(BATCH, _tensors(batch))

        def read(_: int) -> Any:
            if self.parallel.context == 1:
                return batch
            return tree_map_only(torch.Tensor, torch.clone, batch)  # freed once it is sharded

        self.micro_batches, self.samples = len(draw.sizes), draw.sizes[0]
        return draw._replace(sizes=draw.sizes[:_MICRO_BATCHES], batch=read, ids=lambda _: [])

    @contextmanager
    def _on_paper(self) -> Iterator[None]:
        with whole_shapes_found_apart(), self.fake, self.ledger:
            yield

    def _step(self, trainer: Trainer, draw: Draw) -> None:
        window = trainer.open_window(draw)
        with ExitStack() as there:
            there.enter_context(self._on_paper())
            if not self.on_cpu:
                there.enter_context(AutocastAsOnGpu())
            if not self.on_cpu and self.parallel.context > 1:
                there.enter_context(exchanged_as_on_gpu())
            trainer.step(window)
            trainer.optimization.end_window()
        self.ledger.on_host = False
        states = (
            value
            for optimizer in trainer.named_optimizers().values()
            for state in optimizer.state.values()
            for value in _tensors(state)
        )
        self.ledger.hold(STATE, states)


class _ReplicaOnPaper:
    """Replaces the `Replica`s of all models, without communication.

    Args:
        parameters: the models' parameters.

    Attributes:
        bucket_bytes: the size of DDP's buckets, which have room for every gradient
            (https://docs.pytorch.org/docs/stable/notes/ddp.html, "Internal Design").
    """

    called = False
    delivered = True

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._placed = {id(p): p.nbytes for p in parameters if p.requires_grad}
        self.exchange_without(frozenset())

    def begin(self, *, exchange: bool) -> None: ...

    def exchange_without(self, frozen: Set[int]) -> None:
        exchanged = {key: size for key, size in self._placed.items() if key not in frozen}
        self.covered = frozenset(exchanged)
        self.bucket_bytes = sum(exchanged.values())

    def check_exchanged(self) -> None: ...


class _Moments(Callback):
    """Sets the ledger's stage, and the kind of the tensors of the batch and the gradients."""

    priority = -(10**9)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        self._ledger.moment = "forward pass"
        self._ledger.hold(BATCH, _tensors(batch))

    def on_before_backward(self, trainer: Trainer, loss: torch.Tensor) -> None:
        self._ledger.moment = "backward pass"

    def on_after_backward(self, trainer: Trainer) -> None:
        self._hold_gradients(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, optimizer: Any) -> None:
        self._ledger.moment = "optimizer step"
        self._ledger.on_host = self._ledger.offloads

    def _hold_gradients(self, trainer: Trainer) -> None:
        gradients = (p.grad for p in _parameters(trainer))
        self._ledger.hold(GRADIENTS, (g for g in gradients if g is not None))


def _parameters(trainer: Trainer) -> Iterator[torch.Tensor]:
    return chain.from_iterable(m.parameters() for m in trainer.named_models().values())


def _modules(trainer: Trainer) -> Iterator[torch.nn.Module]:
    return chain.from_iterable(m.modules() for m in trainer.named_models().values())


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
