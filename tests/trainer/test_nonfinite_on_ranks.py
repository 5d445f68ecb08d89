"""A loss that is not finite on one rank: all judge the window alike, and as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_runs import Small, network, small, weights

from paceline import CheckpointPolicy, Parallel
from paceline.errors import NonFiniteError, PeerError
from paceline.testing import Ranks
from paceline.trainer.callback import Callback
from paceline.world.world import World


class Skipped(Callback):
    """The weights before and after each window, and in the end."""

    def __init__(self) -> None:
        self.after: list[list[torch.Tensor]] = []
        self.last: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any) -> None:
        self.after.append(weights(trainer))

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.after.append(weights(trainer))

    def on_teardown(self, trainer: Any) -> None:
        self.last = weights(trainer)


def not_finite(
    folder: Path, policy: str, batch: int, shard: int, kind: str = "plain", device: bool = False
):
    """Sample 17 is the last one's of 4 ranks in the third window of 8 (accumulation 2)."""
    if device:  # as on an accelerator: no value is read in a step, the fused optimizer is masked
        World.reads_are_free = property(lambda self: False)  # pyright: ignore
    kept = Skipped()
    trainer = small(
        kept,
        rows=32,
        batch=batch,
        model=network(kind),
        fused=device,
        gradient_accumulation_steps=2,
        on_nonfinite=policy,
        checkpoint=CheckpointPolicy(every_steps=1),
        max_steps=8 if policy == "rewind" else 4,
        log_every=2,
        run_dir=folder,
        parallel=Parallel(dp_shard=shard),
    )
    trainer.bad = True
    error = ""
    try:
        trainer.train(seed=1)
    except (NonFiniteError, PeerError) as raised:  # its own, or another rank's that was faster
        error = str(raised)
    return {
        "error": error,
        "after": kept.after,
        "weights": kept.last,
        "step": trainer.global_step,
        "stopped_by": trainer.result.stopped_by,
        "skips": trainer.progress.skips,
    }


def check_not_finite(
    ranks: Ranks, folder: Path, policy: str, shard: int = 1, *kind: Any
) -> list[Any]:
    """4 ranks agree with one another and with one rank of 4 times the batch."""
    (one,) = ranks(not_finite, 1, folder / "one", policy, 4, 1, *kind)
    outcomes = ranks(not_finite, 4, folder / "four", policy, 1, shard, *kind)
    for outcome in outcomes:
        for key in ("step", "stopped_by", "skips"):
            assert outcome[key] == one[key], key
        assert all(torch.isfinite(p).all() for p in outcome["weights"])
        for a, b in zip(outcome["weights"], one["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    return outcomes


@pytest.mark.parametrize(("kind", "shard"), [("plain", 1), ("dead", 2), ("rooted", 2)])
def test_one_ranks_loss_is_every_ranks_error(
    ranks: Ranks, tmp_path: Path, kind: str, shard: int
) -> None:
    outcomes = check_not_finite(ranks, tmp_path, "raise", shard, kind)
    for outcome in outcomes:
        assert "step 3 is not finite" in outcome["error"]
        assert "rank 1, batch 4: loss nan; samples [17]" in outcome["error"]
        before = outcome["after"][-1]
        assert all(torch.equal(a, b) for a, b in zip(before, outcome["weights"], strict=True))


@pytest.mark.parametrize(("policy", "shard"), [("skip", 4), ("stop", 1), ("rewind", 2)])
def test_all_leave_the_window_out_or_stop(
    ranks: Ranks, tmp_path: Path, policy: str, shard: int
) -> None:
    kind = "rooted" if shard == 4 else "plain"
    outcomes = check_not_finite(ranks, tmp_path, policy, shard, kind)
    for outcome in outcomes:
        assert outcome["stopped_by"] == ("non-finite" if policy == "stop" else "max_steps")
        assert outcome["step"] == {"stop": 3, "skip": 4, "rewind": 8}[policy]
        assert outcome["skips"] == ([2, 6] if policy == "rewind" else [])


@pytest.mark.parametrize(
    ("policy", "shard", "kind"),
    [("raise", 1, "dead"), ("skip", 1, "dead"), ("skip", 2, "rooted")],
)
def test_where_reading_waits_nothing_is_read(
    ranks: Ranks, tmp_path: Path, policy: str, shard: int, kind: str
) -> None:
    """Nothing is read within a step; the verdict masks the step on every rank alike."""
    for outcome in check_not_finite(ranks, tmp_path, policy, shard, kind, True):
        assert ("step 3 is not finite" in outcome["error"]) == (policy == "raise")
        assert len(outcome["after"]) == (4 if policy == "raise" else 5)


class Partial(Small):
    """Rank 1's third loss is finite, but the gradient of its first output is not."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y, _ = batch
        out = self.model(x)
        loss = (out - y).square().mean()
        if self.world.rank == 1 and self.global_step == 2 and not self.muted:
            loss = loss + (out[:, 0] * 0).sqrt().sum()
        return loss


def partly_bad() -> tuple[str, int, int]:
    exchanges = count_calls("all_reduce")
    trainer = small(model=network("rooted"), parallel=Parallel(dp_shard=2), validate_every=100)
    trainer.__class__ = Partial
    before = len(exchanges)
    try:
        trainer.train(seed=1)
    except NonFiniteError as error:
        return str(error), trainer.global_step, len(exchanges) - before
    return "", trainer.global_step, len(exchanges) - before


def count_calls(name: str) -> list[str]:
    """A list that gets an entry for each call of a collective from Python."""
    calls: list[str] = []
    collective = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return collective(*args, **kwargs)

    setattr(dist, name, counted)
    return calls


def test_ranks_that_share_a_copy_see_one_anothers_nan_in_what_they_exchange(ranks: Ranks) -> None:
    """One NaN in a gradient of one rank is every rank's, without an exchange of its own."""
    for error, step, exchanges in ranks(partly_bad, 2):
        assert "step 3 is not finite" in error
        assert "first parameter with a non-finite gradient: model.head.weight" in error
        assert (step, exchanges) == (2, 0)
