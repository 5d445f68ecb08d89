"""`paceline export`: what it prints, and its exit codes."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file


def test_a_trained_run_is_exported_and_another_starts_from_it(paceline, tmp_path: Path):
    assert paceline("train", "toy.yaml", "trainer.epochs=1")[0] == 0
    (tmp_path / "runs/p/n/code/toy.py").write_text("open('exploded', 'w')")  # never imported
    code, out, err = paceline("export", "runs/p/n", "--dtype", "bf16", "--to", "w.safetensors")
    assert code == 0, err
    assert out.startswith("w.safetensors: 2 live tensors of 'model'")
    assert out.endswith("from step_00000016\n")
    assert load_file(tmp_path / "w.safetensors").keys() == {"weight", "bias"}
    assert not (tmp_path / "exploded").exists()
    words = ("train", "toy.yaml", "run.name=warm", "--init-from", "w.safetensors")
    code, _, err = paceline(*words)
    assert code == 0
    assert "2 tensors loaded; missing: none; unexpected: none" in err


def test_a_damaged_checkpoint_is_one_message_and_code_1(paceline, tmp_path: Path):
    assert paceline("train", "toy.yaml", "trainer.epochs=1")[0] == 0
    [state] = tmp_path.glob("runs/p/n/checkpoints/step_*/state.json")
    state.write_text("{}")
    code, out, err = paceline("export", "runs/p/n")
    assert (code, out) == (1, "")
    assert "state.json has 2 bytes" in err
    assert "no intact one is left" in err
    assert "Traceback" not in err


def test_wrong_usage_is_one_message_and_code_2(paceline):
    for words, expected in (
        (["export"], "RUN"),
        (["export", "nowhere"], "does not exist"),
        (["export", ".", "--dtype", "int8"], "int8"),
        (["export", ".", "--weights", "best"], "best"),
        (["export", ".", "--format", "hf"], "--format"),
    ):
        code, out, err = paceline(*words)
        assert (code, out) == (2, ""), (words, err)
        assert expected in err
        assert "Traceback" not in err
