"""One optimizer step of a model in stages: a window's micro-batches, and what the pipeline asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from paceline.data.batches import inputs_and_targets
from paceline.parallel.ddp import probes, zero_of
from paceline.trainer.optimization import Optimization
from paceline.trainer.recorder import Recorder
from paceline.trainer.run import Run
from paceline.trainer.weighting import check_loss, weighted
from paceline.trainer.window import Window, announce, buffers_kept
from paceline.world.dtensors import whole
from paceline.world.seeding import mix, seed_everything


class StagedStep:
    """Adds the gradients of a window's mean loss, stage by stage; a `StagedWindow`.

    Args:
        run: at hand, with a model in stages.
        optimization: whose guard looks at losses.
        recorder: takes the losses.
        loss_fn: `loss_fn(outputs, targets)` -> mean loss over the micro-batch's items.
        window: the micro-batches.
    """

    def __init__(
        self,
        run: Run,
        optimization: Optimization,
        recorder: Recorder,
        loss_fn: Callable[[Any, Any], Any],
        window: Window,
    ) -> None:
        self._run = run
        assert run.placement.pipeline is not None
        self._pipeline = run.placement.pipeline
        self._guard = optimization.guard
        self._recorder = recorder
        self._loss_fn = loss_fn
        self._window = window
        self._key = mix(run.model_key, run.progress.global_step)
        pairs = [inputs_and_targets(batch) for batch in window.read()]
        self.inputs: Sequence[Any] = [inputs for inputs, _ in pairs]
        self._targets = [targets for _, targets in pairs]
        self._weights: list[Any] = []
        # [micro-batches of the window]
        self._losses = torch.zeros(len(window), dtype=torch.float64, device=run.device)

    def take(self) -> None:
        """Runs the schedules."""
        run, window, pipeline = self._run, self._window, self._pipeline
        pipeline.share_buffers()
        real: list[int] = []
        for j in range(len(window)):
            window.present(j)
            self._weights.append(window.weight)
            if not window.stand_in:
                real.append(j)
                if run.events.on_train_batch_start:
                    announce(run, window)
        if run.scaler is not None:
            run.scaler.scale(self._losses)  # by which it is made, on stages without a loss too
        for replica in run.placement.replicas:
            replica.begin(exchange=False)  # the stage's to begin
        # Copies of a stage wait for each other's gradients, so that each computes something.
        with nullcontext() if real else buffers_kept(run):
            pipeline.train(self, real or [0])
        pipeline.broadcast_from_last(self._losses)
        pipeline.check_attention()
        for j in real:
            self._end(j)
        run.batch_items = None

    def begin(self, j: int) -> None:
        """The stage begins to compute the j-th micro-batch."""
        seed_everything(mix(mix(self._key, j), self._pipeline.index))

    def loss_of(self, outputs: Any, j: int) -> torch.Tensor:
        """The mean loss of a micro-batch; called on the last stage.

        Args:
            outputs: of the last stage.
            j: the micro-batch's index in the window.
        """
        with self._pipeline.autocast:
            loss = whole(self._loss_fn(outputs, self._targets[j]))
        check_loss(loss, giver="loss_fn")
        return loss

    def loss_to_send(self, outputs: Any, j: int) -> torch.Tensor:
        """The loss with which a micro-batch's backward pass begins; called on the last stage.

        Args:
            outputs: of the last stage.
            j: the micro-batch's index in the window.
        """
        loss = self.loss_of(outputs, j)
        self._losses[j] = loss.detach()
        weight = self._weights[j]
        if not isinstance(weight, torch.Tensor) and weight == 0:
            share = zero_of(probes(outputs))
        else:
            share = weighted(loss, weight)
        for hook in self._run.events.on_before_backward:
            hook(share)
        return share if self._run.scaler is None else self._run.scaler.scale(share)

    def gradients_added(self) -> None:
        """A micro-batch's gradients are there."""
        for hook in self._run.events.on_after_backward:
            hook()

    def _end(self, j: int) -> None:
        run, window = self._run, self._window
        batch = window.present(j)
        window.loss = loss = self._losses[j]
        self._recorder.log_loss(loss)
        if self._pipeline.is_last and not window.weighs_nothing:
            self._guard.guarded(loss, loss)
        run.progress.local_batches += 1
        for hook in run.events.on_train_batch_end:
            hook(batch, window.batch_idx, loss)
