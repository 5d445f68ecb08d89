"""Trainers broken on purpose, each with a test that has to notice.

A defect is put in with pytest's monkeypatch, here and in every rank that the test starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import torch
from test_p01_on_ranks import Plan
from test_p03_same_mathematics import Case as Sum
from test_p04_every_sample_once import Case as Pass

from paceline.data import loader
from paceline.data.indexed import IndexedSource, IndexedValidation, Layout
from paceline.data.streamed import StreamedSource
from paceline.trainer import placement, recorder, validation, window
from paceline.trainer.nonfinite import NonFiniteGuard
from paceline.trainer.optimization import Optimization
from paceline.trainer.placement import Replica
from paceline.trainer.recorder import Recorder
from paceline.trainer.stop import StopAgreement
from paceline.trainer.window import Window
from paceline.world.seeding import seed_everything
from paceline.world.world import World


@dataclass(frozen=True)
class Mutant:
    """A defect, and the test that catches it.

    Args:
        name: what is wrong with this trainer.
        replaces: pairs of (owner, attribute) that the defect takes the place of.
        defect: the function, property or value put there.
        test: "module:function" under `tests/`.
        arguments: for the test, beside the fixtures `ranks` and `tmp_path` (or `folder`).
    """

    name: str
    replaces: tuple[tuple[Any, str], ...]
    defect: Any
    test: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for owner, attribute in self.replaces:
            monkeypatch.setattr(owner, attribute, self.defect)


def apply(name: str) -> None:
    """Puts a defect into this process for good."""
    next(mutant for mutant in MUTANTS if mutant.name == name).put_in(pytest.MonkeyPatch())


def nothing(*_: Any, **__: Any) -> None:
    """In place of something that matters."""


def same_weight(self: Any, loss: torch.Tensor, window: Window) -> torch.Tensor:
    return loss / len(window)


def one_rank_s_weight(self: Any, loss: torch.Tensor, window: Window) -> torch.Tensor:
    return loss * window.weight / self._trainer.world.dp_size


def mean_of_means(parts: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    names = {name for part in parts for name in part}
    means = {name: [p[name][0] / p[name][1] for p in parts if name in p] for name in names}
    return {name: sum(values) / len(values) for name, values in sorted(means.items())}


def unmuted(self: Any) -> None:
    self._held = []


def always_exchanged(self: Replica, *, exchange: bool) -> None:
    vars(self).update(called=False, require_backward_grad_sync=True)


def unreduced(self: World, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    return tensor


def floored(self: Layout, start: int, stop: int) -> tuple[int, int]:
    each = (stop - start) // self._ranks
    return start + self._rank * each, start + (self._rank + 1) * each


def padded(self: Layout, start: int, stop: int) -> tuple[int, int]:
    each = -(-(stop - start) // self._ranks)
    first = min(start + self._rank * each, stop - each)
    return first, first + each


def same_pass(self: Layout, epoch: int, start: int, stop: int) -> Any:
    length = self.order.length(0)
    return [
        (epoch, self.order.slice(epoch, i % length, i % length + 1)) for i in range(start, stop)
    ]


_local = count()


def by_local_count(seed: int) -> None:
    seed_everything(next(_local))


def with_stand_ins(self: IndexedValidation) -> Any:
    for batch in self._reader.read(0, 0):
        yield batch, -1


def own_position(self: IndexedSource) -> dict[str, int]:
    return {"epoch": self._epoch, "offset": self._offset // self._layout._ranks}


def unshared(order: Any, name: str, world: World) -> Any:
    return order


def keeps_share(sampler: Any) -> bool | None:
    return False if type(sampler) is loader.SequentialSampler else None


def unleveled(self: StreamedSource, batches: list[Any]) -> int:
    return len(batches)


def from_the_start(self: StreamedSource, batches: int) -> None:
    self._in_pass = batches


def own_end(self: StopAgreement, point: int, reason: str) -> None:
    self._stop_at, self.reason = self._committed, reason
    self._agreed.set()


def held_before(self: StopAgreement, point: int) -> None:
    if not self._frozen:
        self._committed = point - 1


def scaled_only(self: NonFiniteGuard, weighted: torch.Tensor, poison: Any) -> torch.Tensor:
    return weighted * (poison + 1)


def own_value(self: World, value: Any) -> Any:
    return value


P1, P3, P4 = "test_p01_on_ranks", "test_p03_same_mathematics", "test_p04_every_sample_once"
AGREE = "test_ranks_agree"
LONG = {"n": 7, "batch": 3, "ranks": 2, "accumulation": 2, "length": 3, "shuffle": True}
SHORT = {"n": 11, "batch": 2, "ranks": 3, "accumulation": 2, "length": None, "shuffle": True}


def chain(size: int, *stops: int, **plan: Any) -> dict[str, Any]:
    return {"size": size, "plan": Plan(**plan), "stops": list(stops)}


MUTANTS = [
    Mutant(
        "every micro-batch of a window weighs the same",
        ((Optimization, "_weighted"),),
        same_weight,
        f"{P3}:test_micro_batches_equal_one_batch",
        {"tokens": False},
    ),
    Mutant(
        "a batch without items spoils its window",
        ((Window, "weighs_nothing"),),
        False,
        f"{P3}:test_micro_batches_equal_one_batch",
        {"tokens": True},
    ),
    Mutant(
        "DDP's mean over ranks is taken for the mean over items",
        ((Optimization, "_weighted"),),
        one_rank_s_weight,
        f"{P3}:check_ranks",
        {"size": 2, "cases": [Sum()]},
    ),
    Mutant(
        "each rank counts its own items only",
        ((World, "all_reduce"),),
        unreduced,
        f"{P3}:check_ranks",
        {"size": 2, "cases": [Sum(tokens=True)]},
    ),
    Mutant(
        "a metric is the mean of the ranks' means",
        ((recorder, "merge"),),
        mean_of_means,
        f"{P3}:check_ranks",
        {"size": 2, "cases": [Sum()]},
    ),
    Mutant(
        "stand-ins are logged",
        ((window._buffers_kept, "__enter__"),),
        unmuted,
        f"{P3}:check_ranks",
        {"size": 4, "cases": [Sum(3)]},
    ),
    Mutant(
        "stand-ins move running statistics",
        ((window._buffers_kept, "__exit__"),),
        nothing,
        f"{P3}:test_stand_ins_leave_running_statistics_alone",
        {"size": 2},
    ),
    Mutant(
        "gradients are exchanged in every micro-batch",
        ((Replica, "begin"),),
        always_exchanged,
        f"{P3}:test_gradients_are_exchanged_once_a_window",
    ),
    Mutant(
        "gradients that are never exchanged go unnoticed",
        ((Replica, "check_exchanged"),),
        nothing,
        f"{P3}:test_gradients_that_nobody_exchanged_are_refused",
    ),
    Mutant(
        "what ranks cannot share evenly is left out",
        ((Layout, "share"),),
        floored,
        "test_p04_arithmetic:check_passes",
        {"layout": SHORT},
    ),
    Mutant(
        "ranks are filled up to the same number with samples seen twice",
        ((Layout, "share"),),
        padded,
        "test_p04_arithmetic:check_passes",
        {"layout": SHORT},
    ),
    Mutant(
        "every epoch begins a pass, whatever its length",
        ((Layout, "request"),),
        same_pass,
        "test_p04_arithmetic:check_passes",
        {"layout": LONG},
    ),
    Mutant(
        "a checkpoint counts this rank's samples",
        ((IndexedSource, "state_dict"),),
        own_position,
        "test_p04_arithmetic:check_elastic",
        {"n": 50, "batch": 2, "shuffle": True, "sizes": [2, 1], "steps": [1, 1]},
    ),
    Mutant(
        "validation sees stand-ins",
        ((IndexedValidation, "batches"),),
        with_stand_ins,
        f"{P4}:check_runs",
        {"size": 2, "cases": [Pass(5, 2)]},
    ),
    Mutant(
        "a DistributedSampler's share is shared out again",
        ((loader, "_shuffles"),),
        keeps_share,
        f"{P4}:check_runs",
        {"size": 2, "cases": [Pass(sampler="distributed")]},
    ),
    Mutant(
        "a sampler's own share is shared out again",
        ((loader, "_shared"),),
        unshared,
        f"{P4}:test_a_sampler_that_shares_out_the_data_itself_is_refused",
    ),
    Mutant(
        "a rank whose stream has ended leaves the others waiting",
        ((StreamedSource, "_level"),),
        unleveled,
        f"{P4}:test_streams_of_any_lengths_end_together",
    ),
    Mutant(
        "DDP arranges its buckets anew in each process",
        ((placement, "_settle_buckets"),),
        nothing,
        f"{P1}:check_chain",
        chain(4, 4, batch=3),
    ),
    Mutant(
        "each rank saves its own running statistics",
        ((placement, "share_buffers"), (validation, "share_buffers")),
        nothing,
        f"{P1}:check_chain",
        chain(2, 3),
    ),
    Mutant(
        "the open row is forgotten",
        ((Recorder, "load_state_dict"),),
        nothing,
        f"{P1}:check_chain",
        chain(2, 1),
    ),
    Mutant(
        "dropout depends on how many batches this process has seen",
        ((window, "seed_everything"),),
        by_local_count,
        f"{P1}:check_chain",
        chain(2, 2),
    ),
    Mutant(
        "a replayed stream begins again",
        ((StreamedSource, "_replay"),),
        from_the_start,
        f"{P1}:check_chain",
        chain(2, 1, data="replayed", steps=4),
    ),
    Mutant(
        "each rank stops where it stands",
        ((StopAgreement, "_settle"),),
        own_end,
        f"{AGREE}:test_a_rank_that_is_behind_comes_to_where_the_other_is",
        {"in_validation": False},
    ),
    Mutant(
        "a rank in validation takes back that it has passed the boundary's begin",
        ((StopAgreement, "hold"),),
        held_before,
        f"{AGREE}:test_a_rank_that_is_behind_comes_to_where_the_other_is",
        {"in_validation": True},
    ),
    Mutant(
        "a bad loss is told to the others through the model alone",
        ((NonFiniteGuard, "_poisoned"),),
        scaled_only,
        f"{AGREE}:test_raise",
        {"kind": "dead"},
    ),
    Mutant(
        "each rank decides by its own metrics",
        ((World, "broadcast_object"),),
        own_value,
        f"{AGREE}:test_what_is_best_is_decided_by_rank_0_for_all",
    ),
]
