"""A recipe from a stranger builds only what its slots take, and runs no command on the way."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paceline.errors import RecipeError
from paceline.recipe import build_trainer, load_recipe
from paceline.recipe.targets import KINDS, Roots, find_target

Write = Callable[..., Path]

REACHABLE_COMMANDS = [
    "torch.os.system",
    "torch.utils.collect_env.run",
    "torch.utils.collect_env.subprocess.Popen",
    "torch.utils.data.dataloader.os.system",
    "torch.hub.load",
    "torch.hub.download_url_to_file",
    "torch.load",
    "torch.serialization.load",
    "torch.ops.load_library",
    "torch.jit.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.distributed.run.main",
    "torch.utils.data.datapipes.iter.Mapper",
    "torch.utils.data.datapipes.iter.routeddecoder.RoutedDecoderIterDataPipe",
    "torch.nn.modules.container.operator.methodcaller",
    "torch.nn.functional.importlib.import_module",
    "torch.nn.Module.apply",
    "torch.multiprocessing.Process",
    "torch.functools.partial",
    "paceline.cli.main.main",
    "paceline.registry.importlib.import_module",
    "paceline.recipe.code.load_code",
    "toy.torch.os.system",
    "toy.nn.Linear",
    "toy.Trainer",
    "builtins.eval",
    "os.system",
    "subprocess.Popen",
    "functools.partial",
    "hydra.utils.instantiate",
    "numpy.load",
    "torch.__builtins__.eval",
    "torch._C._cuda_init",
    "eval",
    "",
    "torch..os",
    "torch.nn",
    "torch.nn.functional.cross_entropy.__globals__",
]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch):
    """Fails the test if a command is started."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"something was run: {args}")

    for module, name in ((subprocess, "Popen"), (torch.os, "system"), (torch.os, "popen")):
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def toy(recipe: Write) -> Roots:
    """The recipe's own code is loaded, and may be named."""
    load_recipe(recipe())
    return Roots("toy")


@pytest.mark.parametrize("target", REACHABLE_COMMANDS)
def test_no_kind_of_slot_takes_a_command(toy: Roots, nothing_runs, target: str):
    for kind in KINDS.values():
        with pytest.raises(RecipeError):
            find_target(target, kind, toy)


@pytest.mark.parametrize("target", ["torch.nn.functional.torch.nn.Linear", "torch.nn.Module.apply"])
def test_detours_are_refused_even_to_what_may_be_built(target: str):
    with pytest.raises(RecipeError):
        find_target(target, KINDS["model"], Roots())


@pytest.mark.parametrize(
    "slot", ["model", "optimizer", "lr_scheduler", "loss_fn", "val_dataloader", "trainer"]
)
def test_a_recipe_with_a_command_in_a_slot_is_refused(recipe: Write, nothing_runs, slot: str):
    node = {"_target_": "torch.os.system", "_args_": ["touch owned"]}
    with pytest.raises(
        RecipeError, match=r"'torch\.os' is the module 'os', which belongs elsewhere"
    ):
        load_recipe(recipe(**{slot: node}))


@pytest.mark.parametrize("name", ["dataset", "collate_fn", "worker_init_fn", "generator"])
def test_a_recipe_with_a_command_in_an_argument_is_refused(recipe: Write, nothing_runs, name: str):
    loader = {
        "_target_": "torch.utils.data.DataLoader",
        "dataset": {"_target_": "toy.Points"},
        name: {"_target_": "torch.os.system", "_args_": ["touch owned"]},
    }
    with pytest.raises(RecipeError, match="belongs elsewhere"):
        load_recipe(recipe(train_dataloader=loader, callbacks=[{"deep": [loader]}]))


@pytest.mark.parametrize(
    ("slot", "target"),
    [
        ("model", "torch.nn.Linear"),
        ("model", "torch.nn.modules.linear.Linear"),
        ("optimizer", "torch.optim.AdamW"),
        ("optimizer", "torch.optim.adamw.AdamW"),
        ("lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR"),
        ("lr_scheduler", "paceline.recipe.schedules.WarmupCosine"),
        ("loss_fn", "torch.nn.functional.cross_entropy"),
        ("loss_fn", "torch.nn.CrossEntropyLoss"),
        ("dataloader", "torch.utils.data.DataLoader"),
        ("dataset", "torch.utils.data.ConcatDataset"),
        ("sampler", "torch.utils.data.WeightedRandomSampler"),
        ("callback", "paceline.callbacks.averaged_weights.AveragedWeights"),
        ("logger", "paceline.log.sinks.JsonlSink"),
        ("trainer", "paceline.Trainer"),
    ],
)
def test_what_a_slot_is_for_is_found_by_its_public_and_its_own_path(slot: str, target: str):
    assert find_target(target, KINDS[slot], Roots()).__name__ == target.rsplit(".", 1)[1]


@pytest.mark.parametrize(
    ("slot", "target"),
    [
        ("optimizer", "torch.nn.Linear"),
        ("model", "torch.optim.AdamW"),
        ("dataset", "torch.nn.Linear"),
        ("callback", "paceline.Trainer"),
        ("model", "torch.nn.functional.cross_entropy"),
        ("model", "torch.nn.parallel.DistributedDataParallel"),
        ("loss_fn", "torch.nn.functional.linear"),
    ],
)
def test_a_class_of_another_kind_is_refused(slot: str, target: str):
    with pytest.raises(RecipeError, match=r"is not a|is a function"):
        find_target(target, KINDS[slot], Roots())


def test_a_foreign_package_needs_to_be_trusted():
    with pytest.raises(RecipeError, match="--trust torchmetrics_like"):
        find_target("torchmetrics_like.X", KINDS["model"], Roots())
    with pytest.raises(RecipeError, match="--trust packaging"):
        find_target("packaging.version.parse", KINDS["dataset"], Roots())
    trusted = Roots(trusted=["packaging"])
    assert find_target("packaging.version.Version", KINDS["part"], trusted).__name__ == "Version"
    assert callable(find_target("packaging.version.parse", KINDS["part"], trusted))
    with pytest.raises(RecipeError, match="not annotated to return a dataset"):
        find_target("packaging.version.parse", KINDS["dataset"], trusted)
    with pytest.raises(RecipeError):  # trust is for a package, not for what it has imported
        find_target("packaging.version.itertools.chain", KINDS["dataset"], trusted)


def test_a_package_with_an_entry_point_is_trusted(monkeypatch: pytest.MonkeyPatch):
    from paceline.recipe import targets

    monkeypatch.setattr(targets, "_plugins", lambda: frozenset({"packaging"}))
    assert callable(find_target("packaging.version.parse", KINDS["part"], Roots()))


@pytest.mark.parametrize("place", ["../outside.py", "/usr/lib/os.py", "link.py", ".", "random.py"])
def test_code_comes_from_the_recipes_own_folder(recipe: Write, tmp_path: Path, place: str):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "outside.py").write_text("open('owned', 'w')\n")
    (inner / "link.py").symlink_to(tmp_path / "outside.py")
    (inner / "random.py").write_text("open('owned', 'w')\n")
    path = inner / "r.yaml"
    path.write_text(recipe(code=place).read_text())
    with pytest.raises(RecipeError, match="code: "):
        load_recipe(path)
    assert not Path("owned").exists()


def test_a_factory_that_makes_something_else_is_refused(recipe: Write):
    loaded = load_recipe(recipe(model={"_target_": "toy.make_nothing"}))
    with pytest.raises(RecipeError, match="returned an int, which is not a model"):
        build_trainer(loaded)


def bomb(levels: int) -> str:
    """Lists of aliases, each nine times the one before."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("place", ["recipe", "group"])
def test_aliases_that_multiply_without_end_are_one_mistake(
    recipe: Write, tmp_path: Path, place: str
):
    path = recipe()
    if place == "group":
        (tmp_path / "extra").mkdir()
        (tmp_path / "extra/bomb.yaml").write_text(bomb(12))
        path.write_text("defaults: [_self_, extra: bomb]\n" + path.read_text())
    else:
        path.write_text(bomb(12) + path.read_text())
    with pytest.raises(RecipeError, match=r"aliases \(`\*name`\) make more than 50000 values"):
        load_recipe(path)


@pytest.mark.parametrize("item", ['["{0}","{0}","{0}"]', "{0}{0}{0}{0}"])
def test_references_that_multiply_without_end_are_one_mistake(recipe: Write, item: str):
    path = recipe()
    lines = ["b0: xxxx", *(f"b{i}: " + item.format(f"${{b{i - 1}}}") for i in range(1, 40))]
    path.write_text("\n".join(lines) + "\n" + path.read_text())
    with pytest.raises(RecipeError, match=r"interpolations make more than 4194304 characters"):
        load_recipe(path)
