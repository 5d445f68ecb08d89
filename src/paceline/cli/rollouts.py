"""`paceline rollouts`: the episodes that a run was trained on."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from paceline.cli.options import Overrides, Run, Trust
from paceline.errors import ConfigError


def rollouts(
    run: Run,
    overrides: Overrides = None,
    experience: Annotated[
        int | None, typer.Option(min=0, help="Show this experience; by default the last one.")
    ] = None,
    best: Annotated[
        int, typer.Option(min=1, metavar="N", help="Show the N episodes of the highest reward.")
    ] = 3,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="EXPERIENCE:EPISODE",
            help="Play a recorded episode again, from the weights that had played it.",
        ),
    ] = None,
    trust: Trust = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line an episode.")] = False,
) -> None:
    """Shows the episodes that a run was trained on, or plays one of them again.

    With --replay this imports the run's own code and trains from its nearest checkpoint up to the
    episode, in a temporary folder. Nothing is written to the run's. Further arguments change its
    recipe then.
    """
    if replay is not None:
        _replay(run, replay, overrides or (), tuple(trust or ()), as_json)
        return
    if overrides:
        raise ConfigError("changes to the recipe have an effect with --replay only.")
    from paceline.rl.recorded import read_rollouts

    found = list(read_rollouts(run))
    if not found:
        raise ConfigError(f"{run} has recorded no episode yet.")
    wanted = found[-1]["experience"] if experience is None else experience
    shown = [one for one in found if one["experience"] == wanted]
    if not shown:
        raise ConfigError(
            f"{run} has no experience {wanted}: they are 0 to {found[-1]['experience']}."
        )
    if as_json:
        for one in shown:
            print(json.dumps(one))
        return
    shown.sort(key=_reward, reverse=True)
    print(f"experience {wanted}: {len(shown)} episodes, mean reward {_mean(shown):.4g}")
    for one in shown[:best]:
        _show(one)


def _replay(run: Any, text: str, overrides: Any, trust: tuple[str, ...], as_json: bool) -> None:
    from paceline.checkup.replay_rollout import recorded_episode, replay_rollout
    from paceline.cli.reports import own_output_apart
    from paceline.recipe.trained import load_trainer

    first, _, second = text.partition(":")
    if not (first.isdigit() and second.isdigit()):
        raise ConfigError(f"--replay {text}: expected EXPERIENCE:EPISODE, such as 4:0.")
    recorded_episode(run, int(first), int(second))
    with own_output_apart():
        trainer = load_trainer(run, overrides, trust=trust).trainer
        replayed = replay_rollout(trainer, run, int(first), int(second))
    if as_json:
        print(json.dumps({"equal": replayed.reproduced, "again": replayed.again}))
    else:
        _show(replayed.again)
        print("The same as recorded." if replayed.reproduced else "Not the same as recorded.")


def _reward(episode: dict[str, Any]) -> float:
    return max((turn["reward"] for turn in episode["turns"]), default=float("-inf"))


def _mean(episodes: list[dict[str, Any]]) -> float:
    rewards = [turn["reward"] for one in episodes for turn in one["turns"]]
    return sum(rewards) / len(rewards) if rewards else float("nan")


def _show(episode: dict[str, Any]) -> None:
    """An episode as a tree, a turn a line."""
    from paceline.runs.text import printable

    print(printable(f"{episode['experience']}:{episode['episode']}  {episode['context']!r}"))
    depths: list[int] = []
    for turn in episode["turns"]:
        depth = 1 if turn["parent"] is None else depths[turn["parent"]] + 1
        depths.append(depth)
        said = f"{turn['probe']!r} -> {turn['response']!r}"
        print(printable(f"{'  ' * depth}{turn['reward']:8.4g}  {said}"))
