"""Assertions for your own trainer: exact resume, undisturbed training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paceline.checkpoint.comparison import differing
from paceline.errors import some
from paceline.log.sinks import METRICS_FILE
from paceline.testing.comparison import first_difference, rows
from paceline.testing.ranks import run_ranks
from paceline.testing.tracing import Build, Ending, StopAt, traced_run, trained_state

_SHOWN = 4  # paths of a tree that a message names
# These events surround each start of a run; on_save_checkpoint also comes with each stop.
_AROUND = {"on_setup", "on_load_checkpoint", "on_train_start", "on_save_checkpoint", "on_teardown"}
_REPRODUCIBLE = (
    "so the trainer is not reproducible. Draw random numbers from the global generators of torch, "
    "numpy and random, which every run seeds; on an accelerator set deterministic=True."
)
_NOT_SAVED = (
    "so training depends on something that is not in the checkpoint: keep it in a buffer of the "
    "model, in a callback's state_dict, or in checkpoint_objects."
)


def assert_resumes_exactly(
    build: Build,
    folder: str | Path,
    *,
    stop_at: int | Sequence[int],
    ranks: int | None = None,
    seed: int = 0,
    limit: float = 60.0,
) -> None:
    """Asserts that a stopped and resumed run ends exactly as an uninterrupted one.

    Trains one run to its end, and another that is stopped and resumed with new objects. Weights,
    optimizer state and all other saved state, the rows of metrics.jsonl, the samples of each step
    and the events must be equal, bit by bit, on every rank.

    Args:
        build: takes a run's folder and returns a new trainer with `run_dir` set to it. With
            `ranks` it must be at the top level of a module, which new processes import.
        folder: where the runs go, in a new folder.
        stop_at: the optimizer step after which to stop, or several, to stop after each in turn.
        ranks: number of gloo processes to train in, new ones for each part; 1 also finds state that
            is kept in modules. None trains in this process.
        seed: of the runs.
        limit: seconds after which ranks that still run are killed.

    Raises:
        AssertionError: the runs differ; the message says where, and whether two uninterrupted runs
            differ as well.
        RanksFailed: a rank raised an error or hung.
    """
    stops = [stop_at] if isinstance(stop_at, int) else list(stop_at)
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept = Path(tempfile.mkdtemp(prefix="resumed-", dir=folder))

    def run(name: str, *callbacks: StopAt) -> list[Ending]:
        """The endings by rank."""
        if ranks is None:
            return [traced_run(build, kept / name, *callbacks, seed=seed)]
        train = partial(traced_run, seed=seed)
        return run_ranks(train, ranks, build, kept / name, *callbacks, limit=limit)

    whole = run("uninterrupted")
    _check_uninterrupted(whole[0])
    parts = []
    for stop in stops:
        parts.append(run("interrupted", StopAt(stop)))
        _check_stopped(parts[-1][0], stop)
    parts.append(run("interrupted"))
    problems = _in_rows(kept / "interrupted", kept / "uninterrupted")
    problems += _problems(list(zip(*parts, strict=True)), whole)
    if not problems:
        return
    again = _problems([(one,) for one in run("again")], whole)
    reason = (
        f"Two uninterrupted runs differ as well, {_REPRODUCIBLE}"
        if again
        else f"Two uninterrupted runs are equal, {_NOT_SAVED}"
    )
    steps = ", ".join(map(str, stops))
    raise AssertionError(
        f"stopped after step {steps} and resumed, the run ends differently:\n"
        + "\n".join(f"- {problem}" for problem in problems)
        + f"\n{reason}"
    )


def assert_continues(parts: Sequence[Ending], whole: Ending) -> None:
    """Asserts that the parts of a run add up to an uninterrupted one.

    Args:
        parts: of one rank, in order; each but the last ended with a stop.
        whole: the same rank's uninterrupted run.

    Raises:
        AssertionError: samples, events or the state at the end differ; the message says where.
    """
    if problems := _problems([parts], [whole]):
        raise AssertionError("\n".join(problems))


def assert_undisturbed(
    build: Build,
    watched: Build,
    folder: str | Path,
    *,
    ranks: int | None = None,
    seed: int = 0,
    limit: float = 60.0,
) -> None:
    """Asserts that watching a run changes nothing: two trainers end with the same bits.

    Args:
        build: takes a run's folder and returns a new trainer.
        watched: returns the same trainer with something that only observes: a callback, a
            validation, more frequent rows or checkpoints.
        folder: where the runs go, in a new folder.
        ranks, seed, limit: as for `assert_resumes_exactly`.

    Raises:
        AssertionError: weights or optimizer state differ; the message says which.
        RanksFailed: a rank raised an error or hung.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept = Path(tempfile.mkdtemp(prefix="watched-", dir=folder))

    def train(how: Build, name: str) -> list[dict[str, Any]]:
        """The trained state by rank."""
        if ranks is None:
            return [trained_state(how, kept / name, seed=seed)]
        return run_ranks(partial(trained_state, seed=seed), ranks, how, kept / name, limit=limit)

    alone = train(build, "alone")
    problems = _in_states(train(watched, "watched"), alone)
    if not problems:
        return
    again = _in_states(train(build, "again"), alone)
    reason = f"\nTwo unwatched runs differ as well, {_REPRODUCIBLE}" if again else ""
    raise AssertionError("the watched run ends differently:\n" + "\n".join(problems) + reason)


def _check_uninterrupted(ending: Ending) -> None:
    if not ending.result.complete:
        raise AssertionError(
            f"the uninterrupted run stopped at step {ending.result.global_step} "
            f"({ending.result.stopped_by}): it must train to its end."
        )
    if ending.state is None:
        raise AssertionError(
            "the run saved no checkpoint: build must pass `run_dir` to the trainer and leave "
            "`checkpoint` on."
        )


def _check_stopped(ending: Ending, stop: int) -> None:
    if ending.result.complete or ending.result.global_step != stop:
        raise AssertionError(
            f"the run did not stop at step {stop}, but ended at step {ending.result.global_step} "
            f"({ending.result.stopped_by}): choose a step before its end, in rising order."
        )


def _problems(parts: Sequence[Sequence[Ending]], whole: Sequence[Ending]) -> list[str]:
    """Where each rank's parts differ from its uninterrupted run."""
    found = []
    for rank, (mine, one) in enumerate(zip(parts, whole, strict=True)):
        where = f"rank {rank}, " if len(whole) > 1 else ""
        resumed = _events(mine), [item for part in mine for item in part.samples.items()]
        unbroken = _events([one]), list(one.samples.items())
        for name, left, right in zip(("events", "samples"), resumed, unbroken, strict=True):
            if left != right:
                found.append(f"{where}{name}: {_first_difference(left, right)}")
        if paths := _in_trees(_comparable(mine[-1]), _comparable(one)):
            found.append(f"{where}state: {paths}")
    return found


def _events(parts: Sequence[Ending]) -> list[tuple[str, int]]:
    """The events of all parts, without what surrounds each start and what was abandoned."""
    events = []
    for part in parts:
        mine = part.events
        if part.state is not None and "validation" in part.state["progress"]["pending"]:
            # A stop abandons the validation under way; the next part begins with it.
            last = max(i for i, (event, _) in enumerate(mine) if event == "on_validation_start")
            mine = mine[:last]
        events += [entry for entry in mine if entry[0] not in _AROUND]
    return events


def _comparable(ending: Ending) -> dict[str, Any]:
    """The state without the sizes of the row files: measured times are of varying length."""
    state = dict(ending.state or {})
    state["rank"] = {
        rank: {key: value for key, value in part.items() if key != "sinks"}
        for rank, part in state.get("rank", {}).items()
    }
    return state


def _in_trees(left: dict[str, Any], right: dict[str, Any]) -> str:
    """The first paths at which two trees differ, as a phrase; empty if they are equal."""
    paths = [path.removeprefix("/") for path in differing(left, right, "")]
    return some(paths, _SHOWN)


def _in_states(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]) -> list[str]:
    """Where each rank's trained state differs from another run's."""
    pairs = enumerate(zip(left, right, strict=True))
    named = [(f"rank {rank}: " if len(left) > 1 else "", _in_trees(a, b)) for rank, (a, b) in pairs]
    return [f"- {where}{paths}" for where, paths in named if paths]


def _in_rows(left: Path, right: Path) -> list[str]:
    """Where the rows of two runs differ."""
    files = [folder / METRICS_FILE for folder in (left, right)]
    kept = [file.read_bytes() if file.exists() else None for file in files]  # loggers=[]: none
    if kept[0] == kept[1]:
        return []
    if None in kept:
        return [f"{METRICS_FILE}: only one of the runs wrote it"]
    return [f"{METRICS_FILE}: {first_difference(rows(left), rows(right)) or 'not the same bytes'}"]


def _first_difference(left: list[Any], right: list[Any]) -> str:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return f"number {index} is {one}, not {other}"
    return f"{len(left)} in all, not {len(right)}"
