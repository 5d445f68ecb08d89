"""A recipe composes as Hydra's users know it, and reading it runs nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from paceline.errors import RecipeError
from paceline.recipe.compose import compose
from paceline.recipe.recipe import is_run_config


def resolved(path: Path, *overrides: str) -> dict:
    composed = compose(path, overrides)
    mistakes = composed.mistakes()
    values = composed.resolve(mistakes)
    mistakes.raise_any(path)
    return values


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        resolved(path, *overrides)
    return str(caught.value)


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("_target_: a.B\nwidth: 2\n")
    (tmp_path / "model" / "big.yaml").write_text("_target_: a.B\nwidth: 64\n")
    path = tmp_path / "r.yaml"
    path.write_text(
        "defaults: [{model: small}, _self_]\n"
        "trainer: {epochs: 3, log_every: '${trainer.epochs}'}\n"
        "callbacks: [{type: progress, every: 1}]\n"
    )
    return path


def test_groups_interpolation_and_overrides_compose(grouped: Path):
    values = resolved(
        grouped, "model=big", "trainer.epochs=7", "+run.name=x", "callbacks.0.every=5"
    )
    assert values["model"] == {"_target_": "a.B", "width": 64}
    assert values["trainer"] == {"epochs": 7, "log_every": 7}
    assert values["run"] == {"name": "x"}
    assert values["callbacks"] == [{"type": "progress", "every": 5}]


def test_a_key_can_be_deleted_and_a_group_is_reported_if_missing(grouped: Path):
    assert "callbacks" not in resolved(grouped, "~callbacks")
    assert "model/huge" in refusal(grouped, "model=huge")
    assert "nothere" in refusal(grouped, "~nothere")


def test_hydra_is_left_as_it_was(grouped: Path):
    mine = object()
    GlobalHydra.instance().hydra = mine  # pyright: ignore
    try:
        resolved(grouped)
        refusal(grouped, "model=huge")
        assert GlobalHydra.instance().hydra is mine
    finally:
        GlobalHydra.instance().clear()


def test_environment_lookups_stay_unresolved_in_the_text(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    path = tmp_path / "r.yaml"
    path.write_text("token: ${oc.env:SECRET_TOKEN}\nrate: 1\nagain: ${rate}\n")
    composed = compose(path, ["rate=2"])
    assert resolved(path)["token"] == "hunter2"
    text = composed.changed({"run.name": "x"}).text()
    assert "hunter2" not in text
    assert "${oc.env:SECRET_TOKEN}" in text
    assert "rate: 2" in text
    assert "name: x" in text


def test_what_cannot_be_resolved_is_told_all_at_once_with_its_line(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("a: ${oc.env:NOT_SET_ANYWHERE}\nb: ???\nc: {d: '${nowhere}'}\ne: '${e}'\n")
    text = refusal(path)
    assert "r.yaml:1: a: cannot be resolved" in text
    assert "NOT_SET_ANYWHERE" in text
    assert "r.yaml:2: b: '???'" in text
    assert "r.yaml:3: c.d: cannot be resolved" in text
    assert "r.yaml:4: e" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", "line 1"),
        ("a: 1\na: 2\n", "r.yaml:2: a: duplicate key: it is in line 1 already"),
        ("- 1\n- 2\n", "mapping"),
        ("hydra: {searchpath: ['pkg://os']}\n", "r.yaml:1: hydra"),
        ("a: &x [*x]\n", "contains itself"),
        ("a: " + 3000 * "[" + 3000 * "]", "nested too deeply"),
        ("a: " + 5000 * "9", "too many digits"),
        ("a: {b: '${a}'}\n", "parent node"),
        ("a: {b: '${c}'}\nc: {d: '${a}'}\n", "contains itself"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert expected in refusal(path)


def test_a_file_that_is_not_there_or_none_is_named(tmp_path: Path):
    assert "no recipe file" in refusal(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    assert "not text in UTF-8" in refusal(tmp_path / "latin.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert not is_run_config(tmp_path / "pipe.yaml")  # nor waits for whoever writes into it
    assert "is no file, but a pipe" in refusal(tmp_path / "pipe.yaml")


def test_wrong_overrides_are_told_all_at_once(grouped: Path):
    text = refusal(grouped, "a b", "trainer.epochs=1,2", "hydra.searchpath=[pkg://os]", "=3")
    for part in ("'a b' is not key=value", "not a sweep", "hydra.searchpath", "'=3'"):
        assert part in text
    assert "4 mistakes" in text


def test_small_resolvers_compute_sizes(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "words: [a, b, c]\nvocabulary: ${len:${words}}\n"
        "numbers: {batch: 16, length: 128}\n"
        "tokens: ${multiply:${numbers.batch},${numbers.length}}\nhalf: ${multiply:3,0.5}\n"
    )
    values = resolved(path)
    assert (values["vocabulary"], values["tokens"], values["half"]) == (3, 2048, 1.5)
    assert type(values["tokens"]) is int


def test_a_resolver_that_somebody_has_registered_keeps_its_meaning(tmp_path: Path):
    from omegaconf import OmegaConf

    path = tmp_path / "r.yaml"
    path.write_text("a: ${len:x}\n")
    OmegaConf.register_new_resolver("len", lambda x: "mine", replace=True)
    try:
        assert resolved(path)["a"] == "mine"
    finally:
        OmegaConf.clear_resolver("len")
    assert resolved(path)["a"] == 1


def test_defaults_lists_nest_override_and_are_packaged_as_in_hydra(grouped: Path):
    folder = grouped.parent
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "base.yaml").write_text("_target_: a.Adam\nlr: 1e-3\n")
    (folder / "optimizer" / "slow.yaml").write_text("defaults: [base]\nlr: 1e-5\n")
    (folder / "common.yaml").write_text("defaults: [{optimizer: base}]\nrun: {name: common}\n")
    (folder / "extra.yaml").write_text("# @package trainer\nlog_every: 9\n")
    grouped.write_text(
        "defaults:\n  - common\n  - model@second: big\n  - extra\n"
        "  - override optimizer: slow\n  - _self_\ntrainer: {epochs: 3}\n"
    )
    values = resolved(grouped, "++trainer.epochs=4", "+trainer.max_steps=5")
    assert values["optimizer"] == {"_target_": "a.Adam", "lr": 1e-5}
    assert values["second"]["width"] == 64
    assert values["trainer"] == {"log_every": 9, "epochs": 4, "max_steps": 5}
    assert values["run"] == {"name": "common"}
    assert resolved(grouped, "model@second=small")["second"]["width"] == 2
    assert resolved(grouped, "optimizer=base")["optimizer"]["lr"] == 1e-3


@pytest.mark.parametrize("name", ["model/huge", "\x80yã/\x03"])
def test_a_default_that_does_not_exist_is_named_with_its_line(tmp_path: Path, name: str):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"trainer": {"epochs": 3}, "defaults": [name]}, indent=1))
    assert f"r.yaml:6: {name.partition('/')[0]}: there is no {name}.yaml" in refusal(path)


def test_a_key_that_nothing_refers_to_is_not_the_recipes_own(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "width: 3\nbase: &base {a: 1}\nalone: 1\nself: ${self}\nlist: [1]\n"
        "model: {<<: *base, b: '${width}', c: '${oc.select:list,0}'}\n"
    )
    assert compose(path).own_keys() == {"width", "base", "list"}
