"""`seeds: [1, 2, 3]`: a run each, what is finished is skipped, what was stopped goes on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from paceline.checkpoint import load_tree
from paceline.cli.app import app
from paceline.errors import ConfigError, RecipeError
from paceline.recipe import build_trainer, load_recipe
from paceline.recipe.seeds import Seeds, train_recipe, train_seeds
from paceline.testing import bits
from paceline.trainer.settings import Resume

Write = Callable[..., Path]
VALIDATED = {
    "val_dataloader": {
        "_target_": "torch.utils.data.DataLoader",
        "dataset": {"_target_": "toy.Points", "n": 6},
        "batch_size": 4,
    }
}
RUNS = Path("runs/toy/baseline")


def train(path: Path, *overrides: str, mode: str = "auto") -> Seeds:
    return train_seeds(load_recipe(path, overrides), Resume(mode))


def weights(run: Path) -> object:
    return bits(load_tree(sorted((run / "checkpoints").glob("step_*"))[-1])["models"])


def test_each_seed_has_the_run_that_it_would_have_alone(recipe: Write):
    """Given seeds 1 and 2, when they train one after the other, then each run's weights are those
    of a run with that seed alone, byte for byte, and each folder's recipe trains that seed."""
    path = recipe(**VALIDATED)
    train(path, "seeds=[1,2]")
    for seed in (1, 2):
        alone = load_recipe(path, [f"seed={seed}", "run.name=alone", "checkpoint.keep_last=9"])
        build_trainer(alone, resume="fresh").train(seed=seed)
        assert weights(RUNS / f"seed_{seed}") == weights(Path("runs/toy/alone"))
        kept = load_recipe(RUNS / f"seed_{seed}" / "recipe.yaml")
        assert (kept.seed, kept.seeds, kept.run_dir) == (seed, (), RUNS / f"seed_{seed}")
    assert weights(RUNS / "seed_1") != weights(RUNS / "seed_2")


def test_replica_groups_train_one_run_alone(recipe: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://node1:29510")
    loaded = load_recipe(recipe(seeds=[1, 2]))
    with pytest.raises(ConfigError, match="several `seeds` do not exist for replica groups"):
        train_seeds(loaded, Resume())


def test_the_summary_is_over_the_seeds_that_were_asked_for(recipe: Write, capsys):
    """Given finished seeds 1 and 2, when 2 and 3 are asked for, then 2 is skipped, 3 is trained,
    and mean and deviation are over 2 and 3 alone."""
    path = recipe(**VALIDATED)
    first = train(path, "seeds=[1,2]")
    again = train(path, "seeds=[2,3]")
    assert again.metrics[2] == first.metrics[2]
    losses = [again.metrics[seed]["val/loss"] for seed in (2, 3)]
    kept = json.loads((RUNS / "seeds.json").read_text())
    assert kept["metric"] == "val/loss"
    assert kept["seeds"] == {str(seed): again.metrics[seed] for seed in (2, 3)}
    assert kept["mean"]["val/loss"] == statistics.fmean(losses)
    assert kept["std"]["val/loss"] == statistics.stdev(losses)
    out = capsys.readouterr()
    assert "seed 2, 1 of 2, in runs/toy/baseline/seed_2 is already complete" in out.err
    table = out.out[out.out.rindex("seed ") :].split()
    assert table[:4] == ["seed", "val/loss", "2", f"{losses[0]:.6g}"]
    assert f"{statistics.fmean(losses):.6g}" in table


def test_the_monitored_metric_is_the_one_that_is_compared(recipe: Write):
    monitor = "trainer.metric_monitor={metric_name: val/loss, mode: min}"
    assert train(recipe(**VALIDATED), "seeds=[4]", monitor).metric == "val/loss"
    assert Seeds("val/accuracy", {1: {"val/accuracy": 0.5}}).std("val/accuracy") is None


def test_what_is_finished_is_not_even_built(recipe: Write, monkeypatch: pytest.MonkeyPatch):
    path = recipe()
    train(path, "seeds=[1,2]")
    monkeypatch.setattr(
        "paceline.recipe.seeds.build_trainer", lambda *_, **__: pytest.fail("built")
    )
    train(path, "seeds=[1,2]")
    train(RUNS / "recipe.yaml")  # the folder of all of them holds the recipe of all of them


def test_a_longer_horizon_goes_on_and_another_setting_is_refused(recipe: Write):
    path = recipe()
    train(path, "seeds=[1]")
    train(path, "seeds=[1]", "trainer.epochs=3")
    assert json.loads((RUNS / "seed_1/run.json").read_text())["step"] == 9
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        train(path, "seeds=[1]", "trainer.epochs=3", "optimizer.lr=1")


def test_what_the_recipe_looks_up_may_have_changed(recipe: Write, monkeypatch):
    """Given a horizon from the environment, when it has grown, then the run is not skipped."""
    path = recipe()
    text = path.read_text().replace("epochs: 2", "epochs: ${oc.decode:${oc.env:TOY_EPOCHS}}")
    path.write_text(text)
    for epochs in (1, 2):
        monkeypatch.setenv("TOY_EPOCHS", str(epochs))
        train(path, "seeds=[1]")
        assert json.loads((RUNS / "seed_1/run.json").read_text())["step"] == 3 * epochs


def test_fresh_trains_all_of_them_again(recipe: Write):
    path = recipe()
    train(path, "seeds=[1]")
    train(path, "seeds=[1]", mode="fresh")
    assert Path(f"{RUNS}/seed_1.1").is_dir()


def test_a_stop_ends_all_and_the_same_call_goes_on(recipe: Write, tmp_path: Path):
    """Given a stop in the first of two runs, then the second does not begin; the same call again
    ends as if never stopped."""
    path = recipe(callbacks=[{"_target_": "toy.StopOnce"}])
    code = tmp_path / "toy.py"
    code.write_text(
        code.read_text()
        + "\nclass StopOnce(Callback):\n"
        + "    def on_step_end(self, trainer, metrics):\n"
        + "        import pathlib\n"
        + "        if trainer.global_step == 2 and not pathlib.Path('stopped').exists():\n"
        + "            pathlib.Path('stopped').touch()\n"
        + "            trainer.request_stop('time limit')\n"
    )
    with pytest.raises(SystemExit) as caught:
        train(path, "seeds=[1,2]")
    assert caught.value.code == 75
    assert not (RUNS / "seed_2").exists()
    train(path, "seeds=[1,2]")
    train(path, "seeds=[1,2]", "run.name=other")
    for seed in ("seed_1", "seed_2"):
        assert weights(RUNS / seed) == weights(Path("runs/toy/other") / seed)


def test_the_seed_of_each_run_is_what_the_recipe_refers_to(recipe: Write):
    path = recipe(model={"_target_": "toy.Net", "width": "${seed}"})
    train(path, "seeds=[3,5]")
    tree = load_tree(next((RUNS / "seed_5/checkpoints").glob("step_*")))
    assert tree["models"]["model"]["layers.0.weight"].shape == torch.Size([5, 1])


def test_seed_and_seeds_exclude_each_other(recipe: Write):
    with pytest.raises(RecipeError, match=r"override 'seeds=\[1,2\]': seeds: there is `seed: 7`"):
        load_recipe(recipe(seed=7), ["seeds=[1,2]"])
    assert load_recipe(recipe(seed=7), ["seeds=[1,2]", "~seed"]).seeds == (1, 2)


@pytest.mark.parametrize("mode", ["must", "runs/toy/baseline/checkpoints/step_1"])
def test_one_checkpoint_cannot_be_that_of_several_seeds(recipe: Write, mode: str):
    with pytest.raises(ConfigError, match="each seed has its own run"):
        train(recipe(), "seeds=[1,2]", mode=mode)


def test_values_that_are_not_finite_or_not_there_have_no_deviation():
    nan, inf = float("nan"), float("inf")
    assert Seeds("a", {1: {"a": inf}, 2: {"a": 1.0}}).std("a") is None
    assert Seeds("a", {1: {"a": nan}, 2: {"a": 1.0}}).std("a") is None
    assert Seeds("a", {1: {}, 2: {"a": 1.0}}).mean("a") is None
    assert Seeds("a", {1: {}}).table().split()[-2:] == ["std", "-"]


def test_one_run_is_trained_by_the_same_function(recipe: Write):
    assert train_recipe(load_recipe(recipe()), Resume()).complete


BREAKS = """
class Breaks(Callback):
    def on_step_end(self, trainer, metrics):
        if trainer.seed == 2 and trainer.global_step == 2:
            raise KeyError("a bug")

class Ends(Trainer):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float("nan") if self.seed == 3 else float(self.seed))
"""


def test_a_seed_that_fails_keeps_no_other_from_training(
    recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Given seeds of which 2 raises and 3 measures NaN, then 1 and 5 count alone: their mean is 3,
    their deviation the root of 8, the files have no bare NaN, and the command answers 1."""
    path = recipe(callbacks=[{"_target_": "toy.Breaks"}], **VALIDATED)
    code = tmp_path / "toy.py"
    code.write_text("from paceline import Trainer\n" + code.read_text() + BREAKS)
    words = ["seeds=[1,2,3,5]", "trainer._target_=toy.Ends"]
    seeds = train(path, *words)
    assert seeds.metrics == {1: {"val/loss": 1.0}, 5: {"val/loss": 5.0}}
    assert seeds.failed == {2: "KeyError: 'a bug'", 3: "ended with val/loss = nan"}

    def no_constant(name: str) -> None:
        pytest.fail(f"a bare {name}")

    kept = json.loads((RUNS / "seeds.json").read_text(), parse_constant=no_constant)
    assert kept["failed"] == {"2": "KeyError: 'a bug'", "3": "ended with val/loss = nan"}
    assert (kept["mean"], kept["std"]) == ({"val/loss": 3.0}, {"val/loss": 8**0.5})
    for seed in (1, 2, 3, 5):
        json.loads((RUNS / f"seed_{seed}/run.json").read_text(), parse_constant=no_constant)
    assert json.loads((RUNS / "seed_2/run.json").read_text())["status"] == "failed"
    shown = capsys.readouterr()
    assert "seed 2 failed:" in shown.err
    assert 'raise KeyError("a bug")' in shown.err
    assert "failed: ended with val/loss = nan" in shown.out
    done = CliRunner().invoke(app, ["train", str(path), *words])
    assert done.exit_code == 1


def test_if_every_seed_fails_the_first_error_is_raised(recipe: Write, tmp_path: Path):
    path = recipe(callbacks=[{"_target_": "toy.Breaks"}])
    code = tmp_path / "toy.py"
    code.write_text("from paceline import Trainer\n" + code.read_text() + BREAKS)
    with pytest.raises(KeyError, match="a bug"):
        train(path, "seeds=[2]")
    assert json.loads((RUNS / "seeds.json").read_text())["failed"] == {"2": "KeyError: 'a bug'"}
