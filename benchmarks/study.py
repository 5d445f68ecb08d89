"""What a study costs beside bare Optuna: trials of a function, trials that train, workers.

- function: trials of a function of 4 parameters that takes 1 ms, searched by TPE, beside
  `optuna.Study.optimize` on a storage of the same kind; and Paceline's default beside SQLite as
  Optuna opens it. Each side has its own study, and they take turns, some trials each.
- training: trials of a small recipe, beside `load_recipe` and `train_recipe` called by hand with
  `ask` and `tell` around them, on a storage of the same kind.
- workers: trials that sleep 200 ms, by 1 worker and by 4, from the first trial on.

PostgreSQL is measured where `--postgresql URL` names a database.

    python benchmarks/study.py [--rounds 5] [--trials 200] [--parts function training workers]
                               [--postgresql postgresql+psycopg://...]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

RECIPE = """\
code: parts.py
seed: 3
run: {project: bench, name: study}
trainer: {epochs: 2}
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train_dataloader: &data
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: parts.Points}
  batch_size: 16
val_dataloader: *data
tune:
  space: {optimizer.lr: {float: [1e-3, 0.3], log: true}}
  sampler: {type: tpe}
"""
CODE = """\
import torch
from torch.utils.data import TensorDataset

class Points(TensorDataset):
    def __init__(self):
        x = torch.arange(256.0).view(64, 4).sin()
        super().__init__(x, x.sum(1, keepdim=True))
"""


def objective(trial: Any) -> float:
    """A function of 4 parameters that takes a millisecond."""
    x = trial.suggest_float("x", -1, 1)
    y = trial.suggest_float("y", 1e-3, 1, log=True)
    n = trial.suggest_int("n", 1, 9)
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    time.sleep(1e-3)
    return x * x + y + n / 9 + (kind == "a")


def sleeps(trial: Any) -> float:
    """A function that takes 200 ms."""
    x = trial.suggest_float("x", -1, 1)
    time.sleep(0.2)
    return x * x


class Timed:
    """One side of a comparison: what it runs, and what that took.

    Args:
        run: runs so many further trials.
    """

    def __init__(self, run: Callable[[int], None]) -> None:
        self.run = run
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def turn(self, trials: int) -> None:
        """Runs trials, and notes the time that each took.

        Args:
            trials: how many.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        self.run(trials)
        self.wall.append((time.perf_counter() - wall) / trials)
        self.cpu.append((time.process_time() - cpu) / trials)


def in_turns(sides: dict[str, Timed], rounds: int, trials: int) -> dict[str, Any]:
    """Has the sides run trials in turn; milliseconds a trial, and ratios to the first side.

    Args:
        sides: by name, the base first.
        rounds: turns of each.
        trials: of each side in all.
    """
    for _ in range(rounds):
        for side in sides.values():
            side.turn(trials // rounds)
    base = next(iter(sides.values()))
    return {
        name: {
            "wall_ms": 1e3 * statistics.median(side.wall),
            "cpu_ms": 1e3 * statistics.median(side.cpu),
            "wall_ratio": statistics.median(
                a / b for a, b in zip(side.wall, base.wall, strict=True)
            ),
            "cpu_ratio": statistics.median(a / b for a, b in zip(side.cpu, base.cpu, strict=True)),
        }
        for name, side in sides.items()
    }


def bare(storage: Any, name: str = "bare") -> Timed:
    """Optuna alone, with the sampler that a study has by default.

    Args:
        storage: of Optuna.
        name: of its study.
    """
    import optuna

    study = optuna.create_study(
        storage=storage, study_name=name, sampler=optuna.samplers.TPESampler(seed=0)
    )
    return Timed(lambda count: study.optimize(objective, n_trials=count))


def ours(function: Callable[[Any], Any], folder: Path, storage: str | None) -> Timed:
    """A study of a function.

    Args:
        function: to optimise.
        folder: of the study.
        storage: as `tune.storage`.
    """
    from paceline.tune import Study

    study = Study(function, folder, settings={"storage": storage} if storage else {})
    done = 0

    def run(count: int) -> None:
        nonlocal done
        done += count
        study.optimize(trials=done)

    return Timed(run)


def functions(folder: Path, rounds: int, trials: int, postgresql: str | None) -> dict[str, Any]:
    """Trials of a function, for each storage."""
    from paceline.tune.storages import open_storage

    found = {}
    kinds = {"sqlite": None, "journal": f"journal:{folder / 'ours.journal'}"}
    if postgresql:
        kinds["postgresql"] = postgresql
    for kind, storage in kinds.items():
        other = f"journal:{folder / 'bare.journal'}" if kind == "journal" else storage
        beside = folder / f"bare-{kind}"
        beside.mkdir()
        sides = {
            "bare Optuna": bare(open_storage(other, beside), f"bare-{time.time_ns()}"),
            "Paceline": ours(objective, folder / kind, storage),
        }
        found[kind] = in_turns(sides, rounds, trials)
    sides = {
        "bare Optuna, its own SQLite": bare(f"sqlite:///{folder / 'own.db'}"),
        "Paceline, default": ours(objective, folder / "default", None),
    }
    found["default"] = in_turns(sides, rounds, trials)
    return found


def training(folder: Path, rounds: int, trials: int) -> dict[str, Any]:
    """Trials that train a recipe."""
    import optuna

    from paceline.recipe import load_recipe
    from paceline.recipe.seeds import train_recipe
    from paceline.trainer.settings import Resume
    from paceline.tune import Study
    from paceline.tune.storages import open_storage

    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "parts.py").write_text(CODE)
    beside = folder / "bare"
    beside.mkdir()
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(storage=open_storage(None, beside), sampler=sampler)

    def by_hand(count: int) -> None:
        for _ in range(count):
            trial = study.ask()
            lr = trial.suggest_float("optimizer.lr", 1e-3, 0.3, log=True)
            words = [f"optimizer.lr={lr!r}", f"run.dir={beside / str(trial.number)}", "~tune"]
            recipe = load_recipe(folder / "recipe.yaml", [*words, "+trainer.progress=false"])
            result = train_recipe(recipe, Resume())
            study.tell(trial, result.metrics["val/loss"])

    searched = Study(folder / "recipe.yaml", folder / "study")
    done = 0

    def by_study(count: int) -> None:
        nonlocal done
        done += count
        searched.optimize(done)

    sides = {"by hand": Timed(by_hand), "Paceline": Timed(by_study)}
    return in_turns(sides, rounds, trials)


def workers(folder: Path, trials: int) -> dict[str, Any]:
    """Seconds that trials of 200 ms take, by the number of workers; start-up counts."""
    from paceline.tune import Study

    found: dict[str, Any] = {}
    for count in (1, 4):
        start = time.perf_counter()
        study = Study(sleeps, folder / str(count))
        study.optimize(trials=trials, workers=count)
        found[str(count)] = time.perf_counter() - start
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * trials
    return {**found, "speed-up": found["1"] / found["4"]}


def main() -> None:
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--parts", nargs="+", default=["function", "training", "workers"])
    parser.add_argument("--postgresql")
    given = parser.parse_args()

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    at = common.machine()
    results: dict[str, Any] = {"trials": given.trials}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for part in given.parts:
            folder = Path(temporary) / part
            folder.mkdir()
            if part == "function":
                results[part] = functions(folder, given.rounds, given.trials, given.postgresql)
                for kind, sides in results[part].items():
                    rows += _rows(f"1 ms function, {kind}", sides)
            elif part == "training":
                results[part] = training(folder, given.rounds, max(given.trials // 4, given.rounds))
                rows += _rows("trial that trains, sqlite", results[part])
            else:
                results[part] = workers(folder, given.trials)
                line = results[part]
                rows.append(["200 ms sleep", "1 worker", f"{line['1']:.1f} s in all", "", "", ""])
                rows.append(["200 ms sleep", "4 workers", f"{line['4']:.1f} s in all", "", "", ""])
    head = ["", "side", "wall ms", "CPU ms", "wall ratio", "CPU ratio"]
    text = f"{__doc__.splitlines()[0]}\n\n{common.table(head, rows)}"
    common.save("study", text, results, at, trial=given.trials < 100)


def _rows(what: str, sides: dict[str, Any]) -> list[list[str]]:
    return [
        [
            what,
            name,
            f"{one['wall_ms']:.1f}",
            f"{one['cpu_ms']:.1f}",
            f"{one['wall_ratio']:.2f}",
            f"{one['cpu_ratio']:.2f}",
        ]
        for name, one in sides.items()
    ]


if __name__ == "__main__":
    main()
