"""`paceline evaluate` and `paceline predict`: what they print and write, and their exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.cli.evaluate import _difference, _show
from paceline.errors import DataError
from paceline.log.predictions import open_predictions

DATA = (
    "{_target_: torch.utils.data.DataLoader, dataset: {_target_: toy.Points, n: 11}, batch_size: 4}"
)
VAL = f"+val_dataloader={DATA}"
RUN = "runs/p/n"


@pytest.fixture
def trained(paceline, tmp_path: Path) -> Path:
    schedule = "+lr_scheduler={type: warmup_cosine, warmup: 0.1}"  # as long as the run
    code, _, err = paceline("train", "toy.yaml", "trainer.epochs=1", VAL, schedule)
    assert code == 0, err
    return tmp_path / RUN


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_is_validated_again_on_one_process_or_two(paceline, trained: Path, tmp_path: Path):
    """With the code that trained it, whatever became of the code since."""
    (tmp_path / "toy.py").write_text("raise RuntimeError('not the code that has trained it')")
    before = stamps(trained)
    logged = json.loads((trained / "run.json").read_text())["metrics"]
    code, out, err = paceline("evaluate", RUN)
    assert code == 0, err
    assert out.splitlines()[0] == "step_00000016, step 16:"
    assert "The same as the run logged, bit by bit." in out
    code, out, err = paceline("evaluate", RUN, "--nproc", "2")
    assert code == 0, err
    assert "The same as the run logged but for rounding" in out
    code, out, err = paceline("evaluate", RUN, "val_dataloader.dataset.n=30", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["logged"] == logged
    assert report["equal"] is False
    again, then = report["metrics"]["val/loss"], logged["val/loss"]
    assert report["difference"] == pytest.approx(abs(again - then) / then)
    assert report["difference"] > 0.01
    assert stamps(trained) == before


def test_another_value_is_not_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    report = {"checkpoint": "step_00000016", "step": 16, "equal": False}
    for value, said in ((1 + 1e-8, "(at most 1e-08 of a value)"), (1.001, "Not the same as")):
        metrics, logged = {"val/loss": value}, {"val/loss": 1.0}
        difference = _difference(metrics, logged)
        _show({**report, "metrics": metrics, "logged": logged, "difference": difference})
        assert said in capsys.readouterr().out
    assert _difference({"val/loss": math.nan}, {"val/loss": 1.0}) is None


def test_predictions_are_written_in_the_order_of_the_samples(paceline, trained: Path, tmp_path):
    for file, ranks in (("one.jsonl", "1"), ("two.jsonl", "2"), ("one.npz", "1")):
        code, out, err = paceline("predict", RUN, "--to", file, "--nproc", ranks)
        assert code == 0, err
        assert out == f"{file}: 11 samples, from step_00000016\n"
    one, two = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("one", "two"))
    lines = [json.loads(line) for line in one]
    assert [line["index"] for line in lines] == [*range(11)]
    found = np.load(tmp_path / "one.npz")["prediction"]
    assert found.shape == (11, 1)
    assert found.tolist() == [line["prediction"] for line in lines]
    assert np.diff(found[:, 0]).min() > 0  # as the inputs rise
    of_two = [json.loads(line)["prediction"] for line in two]
    np.testing.assert_allclose(np.array(of_two), found, rtol=1e-6)
    assert {path.name for path in tmp_path.glob(".*.new")} == set()


def test_the_files_errors_are_told_from_those_of_the_data(tmp_path: Path) -> None:
    """Neither leaves a file."""

    def fails(name: str) -> None:
        with open_predictions(tmp_path / name) as file:
            file.write({"": torch.ones(2)})
            Path("image.png").read_bytes()

    for name in ("a.jsonl", "a.npz"):
        with pytest.raises(FileNotFoundError, match=r"image\.png"):
            fails(name)
    with (
        pytest.raises(DataError, match="an output called 'index'"),
        open_predictions(tmp_path / "a.jsonl") as file,
    ):
        file.write({"index": torch.ones(2)})
    assert [*tmp_path.iterdir()] == []


def test_mistakes_are_one_message(paceline, trained: Path):
    for words, said in (
        (("evaluate", "nowhere"), "has no recipe.yaml"),
        (("evaluate", RUN, "--checkpoint", "step_7"), "has no checkpoint 'step_7'"),
        (("evaluate", RUN, "--weights", "averaged"), "no averaged weights"),
        (("evaluate", RUN, "model.in_features=x"), "model.in_features"),
        (("predict", RUN), "Missing option '--to'"),
        (("predict", RUN, "--to", "a.csv"), "ends in .jsonl or .npz"),
        (("predict", RUN, "--to", "a.npz", "--data", "val_loader"), "mean 'val_dataloader'?"),
        (("predict", RUN, "--to", "no/a.npz"), "could not be written"),
    ):
        code, out, err = paceline(*words)
        assert said in err, words
        assert code in (1, 2)
        assert out == ""
        assert "Traceback" not in err
