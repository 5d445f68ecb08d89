"""What a run records: metric rows, timing rows, and the means in them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from paceline.errors import MetricError
from paceline.log.accumulator import Accumulator, merge
from paceline.log.media import Media
from paceline.log.secrets import masked
from paceline.log.sinks import RunInfo, Sink
from paceline.trainer.names import load_by_name, settings_of, unique_names
from paceline.trainer.progress import as_number
from paceline.trainer.run import Run

Sums = dict[str, tuple[float, float]]
"""Sums of value x weight and of weight, by name."""

_MOST = 50  # optimizer steps between two rows, unless the user says more
_RESERVED = ("step", "epoch", "samples", "items")


def rows_every(windows_per_epoch: int | None) -> int:
    """Optimizer steps between two rows that nobody has set: some ten rows an epoch.

    Args:
        windows_per_epoch: optimizer steps in an epoch; None if nobody knows.
    """
    return _MOST if windows_per_epoch is None else min(_MOST, max(1, windows_per_epoch // 10))


class Recorder:
    """Collects logged values and turns them into rows for the sinks.

    Args:
        run: whose counters the rows carry.
        sinks: where rows go; used on rank 0.

    Attributes:
        train, val: open sums of training and of the validation at hand.
        wanted: whether anybody looks at rows; if not, the loop's own loss is not even added.
        every: optimizer steps between two rows.
        default_every: what it is while the user sets nothing.
        writes: whether rows are written; if not, epochs have none.
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
        self.writes = bool(sinks)
        self.wanted = self.writes or bool(run.events.on_step_end)
        self.every = self.default_every = _MOST
        self.ended = False
        self._said_unseen = False
        # Sums of the open row from before the epoch, and of the epoch from before the open row.
        self._carried: Sums = {}
        self._epoch: Sums = {}
        self._timing: dict[str, float] = {}
        self._since = time.perf_counter()

    def log(self, name: str, value: Any, weight: Any = None) -> None:
        """Adds a value to the open sums; the arguments are those of `Trainer.log`.

        Args:
            name: of the metric.
            value: a number or a tensor of one element, or `Media`.
            weight: items the value is a mean over; None for those of the batch at hand.

        Raises:
            MetricError: every row has something by that name, or no row follows.
        """
        run = self._run
        if run.muted:
            return
        if isinstance(value, Media):
            return self._show(name, value)
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

    def _show(self, name: str, value: Media) -> None:
        """Hands what is no number to the sinks at once."""
        if not self._main:
            return
        if not (self.shows_media or self._said_unseen):
            self._said_unseen = True
            self._world.say(
                f"log({name!r}, {type(value).__name__}(...)): no logger here shows it; add one, "
                "such as TensorBoard()."
            )
        for sink in self.sinks:
            sink.write_media(self._run.global_step, _of_loader(name, self._run.val_name), value)

    @property
    def shows_media(self) -> bool:
        """Whether a sink shows images, histograms, text or tables."""
        return any(type(sink).write_media is not Sink.write_media for sink in self.sinks)

    def log_loss(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's loss as "train/loss", if anybody looks at rows."""
        if self.wanted and not self._run.muted:
            items = self._run.batch_items  # None in a step() that passes over its window
            self.train.add("train/loss", loss, 1.0 if items is None else items)

    def row(self) -> dict[str, Any]:
        """The row of the steps since the last one, the same on every rank; starts a new one."""
        fresh = self.train.sums()
        means = merge(self._world.gather_parts(_added(self._carried, fresh)))
        self._epoch = _added(self._epoch, fresh) if self.writes else {}
        self._carried = {}
        self.train.reset()
        return {**self._counters(), **self._rates(), **means}

    @property
    def has_open_row(self) -> bool:
        """Whether anything has been logged since the last row."""
        return bool(self._carried or self.train.sums())

    def end_epoch(self) -> None:
        """Writes the row of the epoch that ends: the means of all that was logged in its steps."""
        if not self.writes:
            self._epoch = {}
            return
        fresh = self.train.sums()
        means = merge(self._world.gather_parts(_added(self._epoch, fresh)))
        self._epoch, self._carried = {}, _added(self._carried, fresh)
        self.train.reset()
        if means:
            row = {f"epoch/{name}": mean for name, mean in means.items()}
            self.write({**self._counters(), **row})

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

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """A row of its own: of a validation, or of an experience.

        Args:
            metrics: equal on every rank.
        """
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
            state |= {name: sums for name, sums in self._kept().items() if sums}
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
        leading = {int(rank) for rank, state in ranks.items() if "sums" in state}
        alike = world.all_gather_object(world.leads_part) == [
            rank in leading for rank in range(len(ranks))
        ]
        mine = {world.rank} if alike else leading if self._main else set()
        loaded: dict[str, Sums] = {"sums": {}, "carried": {}, "epoch": {}}
        for rank in sorted(mine & leading):
            for kind, sums in loaded.items():
                loaded[kind] = _added(sums, ranks[str(rank)].get(kind, {}))
        self.train.load_state_dict(loaded["sums"])
        self._carried, self._epoch = loaded["carried"], loaded["epoch"]

    def _kept(self) -> dict[str, Any]:
        return {
            kind: {name: list(pair) for name, pair in sums.items()}
            for kind, sums in (("carried", self._carried), ("epoch", self._epoch))
        }

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
        # Rows of its end may follow the checkpoint, once it has come to its end.
        if ranks is not None and (not run.is_over or run.lacks_end):
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


def _added(one: Sums, other: Mapping[str, Any]) -> Sums:
    """Sums of both, by name."""
    sums = dict(one)
    for name, (total, weight) in other.items():
        before = sums.get(name)
        sums[name] = (total, weight) if before is None else (before[0] + total, before[1] + weight)
    return sums


def _of_loader(metric: str, loader: str | None) -> str:
    """What a validation metric is called where several loaders are validated on."""
    if loader is None:
        return metric
    return f"val/{loader}/{metric.removeprefix('val/')}"
