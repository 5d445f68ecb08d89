"""What a run records: metric rows, timing rows, and the means in them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from paceline.errors import MetricError
from paceline.log.accumulator import Accumulator, merge
from paceline.log.secrets import masked
from paceline.log.sinks import RunInfo
from paceline.trainer.names import load_by_name, settings_of, unique_names
from paceline.trainer.progress import as_number
from paceline.trainer.run import Run

_RESERVED = ("step", "epoch", "samples", "items")


class Recorder:
    """Collects logged values and turns them into rows for the sinks.

    Args:
        run: whose counters the rows carry.
        sinks: where rows go; used on rank 0.

    Attributes:
        train, val: open sums of training and of the validation at hand.
        wanted: whether anybody looks at rows; if not, the loop's own loss is not even added.
        ended: whether the last row is written.
    """

    def __init__(self, run: Run, sinks: list[Any]) -> None:
        self._run = run
        self._world = run.world
        self._main = run.world.is_main
        self.sinks = sinks
        self._made_with: dict[str, Any] = {}
        free = run.world.reads_are_free
        self.train = Accumulator(reads_are_free=free)
        self.val = Accumulator(reads_are_free=free)
        self.wanted = bool(sinks) or bool(run.events.on_step_end)
        self.ended = False
        self._timing: dict[str, float] = {}
        self._since = time.perf_counter()

    def log(self, name: str, value: Any, weight: Any = None) -> None:
        """Adds a value to the open sums; the arguments are those of `Trainer.log`.

        Args:
            name: of the metric.
            value: a number or a tensor of one element.
            weight: items the value is a mean over; None for those of the batch at hand.

        Raises:
            MetricError: every row has something by that name, or no row follows.
        """
        run = self._run
        if run.muted:
            return
        if weight is None:
            weight = 1.0 if run.batch_items is None else run.batch_items
        if self.ended:
            raise MetricError(
                f"log({name!r}, ...): the run's last row is written; log in on_train_end or before."
            )
        if name in _RESERVED:
            raise MetricError(f"log({name!r}, ...): every row has its own {name!r}; rename yours.")
        if run.validating:
            self.val.add(_of_loader(name, run.val_name), value, weight)
        else:
            self.train.add(name, value, weight)

    def log_loss(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's loss as "train/loss", if anybody looks at rows."""
        if self.wanted and not self._run.muted:
            self.train.add("train/loss", loss, self._run.batch_items)

    def row(self) -> dict[str, Any]:
        """The row of the steps since the last one, the same on every rank; starts a new one."""
        means = merge(self._world.gather_parts(self.train.sums()))
        self.train.reset()
        return {**self._counters(), **self._rates(), **means}

    def add_timing(self, name: str, value: float) -> None:
        """Adds a measurement to the next timing row.

        Args:
            name: the measurement's name.
            value: its value.
        """
        self._timing[name] = value

    def write(self, row: dict[str, Any]) -> None:
        """Sends a row to the sinks, and with it what was measured since the last."""
        if not self._main:
            self._timing.clear()
            return
        now = time.perf_counter()
        timing = {"step": row["step"], "seconds": now - self._since, **self._timing}
        self._since = now
        self._timing.clear()
        for sink in self.sinks:
            sink.write(row)
            sink.write_timing(timing)

    def validation_metrics(self, own: dict[str, float], samples: float) -> dict[str, float]:
        """All metrics of a validation: those logged, and the trainer's own, averaged over ranks.

        Args:
            own: the metrics of `get_val_metrics` on this rank.
            samples: this rank's items in the validation, the weight of its own metrics.
        """
        ours = {name: (float(value) * samples, samples) for name, value in own.items() if samples}
        parts = self._world.gather_parts((self.val.sums(), ours))
        self.val.reset()
        return {**merge([logged for logged, _ in parts]), **merge([given for _, given in parts])}

    def write_validation(self, metrics: dict[str, float]) -> None:
        """A row of its own for a validation."""
        if metrics:
            self.write({**self._counters(), **metrics})

    def sync(self) -> None:
        """Makes all rows durable, before a checkpoint that counts on them is published."""
        if self._main:
            for sink in self.sinks:
                sink.sync()

    def state_dict(self) -> dict[str, Any]:
        """The open sums of this rank's part and, on rank 0, the positions of its sinks."""
        state: dict[str, Any] = {}
        if self._world.leads_part:
            state["sums"] = self.train.state_dict()
        if self._main:
            state["made with"] = self._made_with
            state["sinks"] = {
                name: kept
                for name, sink in unique_names(self.sinks).items()
                if (kept := sink.state_dict())
            }
        return state

    def load_state_dict(self, ranks: dict[str, dict[str, Any]]) -> None:
        """Takes back this rank's open sums, or in another layout all of them on rank 0."""
        world = self._world
        sums = {int(rank): state["sums"] for rank, state in ranks.items() if "sums" in state}
        if world.all_gather_object(world.leads_part) == [r in sums for r in range(len(ranks))]:
            self.train.load_state_dict(sums.get(world.rank, {}))
        elif self._main:
            totals: dict[str, list[float]] = {}
            for _, of_rank in sorted(sums.items()):
                for name, (total, weight) in of_rank.items():
                    pair = totals.setdefault(name, [0.0, 0.0])
                    pair[0], pair[1] = pair[0] + total, pair[1] + weight
            self.train.load_state_dict(totals)

    def open(self, ranks: dict[str, dict[str, Any]] | None) -> None:
        """Opens the sinks, and sends them back to where they stood.

        Args:
            ranks: the part `rank` of the state that the run resumes from; None if it starts.
        """
        if not self._main:
            return
        run, settings = self._run, self._run.settings
        recipe = settings.resolved_recipe
        info = RunInfo(
            folder=settings.run_dir,
            id=run.id,
            identity=run.identity.keys,
            recipe=None if recipe is None else masked(recipe),
            resumed=ranks is not None,
        )
        self._made_with = settings_of(unique_names(self.sinks))
        for sink in self.sinks:
            sink.open(info)
        if ranks is not None and not run.is_over:  # else rows of its end may follow the checkpoint
            self.load_sinks(ranks)

    def load_sinks(self, ranks: dict[str, dict[str, Any]]) -> None:
        """Moves the sinks back to their saved positions; to be called when they are open."""
        if self._main:
            sinks, own = unique_names(self.sinks), ranks["0"]
            before = own.get("made with")
            load_by_name("logger", sinks, own["sinks"], self._world.say, self._made_with, before)

    def close(self, status: str) -> None:
        """Ends the sinks."""
        if self._main:
            for sink in self.sinks:
                sink.close(status)

    def _rates(self) -> dict[str, float]:
        """The rate that each optimizer's last step used; where its groups differ, of each group."""
        optimizers = self._run.components.named_optimizers()
        row: dict[str, float] = {}
        for name, rates in self._run.progress.rates.items():
            of_groups = group_rates(name, optimizers, rates)
            row["lr" if len(optimizers) == 1 else f"lr/{name}"] = float(rates[0])
            if len(set(of_groups.values())) > 1:
                row.update(of_groups)
        return row

    def _counters(self) -> dict[str, Any]:
        progress = self._run.progress
        return {
            "step": progress.global_step,
            "epoch": progress.epoch,
            "samples": progress.samples,
            "items": as_number(progress.items),
        }


def group_rates(
    name: str, optimizers: Mapping[str, torch.optim.Optimizer], rates: Sequence[Any]
) -> dict[str, float]:
    """The rates of an optimizer's parameter groups, by their names in a row.

    Args:
        name: of the optimizer.
        optimizers: all, by name.
        rates: one a group.

    Returns:
        "lr/<group>", or "lr/<optimizer>/<group>" of one of several, by the groups' own `name` or
        their index.
    """
    start = "lr" if len(optimizers) == 1 else f"lr/{name}"
    labels = [group.get("name", index) for index, group in enumerate(optimizers[name].param_groups)]
    if len(set(labels)) < len(labels):
        labels = list(range(len(labels)))
    return {f"{start}/{label}": float(rate) for label, rate in zip(labels, rates, strict=False)}


def _of_loader(metric: str, loader: str | None) -> str:
    """What a validation metric is called where several loaders are validated on."""
    if loader is None:
        return metric
    return f"val/{loader}/{metric.removeprefix('val/')}"
