"""When to write a checkpoint, and which ones to keep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.errors import ConfigError, refuses_unknown

NATIVE = "native"
"""The name of the checkpoint engine that ships with Paceline."""


@refuses_unknown(
    save_every_n_steps="every_steps",
    save_every_n_epochs="every_epochs",
    permanent_save_every_n_steps="keep_every_steps",
    save_last_k="keep_last",
    checkpoint_every_n_epochs="every_epochs",
    checkpoint_every_n_train_steps="every_steps",
    keep_top_k="keep_best",
    save_top_k="keep_best",
    monitor="Trainer(metric_monitor=MetricMonitor(...))",
    enable="Trainer(checkpoint=None) for no checkpoints",
)
@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When a run saves checkpoints, and which of them it keeps.

    Whatever the policy, the final state is saved, whether the run finished or was stopped. After a
    step that was not finite, the checkpoint before it is kept too, for `--replay-failure`.

    Args:
        every_epochs: save at the end of every n-th epoch; None for never.
        every_steps: save after every n-th optimizer step; None for never.
        keep_last: how many of the newest checkpoints to keep; None for all. Those saved only
            because the metric improved do not count. The same limit applies to checkpoints set
            aside as damaged, and to those set aside as abandoned.
        keep_every_steps: also keep, permanently, checkpoints at multiples of this many steps.
        save_best: save when the monitored metric improves, and keep the best checkpoint.
        keep_best: how many of the best checkpoints to keep, by the monitored metric; with more
            than one, each validation among the best so far is saved.
        asynchronous: write in the background while training continues. Takes host memory for one
            copy of the state.
        engine: what stores the checkpoints: "native", or a `CheckpointEngine` of your own by the
            name under which it is registered. `paceline export` reads native ones alone.

    Raises:
        ConfigError: a value has the wrong type, or a number is not at least 1.
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    keep_last: int | None = 1
    keep_every_steps: int | None = None
    save_best: bool = True
    keep_best: int = 1
    asynchronous: bool = True
    engine: str = NATIVE

    def __post_init__(self) -> None:
        mistakes = []
        for name in ("every_epochs", "every_steps", "keep_last", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                mistakes.append(
                    f"{name} must be a whole number of at least 1 or None, not {value!r}"
                )
        if type(self.keep_best) is not int or self.keep_best < 1:
            mistakes.append(
                f"keep_best must be a whole number of at least 1, not {self.keep_best!r} "
                "(save_best=False keeps none)"
            )
        for name in ("save_best", "asynchronous"):
            if type(getattr(self, name)) is not bool:
                mistakes.append(f"{name} must be true or false, not {getattr(self, name)!r}")
        if type(self.engine) is not str:
            mistakes.append(f"engine must be the name of a checkpoint engine, not {self.engine!r}")
        if mistakes:
            raise ConfigError("checkpoint: " + "; ".join(mistakes))

    def in_words(self, *, monitored: bool) -> str:
        """When it saves and what it keeps, as a line of the plan.

        Args:
            monitored: whether there is a metric, of which one may be the best.
        """
        best = self.save_best and monitored
        when = [
            *([] if self.every_epochs is None else [f"every {_some('epoch', self.every_epochs)}"]),
            *([] if self.every_steps is None else [f"every {_some('step', self.every_steps)}"]),
            *(["at each best metric"] if best else []),
        ]
        kept = [
            "all" if self.keep_last is None else f"the newest{_count(self.keep_last)}",
            *([f"the best{_count(self.keep_best)}"] if best else []),
            *([f"those of every {self.keep_every_steps} steps"] if self.keep_every_steps else []),
        ]
        waits = "" if self.asynchronous else "; training waits"
        engine = "" if self.engine == NATIVE else f"; engine {self.engine}"
        times = " and ".join(when) or "at the end"
        return f"saves {times}, keeps {' and '.join(kept)}{waits}{engine}"


def _some(noun: str, count: int) -> str:
    return noun if count == 1 else f"{count} {noun}s"


def _count(number: int) -> str:
    return "" if number == 1 else f" {number}"


class Kept(Protocol):
    """What `to_keep` needs to know about a checkpoint."""

    @property
    def save_id(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def best(self) -> bool: ...
    @property
    def info(self) -> Mapping[str, Any]: ...


def reasons_due(
    policy: CheckpointPolicy,
    *,
    step: int,
    epochs_done: int | None = None,
    improved: bool = False,
) -> list[str]:
    """The reasons for a checkpoint at this boundary.

    Args:
        policy: the settings.
        step: optimizer steps done.
        epochs_done: epochs done, if one has just ended; None in the middle of an epoch.
        improved: whether the monitored metric has just become one of the best.

    Returns:
        Some of `"step"`, `"epoch"`, `"best"`, in this order; empty if no checkpoint is due.
    """
    reasons = []
    if policy.every_steps is not None and step > 0 and step % policy.every_steps == 0:
        reasons.append("step")
    if policy.every_epochs is not None and epochs_done and epochs_done % policy.every_epochs == 0:
        reasons.append("epoch")
    if policy.save_best and improved:
        reasons.append("best")
    return reasons


def among_best(score: Mapping[str, Any], checkpoints: Iterable[Kept], count: int) -> bool:
    """Whether a validation is among the best of those that have a checkpoint.

    Args:
        score: the monitored `metric`, its `mode` and its `value`, as in a checkpoint's `info`.
        checkpoints: those that exist.
        count: how many are the best.
    """
    others = [c.info["score"] for c in checkpoints if _comparable(c, score)]
    better = [one for one in others if _rank(one) < _rank(score)]
    return len(better) < count


def to_keep(
    policy: CheckpointPolicy,
    checkpoints: Iterable[Kept],
    also: Collection[int] = (),
    *,
    failed_step: int | None = None,
) -> set[int]:
    """The `save_id`s that pruning must leave alone.

    Args:
        policy: the settings.
        checkpoints: all that exist.
        also: further `save_id`s to keep.
        failed_step: the step, from 1, that was not finite and may be replayed: the newest
            checkpoint before it is kept. None without one.
    """
    by_age = sorted(checkpoints, key=lambda checkpoint: checkpoint.save_id)
    counted = [c for c in by_age if c.info.get("reasons") != ["best"]]
    newest = counted if policy.keep_last is None else counted[-policy.keep_last :]
    keep = {checkpoint.save_id for checkpoint in [*newest, *by_age[-1:]]} | set(also)
    if policy.save_best:
        keep |= {checkpoint.save_id for checkpoint in _best(by_age)[: policy.keep_best]}
    if policy.keep_every_steps is not None:
        keep |= {c.save_id for c in by_age if c.step % policy.keep_every_steps == 0}
    if failed_step is not None:
        keep |= {c.save_id for c in [c for c in by_age if c.step < failed_step][-1:]}
    return keep


def _best(by_age: Sequence[Kept]) -> list[Kept]:
    """The best first: the last one marked best, then by what the same metric was at its step."""
    marked = [c for c in by_age if c.best][-1:]
    latest = next((c.info["score"] for c in reversed(by_age) if c.info.get("score")), None)
    if latest is None:
        return marked
    scored = [c for c in by_age if c not in marked and _comparable(c, latest)]
    return [*marked, *sorted(scored, key=lambda c: _rank(c.info["score"]))]


def _comparable(checkpoint: Kept, score: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved after a validation that measured the same metric."""
    own = checkpoint.info.get("score")
    return own is not None and (own["metric"], own["mode"]) == (score["metric"], score["mode"])


def _rank(score: Mapping[str, Any]) -> float:
    """The lower the better."""
    return score["value"] if score["mode"] == "min" else -score["value"]
