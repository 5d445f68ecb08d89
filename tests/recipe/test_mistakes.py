"""Every mistake is found before anything is built, and all of them are told at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import RecipeError
from paceline.recipe import load_recipe
from paceline.recipe.components import signature_of

Write = Callable[..., Path]


def refusal(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def test_a_right_recipe_is_accepted(recipe: Write):
    loaded = load_recipe(recipe(), ["trainer.epochs=5", "optimizer.lr=1"])
    assert loaded.trainer.kwargs["epochs"] == 5
    assert loaded.run_dir == Path("runs/toy/baseline")


def test_what_a_class_gives_its_base_itself_is_not_asked_for():
    class Base:
        def __init__(self, width: int, depth: int, p: float = 0.1): ...

    class Own(Base):
        def __init__(self, x: int = 1, **rest: Any):
            super().__init__(4, depth=2, **rest)

    signature = signature_of(Own)
    assert (signature.required, signature.named) == ((), ("x", "p"))


def test_a_package_that_a_setting_needs_is_named_at_the_setting(
    recipe: Write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("paceline.parallel.float8.importlib.util.find_spec", lambda name: None)
    text = "\n".join(refusal(recipe(), "trainer.precision=fp8"))
    assert "override 'trainer.precision=fp8': trainer.precision: " in text
    assert 'pip install "paceline[fp8]"' in text


def test_all_mistakes_at_once_each_with_place_and_nearest_name(recipe: Write):
    path = recipe(
        "code: toy.py\n"
        "trainer:\n"
        "  epoch: 2\n"
        "model:\n"
        "  _target_: toy.Nett\n"
        "optimiser: {}\n"
        "loss_fn: {_target_: torch.nn.MSELoss, reductoin: mean}\n"
        "train_dataloader:\n"
        "  _target_: torch.utils.data.DataLoader\n"
        "  dataset:\n"
        "    _target_: toy.Points\n"
        "    n: many\n"
    )
    lines = refusal(path, "trainer.precision=bf61", "seed=-1")
    assert lines[0] == f"7 mistakes in {path}:"
    expected = {
        f"{path}:3: trainer.epoch": "did you mean 'epochs'",
        f"{path}:5: model._target_": "did you mean 'Net'",
        f"{path}:6: optimiser": "did you mean 'optimizer'",
        f"{path}:7: loss_fn.reductoin": "did you mean 'reduction'",
        f"{path}:12: train_dataloader.dataset.n": "expected integer, got 'many'",
        "override 'trainer.precision=bf61': trainer.precision": "did you mean 'bf16'",
        "override 'seed=-1': seed": "greater than or equal to 0",
    }
    for place, message in expected.items():
        line = next(line for line in lines if line.strip().startswith(place))
        assert message in line


def test_a_mistake_in_a_group_file_names_that_file(recipe: Write, tmp_path: Path):
    (tmp_path / "optimizer").mkdir()
    group = tmp_path / "optimizer" / "adam.yaml"
    group.write_text("_target_: torch.optim.Adam\nlearning_rate: 1\n")
    path = recipe(defaults=["_self_", {"optimizer": "adam"}])
    path.write_text(path.read_text().replace("  _target_: torch.optim.AdamW\n  lr: 0.01\n", ""))
    path.write_text(path.read_text().replace("optimizer:\ntrain", "train"))
    assert f"{group}:2: optimizer.learning_rate" in "\n".join(refusal(path))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("~model.width", "toy.Net needs the argument 'width'|Net needs the argument 'width'"),
        ("model.width=four", "model.width: expected integer, got 'four'"),
        ("model.width=1.5", "model.width: expected integer, got 1.5"),
        ("model.depth=true", "model.depth: expected integer, got True"),
        ("optimizer.lr=fast", "optimizer.lr: expected number or Tensor, got 'fast'"),
        ("optimizer.params=[1]", "optimizer.params: is given by Paceline"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.betas=[a,b]", "optimizer.betas"),
        ("train_dataloader.batch_size=8.0", "train_dataloader.batch_size: expected integer"),
        ("train_dataloader.dataset=5", "train_dataloader.dataset: expected Dataset"),
        ("trainer.validate_every=epoche", "did you mean 'epoch'"),
        ("trainer.model=3", "trainer.model: is a key of the recipe's top level"),
        ("trainer.run_dir=x", "trainer.run_dir: is `run.dir`"),
        ("trainer.metric_monitor.mode=maximum", "trainer.metric_monitor.mode: expected"),
        ("trainer.metric_monitor.min_delta=-1", "may not be negative"),
        ("checkpoint.every_epochs=0", "checkpoint: checkpoint: every_epochs must be"),
        ("checkpoint.every_epoch=1", "did you mean 'every_epochs'"),
        ("checkpoint=always", "checkpoint: expected a mapping"),
        ("parallel.pipeline=0", "parallel.pipeline=0: expected 1 or more processes"),
        ("parallel.dp_shard=0", "parallel.dp_shard=0: expected 1 or more processes"),
        ("seeds=[1,2,1]", "seeds: expected the seeds of different runs; 1 appear"),
        ("seeds=[]", "seeds: expected the seeds of different runs; the list is empty"),
        ("seeds=3", "seeds: expected a valid list, got 3"),
        ("seeds=[1,a]", "seeds.1: expected a valid integer, got 'a'"),
        ("seeds=???", "seeds: '???' stands for a value that must be given"),
        ("seeds=[???]", "seeds.0: '???' stands for a value that must be given"),
        ("seeds=['${nothing}',2]", "seeds.0: "),
        ("seed=one", "seed: expected a valid integer, got 'one'"),
        ("run.name=../../etc", "run.name: expected the name of one folder"),
        (f"run.name={300 * 'n'}", "run.name: a name may have 200 bytes"),
        (f"run.dir=a/{300 * 'b'}", "run.dir: a name may have 200 bytes, 'bbb"),
        ("run.dir='a\x00'", "run.dir: expected the path of a folder"),
        ("run.nmae=x", "did you mean 'name'"),
        ("callbacks=[{type: progres}]", "did you mean 'progress'"),
        ("callbacks=[{_target_: toy.Net, width: 1}]", "'toy.Net' is not a callback"),
        ("callbacks=all", "callbacks: expected a list or a mapping"),
        ("lr_scheduler={type: warmup_cosin}", "did you mean 'warmup_cosine'"),
        ("lr_scheduler.warmup=5", "lr_scheduler: expected a mapping with `_target_:`"),
        ("model=5", "model: expected a mapping with `_target_:`"),
        ("model._partial_=true", "Hydra only composes recipes"),
        ("code=nothing.py", "code: there is no file"),
        ("code='\x00'", "code: '\\x00' cannot be a file's name: embedded null byte"),
        (f"code={300 * 'c'}", "cannot be a file's name: File name too long"),
    ],
)
def test_one_mistake_is_told_in_plain_words(recipe: Write, override: str, expected: str):
    text = "\n".join(refusal(recipe(), override))
    assert any(part in text for part in expected.split("|")), text


def test_an_optimizer_needs_a_model_and_a_schedule_an_optimizer(recipe: Write):
    path = recipe(lr_scheduler={"type": "warmup_cosine"})
    assert "optimizer: needs a `model:`." in "\n".join(refusal(path, "~model"))
    assert "lr_scheduler: needs a `optimizer:`." in "\n".join(refusal(path, "~optimizer"))


@pytest.mark.parametrize("key", ["trainer.metric_monitor", "checkpoint", "parallel"])
def test_settings_with_an_unknown_key_and_an_unknown_value_are_told_once(recipe: Write, key: str):
    [_, line] = refusal(recipe(), f"{key}={{nonsense: ???}}")
    assert f": {key}.nonsense: '???' stands for a value that must be given" in line


def test_nothing_is_built_while_checking(recipe: Write, tmp_path: Path):
    path = recipe()
    (tmp_path / "toy.py").write_text(
        "from torch import nn\n"
        "from torch.utils.data import Dataset\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width): raise AssertionError('built')\n"
        "class Points(Dataset):\n"
        "    def __init__(self): raise AssertionError('built')\n"
        "    def __getitem__(self, i): ...\n"
    )
    load_recipe(path)


def test_an_error_in_the_code_names_its_line(recipe: Write, tmp_path: Path):
    path = recipe()
    (tmp_path / "toy.py").write_text("import torch\n\nundefined_name\n")
    lines = refusal(path, "optimizer.lrr=1")
    text = "\n".join(lines)
    assert len(lines) == 3  # that toy.Net is unknown follows from it, and is not told as well
    assert "toy.yaml:1: code: its import failed" in text
    assert "toy.py:3: NameError" in text


THEIRS = {
    "save_last_k": "`checkpoint.keep_last`",
    "even_batches": "nothing: each sample counts once",
    "logging_config": "`loggers:`",
    "warmup_params": "`lr_scheduler: {type: warmup_cosine",
    "dump_config": "the command's `--dry-run`",
    "exp_dir": "`run.dir`",
    "config_dict": "nothing: the run's folder keeps recipe.yaml",
}


def test_keys_of_another_system_name_ours_wherever_they_stand(recipe):
    """At the top level, under `trainer:` and, as far as they belong there, under `checkpoint:`."""
    top = [f"+{name}=1" for name in THEIRS]
    trainer = [f"+trainer.{name}=1" for name in THEIRS]
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(), [*top, *trainer, "+checkpoint.save_last_k=2"])
    lines = str(caught.value).splitlines()
    for name, ours in THEIRS.items():
        for key in (f" {name}:", f" trainer.{name}:"):
            [line] = [line for line in lines if key in line]
            assert ours in line
    assert any("checkpoint.save_last_k: " in x and "`checkpoint.keep_last`" in x for x in lines)


LISTED = "callbacks:\n  - {type: learning_rate}\n  - {type: gradient_monitor}\n"


@pytest.mark.parametrize(
    ("more", "override", "expected"),
    [
        (LISTED, "~callbacks.0", ("callbacks is a list", "~callbacks.NAME")),
        (LISTED, "+callbacks.2={type: throughput}", ("callbacks is a list", "callbacks=[...]")),
        ("own: !!set {a, b}\n", "seed=1", (":14: ", "!!set is no kind of value")),
        ("own: {null: 3}\n", "seed=1", (":14: ", "a key is empty or null")),
        ("defaults: [../fit, _self_]\n", "seed=1", (":14: defaults: '../fit' lies outside",)),
        ("", "run.dir=runs/epoch=3", ("\"run.dir='runs/epoch=3'\"",)),
        ("", "run.name=été", ("\"run.name='été'\"",)),
    ],
    ids=["take out", "add", "set", "null key", "above", "equals sign", "accent"],
)
def test_what_hydra_cannot_read_is_told_with_what_to_write(
    recipe: Write, more: str, override: str, expected: tuple[str, ...]
):
    path = recipe()
    path.write_text(path.read_text().rstrip() + "\n" + more)
    lines = len(path.read_text().splitlines())
    told = "\n".join(refusal(path, override))
    for part in expected:
        assert part.replace(":14: ", f":{lines - len(more.splitlines()) + 1}: ") in told
    assert "ConfigComposition" not in told


def test_what_is_written_quoted_is_taken(recipe: Write):
    assert load_recipe(recipe(), ["run.dir='runs/epoch=3'"]).run_dir == Path("runs/epoch=3")


def test_an_item_of_a_list_that_is_null_is_left_out(recipe: Write):
    path = recipe()
    path.write_text(path.read_text().rstrip() + "\n" + LISTED)
    loaded = load_recipe(path, ["callbacks.0=null"])
    assert len(loaded.parts["callbacks"]) == 1  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["4711", "12e4567", "007", "true", "1.10"])
def test_a_name_that_reads_as_a_number_is_a_name(recipe: Write, name: str):
    assert load_recipe(recipe(), [f"run.name={name}"]).name == name
    path = recipe()
    path.write_text(path.read_text().rstrip() + f"\nrun: {{project: {name}, name: {name}}}\n")
    loaded = load_recipe(path)
    assert (loaded.project, loaded.name) == (name, name)
    path.write_text(loaded.text.replace("code/toy.py", "toy.py"))  # as the run keeps it
    assert load_recipe(path).name == name


@pytest.mark.parametrize("section", ["run", "parallel"])
def test_a_section_with_nothing_in_it_is_one_without_settings(recipe: Write, section: str):
    path = recipe()
    path.write_text(path.read_text().rstrip() + f"\n{section}:\n")
    assert load_recipe(path).name == "baseline"


def test_a_recipe_that_is_not_there_is_told_by_what_is(recipe: Write, tmp_path: Path):
    path = recipe()
    assert f"did you mean '{path}'?" in refusal(path.with_suffix(""))[1]
    assert f"name one of its recipes, {path}." in refusal(tmp_path)[1]
    other = path.with_suffix(".yml")
    path.rename(other)
    assert f"rename it to {path.name}." in refusal(other)[1]


def test_a_run_folder_stands_for_the_recipe_in_it(recipe: Write, tmp_path: Path):
    folder = tmp_path / "runs" / "toy" / "one"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe().read_text())
    (folder / "toy.py").write_text((tmp_path / "toy.py").read_text())
    assert load_recipe(folder).composed.path == folder / "recipe.yaml"
