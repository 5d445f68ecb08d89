"""`paceline new`: what it says, and its exit codes."""

from __future__ import annotations

from pathlib import Path


def test_it_names_its_files_and_what_to_do_next(paceline, tmp_path: Path):
    code, out, err = paceline("new", "spirals", "--folder", "projects")
    assert code == 0, err
    assert out.splitlines()[0] == "projects/spirals/recipe.yaml"
    assert "cd projects/spirals && paceline train recipe.yaml" in out
    assert (tmp_path / "projects/spirals/spirals.py").exists()


def test_a_wrong_name_is_one_message_and_code_2(paceline, tmp_path: Path):
    for words, expected in (
        (["new", "my-net"], "'my_net'"),
        (["new", "toy"], "toy"),
        (["new"], "NAME"),
    ):
        code, out, err = paceline(*words)
        assert (code, out) == (2, ""), err
        assert expected in err
        assert "Traceback" not in err
