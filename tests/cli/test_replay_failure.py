"""`paceline train RECIPE --replay-failure RUN`: what it prints, and its exit codes."""

from __future__ import annotations

from pathlib import Path

from conftest import CODE, RECIPE  # pyright: ignore[reportMissingImports]

NET = '''

class Log(nn.Module):
    """Gives NaN for the sample -1/63, which is 31 of 64: in step 4, of rank 1."""
    def forward(self, x):
        return torch.log(torch.where((x + 1 / 63).abs() < 1e-3, -x.abs(), x.abs() + 1))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.tail = nn.Linear(1, 1), Log()
    def forward(self, x):
        return self.body(x) + self.tail(x)
'''


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_rank_that_failed_names_the_module(paceline, tmp_path: Path) -> None:
    """Given a run of two ranks, then its folder stays as it is, with the recipe that it keeps."""
    (tmp_path / "toy.py").write_text(CODE + NET)
    recipe = RECIPE.replace("torch.nn.Linear, in_features: 1, out_features: 1", "toy.Net")
    (tmp_path / "toy.yaml").write_text(recipe)
    code, _, err = paceline("train", "toy.yaml", "+checkpoint.every_steps=2", "--nproc", "2")
    assert code == 1
    assert "step 4 is not finite" in err
    run = "runs/p/n"
    command = ("train", f"{run}/recipe.yaml", "--replay-failure", run, "--nproc", "2")
    assert f"paceline {' '.join(command)}" in err
    before = contents(tmp_path / "runs")
    code, out, err = paceline(*command)
    assert code == 1, err
    lines = out.splitlines()
    assert lines[0] == f"step 4 of {run}, from step_00000002, after 1 step trained again:"
    assert lines[1].startswith(
        "  it first became non-finite in the forward pass of module model.tail: torch.log gives nan"
    )
    assert lines[2] == "  rank 1: loss nan of batch 3; samples [28, 29, 30, 31]"
    assert len(lines) == 3
    assert contents(tmp_path / "runs") == before
    for words, said in (
        (("toy.yaml", "--replay-failure", "runs"), "runs has no failure to replay"),
        (("toy.yaml", "--replay-failure", run, "--fresh"), "leave the other options out"),
        (("toy.yaml", "--replay-failure", run, "seed=5"), "was trained with seed 0: write seed=0"),
    ):
        code, out, err = paceline("train", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err
