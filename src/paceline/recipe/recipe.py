"""A recipe with all of its components checked, and none of them built."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf

from paceline.errors import RecipeError
from paceline.log.kept_code import CODE_FOLDER
from paceline.log.secrets import masked, remember_credentials
from paceline.reading import read_file
from paceline.recipe.code import find_code, load_code
from paceline.recipe.combinations import check_combinations
from paceline.recipe.components import HORIZON, Checker, Component, signature_of
from paceline.recipe.compose import Composed, compose
from paceline.recipe.groups import Group
from paceline.recipe.interpolation import expanded, resolvers_in
from paceline.recipe.marks import MOST_BYTES
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.parts import (
    Part,
    check_parts,
    check_settings,
    check_trainer,
    trainer_class,
    trainer_config,
)
from paceline.recipe.resolvers import agree, answers
from paceline.recipe.schema import find_sections, parse
from paceline.recipe.targets import Roots
from paceline.recipe.typed import Config
from paceline.trainer.slots import slots_of
from paceline.trainer.trainer import Trainer


@dataclass(frozen=True)
class Recipe:
    """A recipe without mistakes.

    Attributes:
        composed: its text, for the run folder.
        seed: the run's seed; the first if there are several.
        seeds: one run each, in its own folder below `run_dir`; usually empty.
        project, name, run_dir: the names of the project and the run, and the run folder.
        code: the user's own module or package, or None.
        trainer: the Trainer class and its scalar settings.
        parts: the components by slot of the Trainer class, in the order in which they are built; a
            slot that the recipe does not fill is absent.
        settings: parallel and checkpoint, if the recipe gives them.
        plan: (decision, setting that changes it) for each decision so far.
        groups: the parameter groups of optimizers, by the optimizer's name ("" if there is one).
        trust: what was given with `--trust`: packages, and models whose weights are pickled.
        whole: the recipe with `seeds` of which this is one run, or None.
        config: of a trainer whose components are made by factories: the sections, typed.
        exporters: what `checkpoint:` lists besides the engine that resumes.
    """

    composed: Composed
    seed: int
    seeds: tuple[int, ...]
    project: str
    name: str
    run_dir: Path
    code: Path | None
    trainer: Component
    parts: dict[str, Part]
    settings: dict[str, Any]
    plan: list[tuple[str, str]] = field(default_factory=list)
    groups: dict[str, list[Group]] = field(default_factory=dict)
    trust: tuple[str, ...] = ()
    whole: Recipe | None = None
    config: Config | None = None
    exporters: tuple[Component, ...] = ()

    @property
    def text(self) -> str:
        """The recipe as it is stored in the run folder, from which it can be run again.

        A credential in it is replaced by `???`: running it asks for the value.
        """
        return self._kept.text()

    @property
    def tree(self) -> dict[str, Any]:
        """The recipe as plain data, with its credentials masked."""
        return masked(self._kept.tree())

    @property
    def _kept(self) -> Composed:
        changes: dict[str, Any] = {"run.project": self.project, "run.name": self.name}
        if self.code is not None:
            changes["code"] = f"{CODE_FOLDER}/{self.code.name}"
        return self.composed.changed(changes)

    def in_folder(self, run_dir: Path | str) -> Recipe:
        """The recipe of a run in another folder."""
        return check(self.composed.changed({"run.dir": str(run_dir)}), self.trust)

    def of_seed(self, seed: int) -> Recipe:
        """The recipe of one of several runs: `seed` instead of `seeds`, and its own folder.

        Raises:
            RecipeError: there is a mistake with this seed only.
        """
        changes = {"seed": seed, "run.dir": str(self.run_dir / f"seed_{seed}")}
        return replace(check(self.composed.changed(changes, "seeds"), self.trust), whole=self)

    def check_folder_stays(self, option: str) -> None:
        """Checks that the run folder is the same at the next start.

        Args:
            option: that needs it, for the message.

        Raises:
            RecipeError: a resolver gives another one each time.
        """
        tree = self.composed.tree()
        for name in ("dir", "name", "project"):
            text = expanded(tree, ["run", name])
            if names := resolvers_in(text) - {"oc.env"}:
                raise RecipeError(
                    f"run.{name}: {text!r} gives another folder at each start "
                    f"(${{{min(names)}:...}}), and {option} has to find that of the last one: "
                    f"write run.{name}=NAME."
                )

    def setting(self, name: str) -> Any:
        """A scalar setting of the trainer: the recipe's value, or the Trainer's default."""
        if name in self.trainer.kwargs:
            return self.trainer.kwargs[name]
        return signature_of(self.trainer.target).defaults.get(name)


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, trust: Collection[str] = ()
) -> Recipe:
    """Reads and checks a recipe. Imports its `code:`; builds nothing.

    Args:
        path: the YAML file.
        overrides: `key=value` changes, in Hydra's grammar.
        trust: further packages whose classes and functions the recipe may name.

    Raises:
        RecipeError: the recipe has mistakes; each is listed with its place, what was expected and
            the nearest name.
    """
    if is_run_config(path):
        raise RecipeError(
            f"{path} is a RunConfig, not a recipe: `paceline train {path}` trains it, and its "
            "validate_for_execution() and validate_semantics() check it in Python."
        )
    recipe = check(compose(path, overrides), trust)
    if agree():
        recipe = check(recipe.composed, trust)
    return recipe


def load_code_of(path: Path | str) -> None:
    """Imports the `code:` of a recipe, whose classes register themselves; checks nothing else.

    Args:
        path: the recipe's file.

    Raises:
        RecipeError: there is no such recipe, or its code cannot be imported.
    """
    composed = compose(path)
    mistakes = composed.mistakes()
    name = composed.resolve(mistakes).get("code")
    if name is not None:
        _code(str(name), composed, mistakes)
    mistakes.raise_any(composed.path)


def is_run_config(path: Path | str) -> bool:
    """Whether a file is a `paceline.tune.RunConfig`: it names a `net`, and has its `net_config`."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            return False
        text = read_file(path, MOST_BYTES).decode()
    except (OSError, ValueError):
        return False
    return {"net", "net_config"} <= set(re.findall(r"^(\w+):", text, re.MULTILINE))


def check(
    composed: Composed, trust: Collection[str] = (), mistakes: Mistakes | None = None
) -> Recipe:
    """Checks a recipe that was composed; see `load_recipe`.

    Args:
        composed: the composed recipe.
        trust: further packages whose classes and functions the recipe may name.
        mistakes: collects the mistakes, for a caller that looks at each.

    Raises:
        RecipeError: the recipe has mistakes.
    """
    mistakes = composed.mistakes() if mistakes is None else mistakes
    values = _values(composed, mistakes)
    remember_credentials(values)
    schema = parse(values, mistakes)
    code = _code(schema.code, composed, mistakes)
    unread = schema.code is not None and code is None
    checker = Checker(Roots(code.stem if code else None, trust), mistakes, unread)
    target, trainer = check_trainer(schema.trainer, checker)
    cls = None if target is None else trainer_class(target)
    sections = find_sections(values, cls, composed.own_keys(), mistakes)
    counted = HORIZON if schema.trainer.get("lr_scheduler_interval") != "metric" else ()
    parts, groups = check_parts(
        sections,
        slots_of(cls or Trainer),
        counted,
        checker,
        any_choice=schema.trainer.get("skip_validation") is True,
    )
    settings, exporters = check_settings(schema, checker)
    check_combinations(schema, sections, target, parts, mistakes)
    config = None
    if trainer is not None and not mistakes.found:
        config = trainer_config(trainer, parts, checker)
    mistakes.raise_any(composed.path)
    assert trainer is not None
    project = schema.run.project or composed.path.stem
    run_dir = Path(schema.run.dir) if schema.run.dir else Path("runs", project, schema.run.name)
    recipe = Recipe(
        composed, schema.seed, tuple(schema.seeds or ()), project, schema.run.name, run_dir, code,
        trainer, parts, settings, groups=groups, trust=tuple(trust), config=config,
        exporters=exporters,
    )  # fmt: skip
    if config is not None:
        config._described_by = recipe
    for call, value in answers().items():
        decision = f"${{{call}}} is {value!r} on all ranks and after a restart"
        recipe.plan.append((decision, "the recipe"))
    if schema.run.dir is None:
        recipe.plan.append((f"the run is written to {run_dir}", "run.dir"))
    return recipe


def _values(composed: Composed, mistakes: Mistakes) -> dict[str, Any]:
    """The recipe's values. If there are several seeds, `${seed}` resolves to the first."""
    config = composed.config
    seeds = OmegaConf.select(config, "seeds", throw_on_resolution_failure=False)
    first = None
    if isinstance(seeds, ListConfig) and seeds:
        first = OmegaConf.select(config, "seeds[0]", throw_on_resolution_failure=False)
    if "seed" in config or first is None:
        return composed.resolve(mistakes)
    values = composed.changed({"seed": first}).resolve(mistakes)
    del values["seed"]
    return values


def _code(name: str | None, composed: Composed, mistakes: Mistakes) -> Path | None:
    if name is None:
        return None
    try:
        path = find_code(name, composed.path.parent)
        load_code(path)
    except RecipeError as error:
        mistakes.add(("code",), str(error))
        return None
    return path
