"""Study: searches the values with which a recipe, or a function, does best."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import ConfigError, MissingExtraError, PacelineError, PeerError
from paceline.log.files import replacing, shown
from paceline.log.kept_code import CODE_FOLDER, RECIPE_FILE, keep
from paceline.log.lock import FolderLock
from paceline.log.secrets import mask_credentials
from paceline.log.traceback import last_line, told_in_full
from paceline.recipe.code import files_of
from paceline.recipe.compose import Composed, compose
from paceline.recipe.mistakes import Mistakes
from paceline.tune.audit import audit_due, pruning_cost
from paceline.tune.checks import Checked, check_settings_alone, check_study
from paceline.tune.folder import (
    BEST_FILE,
    CAUSE,
    HOME,
    REVIVES,
    SEEDS,
    StudyFolder,
    line_of,
    rebuild,
)
from paceline.tune.pruners import pruner_for
from paceline.tune.revival import check_revivals, is_revived, revive
from paceline.tune.samplers import is_exhausted, sampler_for
from paceline.tune.settings import SECTION, TuneSettings, read_settings
from paceline.tune.space import Space
from paceline.tune.storages import open_storage
from paceline.tune.trial import Outcome, train_trial
from paceline.world.world import World

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Function = Callable[["optuna.Trial"], Any]
# What a study was begun with and another start has to find unchanged.
_LASTING = ("space", "metric", "direction", "value", "seeds", "over_seeds", "reports")


class TrialsFailed(PacelineError):
    """So many trials in a row have failed that the study ended; the message has the last error."""


@dataclass
class Claimed:
    """A trial that this process has.

    Attributes:
        trial: Optuna's.
        stored: the parameters, as Optuna has them; of a function, those it has suggested already.
        lock: says that this process has it.
    """

    trial: optuna.Trial
    stored: dict[str, Any]
    lock: FolderLock

    @property
    def asked(self) -> tuple[int, dict[str, Any], bool]:
        """What every rank needs: the folder's number, the parameters, whether it may be pruned.

        A trial that goes on after it was pruned has the folder of the old one.
        """
        number = self.trial.user_attrs.get(REVIVES, self.trial.number)
        return int(number), self.stored, REVIVES not in self.trial.user_attrs


class Study:
    """A study: a folder of trials, each an ordinary run.

    The same study may be continued at any time, by any number of processes: none of its trials is
    lost, done twice or begun again.

        study = Study("recipe.yaml")
        study.optimize()
        print(study.best_value, study.best_params)

        Study(lambda trial: trial.suggest_float("x", -1, 1) ** 2, "runs/square").optimize(trials=20)

    Args:
        objective: a recipe with a section `tune:`, the folder of a study, or a function that takes
            an `optuna.Trial` and returns a value (or one for each metric).
        folder: of the study; by default the recipe's run folder. A function needs one.
        overrides: `key=value` changes to the recipe, in Hydra's grammar.
        settings: of a function's study: the keys of `tune:`.
        space: what a function suggests, if it is known before: the sampler "grid" needs it.
        seed: of the sampler of a function's study; a recipe has its own.
        trust: further packages whose classes and functions the recipe may name.
        fresh: move an earlier study aside and begin anew.
        accept: continue although what is searched, or how trials are judged, has changed.

    Raises:
        RecipeError: the recipe has mistakes; nothing was built.
        ConfigError: a setting is wrong, or the study in the folder is another one.
        MissingExtraError: Optuna is not installed.
    """

    def __init__(
        self,
        objective: Path | str | Function,
        folder: Path | str | None = None,
        *,
        overrides: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        space: Space | None = None,
        seed: int = 0,
        trust: Collection[str] = (),
        fresh: bool = False,
        accept: bool = False,
    ) -> None:
        _need_optuna()
        self.function: Function | None = None
        self.checked: Checked | None = None
        if callable(objective):
            if folder is None:
                raise ConfigError("Study(function, folder): a function's study needs a folder.")
            self.function = objective
            self.settings, self.space = _of_function(settings or {}, space)
            path = Path(folder)
        else:
            if settings is not None or space is not None or seed:
                raise ConfigError(
                    "Study(recipe, settings=...): a recipe has them in its section `tune:`; change "
                    "them with overrides=['tune.trials=50']."
                )
            self.checked = check_study(_composed(objective, folder, overrides), trust)
            self.settings, self.space = self.checked.settings, self.checked.space
            path = self.checked.recipe.run_dir
        self.folder = StudyFolder(path)
        self._fresh, self._accept, self._seed = fresh, accept, seed
        self._session = secrets.token_hex(4)
        self._shared = False  # whether other processes run trials beside this one
        self._study: optuna.Study | None = None

    # What a user asks for

    def optimize(
        self,
        trials: int | None = None,
        *,
        workers: int = 1,
        add: int = 0,
        revived: Collection[int] = (),
    ) -> Study:
        """Runs trials until there are as many as the study is to have.

        Args:
            trials: how many in all; by default `tune.trials`.
            workers: processes that run them. A trial whose process dies goes on in another one,
                `max_restarts` times; then it has failed.
            add: how many more than that; remembered for later starts.
            revived: numbers of pruned trials that go on to their end; they are not counted.

        Raises:
            ConfigError: a trial of `revived` cannot be revived.
            TrialsFailed: `max_failures` trials in a row have failed.
            SystemExit: with code 75, a signal has stopped the study; the same call continues it.
        """
        with _quiet(), _thawed():
            if workers > 1:
                self._with_workers(trials, workers, add, revived)
            else:
                self._work(trials, add, revived)
        return self

    def _work(self, trials: int | None, add: int, revived: Collection[int] = ()) -> None:
        """Runs trials in this process, or in those of all ranks: rank 0 alone asks and tells."""
        world = World().open()
        try:
            study = self._open(add) if world.is_main else None
            if study is not None:
                self._revive(study, revived)
            limit = self.settings.timeout
            end = None if limit is None else time.monotonic() + limit
            ended: tuple[Claimed, Outcome] | None = None
            while True:
                claimed, failed = None, None
                if study is not None:
                    try:
                        claimed = self._next(study, ended, trials, end)
                    except Exception as error:  # the other ranks wait for the next trial
                        if world.size == 1:
                            raise
                        failed = error
                said = None if failed is None else f"{type(failed).__name__}: {failed}"
                asked = None if claimed is None else claimed.asked
                asked, said = world.broadcast_object((asked, said))
                if failed is not None:
                    raise failed
                if said is not None:
                    raise PacelineError(f"rank 0 failed: {said}")
                if asked is None:
                    if study is not None and not self._shared:
                        self._say_cost(study)
                    return
                try:
                    trial = None if claimed is None else claimed.trial
                    outcome = self._run(asked, trial, world.broadcast_object)
                    outcome = _of_all(world.all_gather_object(outcome))
                except BaseException:
                    if claimed is not None:
                        claimed.lock.release()
                    raise
                ended = None if claimed is None else (claimed, outcome)
        finally:
            world.close()

    def _next(
        self,
        study: optuna.Study,
        ended: tuple[Claimed, Outcome] | None,
        goal: int | None,
        end: float | None,
    ) -> Claimed | None:
        """Records how a trial has ended and claims the next one, under one lock.

        Nothing changes between the two, so that one look at the storage serves both.
        """
        said = None
        try:
            with self.folder.locked():
                if ended is None:
                    trials = study.get_trials(deepcopy=False)
                else:
                    trials, said = self._tell(study, *ended)
                return self._claim(study, trials, goal or self.settings.trials, end)
        finally:
            if ended is not None:
                ended[0].lock.release()
            if said is not None:
                _say(said)

    def _with_workers(
        self, trials: int | None, count: int, add: int, revived: Collection[int]
    ) -> None:
        """Runs trials in processes of their own.

        Raises:
            SystemExit: a signal has stopped them.
        """
        from paceline.tune.workers import Workers

        if World().size > 1:
            raise ConfigError("several workers, each of several ranks, do not exist yet.")
        self._prepare(add)  # the processes find it begun
        self._revive(self._open(0), revived)
        self._close()
        self._shared = True
        deaths = 0

        def died(pid: int, how: str) -> bool:
            nonlocal deaths
            if self._give_up(pid, how):
                return True
            deaths += 1
            return deaths <= self.settings.max_restarts + count

        try:
            code = Workers(count, lambda: self._work(trials, 0), died).run()
        except PacelineError as error:
            raise TrialsFailed(str(error)) from None
        if code:
            raise SystemExit(code)
        if deaths > self.settings.max_restarts + count:
            raise TrialsFailed(f"worker processes have died {deaths} times before any trial.")
        self._say_cost(self._open(0))

    def _give_up(self, pid: int, how: str) -> bool:
        """Has the trial of a worker that died fail, if it has had its restarts.

        Args:
            pid: of the worker.
            how: what has happened to it.

        Returns:
            Whether it had a trial.
        """
        from optuna.trial import TrialState

        study, had = self._open(0), False
        try:
            with self.folder.locked():
                for trial in study.get_trials(deepcopy=False):
                    starts = self.folder.starts(trial.number, self._session)
                    had = had or pid in starts
                    if trial.state != TrialState.RUNNING or starts[-1:] != [pid]:
                        continue
                    _say(f"trial {trial.number}: its worker {how}.")
                    if len(starts) <= self.settings.max_restarts:
                        continue
                    often = f"{len(starts)} times" if len(starts) > 1 else "once"
                    cause = f"its worker {how}; tried {often} (tune.max_restarts)"
                    study._storage.set_trial_user_attr(trial._trial_id, CAUSE, cause)
                    study.tell(trial.number, state=TrialState.FAIL)
                    frozen = study._storage.get_trial(trial._trial_id)
                    self.folder.append(line_of(frozen, self.folder))
                    _say(_line(trial.number, Outcome("FAIL", cause=cause), self.settings, None))
        finally:
            self._close()
        return had

    def _close(self) -> None:
        """Closes the storage, so that no forked process shares its connections."""
        study, self._study = self._study, None
        backend = getattr(getattr(study, "_storage", None), "_backend", None)
        if backend is not None and hasattr(backend, "engine"):
            backend.scoped_session.remove()
            backend.engine.dispose()

    @property
    def trials(self) -> list[FrozenTrial]:
        """Every trial so far, as Optuna has it."""
        return self._opened().get_trials()

    @property
    def best_trial(self) -> FrozenTrial:
        """The best complete trial.

        Raises:
            ConfigError: there is none, or there are several metrics.
        """
        found = best_of(self.trials, self.settings)
        if found is None:
            several = len(self.settings.metrics) > 1
            why = "several metrics have no single best one" if several else "none is complete"
            raise ConfigError(f"{self.folder.path}: there is no best trial: {why}.")
        return found

    @property
    def best_value(self) -> float:
        """The value of the best trial."""
        value = self.best_trial.value
        assert value is not None
        return value

    @property
    def best_params(self) -> dict[str, Any]:
        """The values of the best trial by dotted key, as the recipe gets them."""
        params = self.best_trial.params
        return params if self.checked is None else self.space.overrides(params)

    # Opening

    def _opened(self) -> optuna.Study:
        if self._study is None:
            with _quiet():
                return self._open(0)
        return self._study

    def _open(self, add: int) -> optuna.Study:
        """Opens the storage, and mends what a kill has left behind."""
        import optuna

        self._prepare(add)
        with self.folder.locked():
            known = self.folder.read()
            study = optuna.create_study(
                study_name=known["name"],
                storage=self._storage(),
                directions=[_OPTUNA[direction] for direction in self.settings.directions],
                load_if_exists=True,
            )
            space = self.space.distributions if self.space.parameters else None
            chosen = dict(self.settings.sampler)
            if self._shared and chosen["type"] == "tpe":  # it knows of trials under way
                chosen.setdefault("constant_liar", True)
            study.sampler = sampler_for(chosen, known["seed"], space=space)
            settings = self.settings
            study.pruner = pruner_for(settings.pruner, settings.reports, value=settings.value)
            lines = self.folder.lines()
            trials = study.get_trials(deepcopy=False)
            if lines and not trials:
                rebuild(study, self.folder)
                trials = study.get_trials(deepcopy=False)
            ended = [t for t in trials if t.state.is_finished()]
            missing = [t for t in ended if lines.get(t.number, {}).get("state") != t.state.name]
            self.folder.append(*(line_of(trial, self.folder) for trial in missing))
            self._write_best(trials)
        self._study = study
        return study

    def _storage(self) -> optuna.storages.BaseStorage:
        """The storage that this process has open, or opens."""
        if self._study is not None:
            return self._study._storage
        return open_storage(self.settings.storage, self.folder.path)

    def _prepare(self, add: int) -> None:
        """Begins the study, or makes sure that it is this one."""
        if self._fresh and self.folder.exists:
            self._move_aside()
        self._fresh = False
        with self.folder.locked():
            self._begin(add)

    def _begin(self, add: int) -> None:
        """Writes what the study is begun with, or compares it with what it was begun with."""
        now = self._lasting()
        known = self.folder.read()
        if not known:
            seed = self._seed if self.checked is None else self.checked.recipe.seed
            name = _name(self.folder.path, self.settings.storage)
            known = {HOME: secrets.token_hex(8), "name": name, "seed": seed, "added": 0, **now}
            self.folder.write({**known, "ended_at": -1})
        changed = [name for name in _LASTING if known.get(name) != now[name]]
        if changed and not self._accept:
            raise ConfigError(self._changed(changed, known, now))
        if "direction" in changed or len(known["metric"]) != len(now["metric"]):
            raise ConfigError(
                f"{self.folder.path}: the study was begun with direction {known['direction']}: "
                "move it aside with --fresh (fresh=True)."
            )
        if changed:
            self._check_compatible(known)
        self.folder.change(**now, added=int(known["added"]) + add)
        if self.checked is not None:
            code = self.checked.recipe.code
            files = {} if code is None else files_of(code, self.folder.path)
            text = self._text(self.checked.composed)
            keep(self.folder.path, 0, files, text)

    def _lasting(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "space": self.space.as_json(),
            "metric": settings.metrics,
            "direction": settings.directions,
            "value": settings.value,
            "seeds": settings.seeds,
            "over_seeds": settings.over_seeds,
            "reports": settings.reports,
        }

    def _changed(self, changed: list[str], known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        lines = []
        for name in changed:
            old, new = known.get(name), now[name]
            if name != "space" or not isinstance(old, Mapping):
                lines.append(f"  tune.{name}: it was {old!r}, now it is {new!r}")
                continue
            for key in dict.fromkeys([*old, *new]):
                if old.get(key) != new.get(key):
                    was = "new" if key not in old else "gone" if key not in new else "different"
                    lines.append(f"  tune.space.{key}: it is {was}")
            if len(lines) == 0:
                lines.append("  tune.space: its keys are in another order")
        told = "\n".join(lines)
        return (
            f"the study in {shown(self.folder.path)} was begun with other settings:\n{told}\n"
            "Put them back, continue all the same with --accept (accept=True), or move it aside "
            "with --fresh (fresh=True)."
        )

    def _check_compatible(self, known: Mapping[str, Any]) -> None:
        """Of one key Optuna takes values of one kind, and one list of choices.

        Raises:
            ConfigError: a key has others now.
        """
        import json

        from optuna.distributions import check_distribution_compatibility, json_to_distribution

        for key, old in dict(known.get("space") or {}).items():
            if key not in self.space:
                continue
            before = json_to_distribution(json.dumps(old["distribution"]))
            try:
                check_distribution_compatibility(before, self.space[key].distribution)
            except ValueError as error:
                raise ConfigError(
                    f"tune.space.{key}: the study was begun with another kind or other choices, "
                    "which --accept cannot bridge: move it aside with --fresh (fresh=True)."
                ) from error

    def _text(self, composed: Composed, changes: Mapping[str, Any] | None = None) -> str:
        """A recipe as the study's folder keeps it, from which it can be run again."""
        assert self.checked is not None
        recipe = self.checked.recipe
        kept = {"run.project": recipe.project, "run.name": recipe.name}
        if recipe.code is not None:
            kept["code"] = f"{CODE_FOLDER}/{recipe.code.name}"
        return composed.changed({**kept, **(changes or {})}).text()

    def _move_aside(self) -> None:
        count, path = 1, self.folder.path
        while (aside := path.with_name(f"{path.name}.{count}")).exists():
            count += 1
        with self.folder.locked():
            path.rename(aside)
        _say(f"the earlier study was moved to {shown(aside)}.")

    # Trials

    def _claim(
        self, study: optuna.Study, trials: list[FrozenTrial], goal: int, end: float | None
    ) -> Claimed | None:
        """The next trial, which is this process's from then on; None if there is none left.

        To be called under the study's lock, with the trials as they are. A trial whose process has
        died comes first, under its own number.

        Raises:
            TrialsFailed: too many have failed.
        """
        import optuna
        from optuna.trial import TrialState, create_trial

        known = self.folder.read()
        self._check_failures(trials, known)
        home = known[HOME]
        for trial in trials:
            own = trial.state == TrialState.RUNNING and trial.user_attrs.get(HOME) == home
            if not own or not self.folder.is_dead(trial.number):
                continue
            starts = self.folder.starts(trial.number, self._session)
            # Beyond them, the process that has started this one will have it fail.
            if not self._shared or len(starts) <= self.settings.max_restarts:
                claimed = self._take(study, optuna.Trial(study, trial._trial_id), trials)
                if claimed is not None:
                    return claimed
        counted = sum(REVIVES not in trial.user_attrs for trial in trials)
        if end is not None and time.monotonic() >= end:
            return None
        if counted >= goal + int(known["added"]) or is_exhausted(study):
            return self._claim_audit(study, known["seed"])
        # In one step: from its first moment on, a trial is this study's.
        template = create_trial(state=TrialState.RUNNING, user_attrs={HOME: home})
        number = study._storage.create_new_trial(study._study_id, template_trial=template)
        return self._take(study, optuna.Trial(study, number), trials)

    def _claim_audit(self, study: optuna.Study, seed: int) -> Claimed | None:
        """A pruned trial that the audit trains to its end, once all others were begun."""
        import optuna

        for number in audit_due(study.get_trials(deepcopy=False), seed, self.settings.audit):
            if self.folder.trial(number).is_dir():  # else it was trained on another machine
                added = revive(study, self.folder, number)
                trials = study.get_trials(deepcopy=False)
                return self._take(study, optuna.Trial(study, trials[added]._trial_id), trials)
        return None

    def _revive(self, study: optuna.Study, numbers: Collection[int]) -> None:
        """Adds the trials that go on with pruned ones; a second time it does nothing."""
        if numbers and self.function is not None:
            raise ConfigError("a function's trials have no checkpoints: none can be revived.")
        with self.folder.locked():
            check_revivals(study.get_trials(deepcopy=False), self.folder, list(numbers))
            for number in dict.fromkeys(numbers):
                if is_revived(study.get_trials(deepcopy=False), number):
                    _say(f"trial {number} was revived before.")
                else:
                    _say(f"trial {number} goes on as trial {revive(study, self.folder, number)}.")

    def _say_cost(self, study: optuna.Study) -> None:
        """Says what pruning has cost, and writes it to study.json."""
        if not self.settings.audit:
            return
        with self.folder.locked():
            cost = pruning_cost(
                study.get_trials(deepcopy=False),
                self.folder.read()["seed"],
                self.settings.audit,
                self.settings.directions[0],
            )
            self.folder.change(audit=cost.as_json())
        _say(cost.text())

    def _take(
        self, study: optuna.Study, trial: optuna.Trial, trials: list[FrozenTrial]
    ) -> Claimed | None:
        lock = self.folder.take(trial.number, self._session)
        if lock is None:
            return None
        new = not trials or trials[-1].number < trial.number  # they are in order
        frozen = trial._cached_frozen_trial
        # What a sampler would read from the storage once a trial.
        study._thread_local.cached_all_trials = [*trials, frozen] if new else trials
        try:
            self._fix_first(trial, trials)
            stored = dict(trial.params)
            if self.checked is not None and REVIVES not in trial.user_attrs:
                stored = self.space.suggest(trial)
            if new or self.folder.lines().get(trial.number) is None:
                self.folder.append(line_of(frozen, self.folder))
        except BaseException:
            lock.release()
            raise
        return Claimed(trial, stored, lock)

    def _fix_first(self, trial: optuna.Trial, trials: list[FrozenTrial]) -> None:
        """Has one of the first trials take the values that are to be tried first."""
        if not self.settings.first:
            return
        others = trials[: trial.number]
        place = sum(REVIVES not in other.user_attrs for other in others)
        if place < len(self.settings.first):
            given = self.settings.first[place]
            fixed = given if self.checked is None else self.space.stored(given)
            trial._fixed_params = dict(fixed)

    def _check_failures(self, trials: list[FrozenTrial], known: Mapping[str, Any]) -> None:
        from optuna.trial import TrialState

        ended = (t for t in reversed(trials) if t.state.is_finished())
        newest = itertools.islice(ended, self.settings.max_failures)
        last = [trial for trial in newest if trial.number > known["ended_at"]]
        if len(last) < self.settings.max_failures or any(t.state != TrialState.FAIL for t in last):
            return
        # The next start, which may have mended the cause, counts anew.
        self.folder.change(ended_at=max(trial.number for trial in trials))
        cause = last[0].user_attrs.get(CAUSE, "unknown")
        raise TrialsFailed(
            f"{len(last)} trials in a row have failed (tune.max_failures). The last of them, trial "
            f"{last[0].number}:\n{cause}"
        )

    def _run(
        self,
        asked: tuple[int, Mapping[str, Any], bool],
        trial: optuna.Trial | None,
        agree: Callable[[Any], Any],
    ) -> Outcome:
        try:
            if self.function is not None:
                assert trial is not None
                return self._call(self.function, trial)
            assert self.checked is not None
            number, stored, heeded = asked
            folder = self.folder.trial(number)
            return train_trial(self.checked, stored, folder, trial, heeded=heeded, agree=agree)
        except Exception as error:  # noqa: BLE001  the study goes on
            cause = mask_credentials(told_in_full(error))
            return Outcome("FAIL", cause=cause, of_peer=isinstance(error, PeerError))

    def _call(self, function: Function, trial: optuna.Trial) -> Outcome:
        import optuna

        try:
            given = function(trial)
        except optuna.TrialPruned:
            return Outcome("PRUNED")
        values = list(given) if isinstance(given, list | tuple) else [given]
        if len(values) != len(self.settings.metrics):
            count = len(self.settings.metrics)
            return Outcome("FAIL", cause=f"it returned {len(values)} values; expected {count}.")
        try:
            values = [float(value) for value in values]
        except (TypeError, ValueError):
            return Outcome("FAIL", cause=f"it returned {given!r:.80}, which is no number.")
        if not all(map(math.isfinite, values)):
            return Outcome("FAIL", cause=f"it returned {given!r:.80}.")
        return Outcome("COMPLETE", values)

    def _tell(
        self, study: optuna.Study, claimed: Claimed, outcome: Outcome
    ) -> tuple[list[FrozenTrial], str]:
        """Records how a trial has ended: in the storage, in trials.jsonl, in best.yaml.

        To be called under the study's lock.

        Returns:
            The study's trials, and what is to be said of this one.
        """
        from optuna.study._tell import _tell_with_warning
        from optuna.trial import TrialState

        trial = claimed.trial
        if outcome.seeds is not None:
            trial.set_user_attr(SEEDS, outcome.seeds)
        if outcome.cause is not None:
            trial.set_user_attr(CAUSE, outcome.cause)
        # `study.tell` without the copy that it reads from the storage once more.
        _tell_with_warning(study, trial, outcome.values, TrialState[outcome.state])
        trials = study.get_trials(deepcopy=False)
        frozen = next(one for one in reversed(trials) if one.number == trial.number)
        self.folder.append(line_of(frozen, self.folder))
        best = self._write_best(trials)
        return trials, _line(trial.number, outcome, self.settings, best)

    def _write_best(self, trials: list[FrozenTrial]) -> FrozenTrial | None:
        """Writes the best trial's recipe, which trains in a folder of its own."""
        best = best_of(trials, self.settings)
        if best is None or self.checked is None:
            return best
        head = f"# Trial {best.number}: {self.settings.metrics[0]} {best.value:.6g}.\n"
        path = self.folder.path / BEST_FILE
        if path.is_file() and path.read_text(encoding="utf-8").startswith(head):
            return best
        number = best.user_attrs.get(REVIVES, best.number)
        changes = self.space.overrides(best.params)
        changes |= {"run.project": self.checked.recipe.project, "run.name": "best"}
        changes["run.dir"] = str(self.folder.path / "best")
        trial = self.folder.trial(number)
        if self.settings.seeds is not None:
            changes["seed"] = self.settings.seeds[0]
            trial = trial / f"seed_{changes['seed']}"
        if self.checked.recipe.code is not None:
            below = trial.relative_to(self.folder.path)
            changes["code"] = str(below / CODE_FOLDER / self.checked.recipe.code.name)
        text = head + self.checked.composed.changed(changes, SECTION).text()
        with replacing(path) as file:
            file.write(text)
        return best


_OPTUNA: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}


def best_of(trials: Sequence[FrozenTrial], settings: TuneSettings) -> FrozenTrial | None:
    """The best complete trial, the first of equal ones; None if there is none.

    Args:
        trials: of the study, in order.
        settings: of the study; with several metrics there is no best trial.
    """
    from optuna.trial import TrialState

    if len(settings.metrics) > 1:
        return None
    best, least = None, math.inf
    sign = 1 if settings.directions[0] == "min" else -1
    complete = TrialState.COMPLETE
    for trial in trials:
        if trial.state is complete and trial.values is not None:
            value = sign * trial.values[0]
            if best is None or value < least:
                best, least = trial, value
    return best


def _of_all(outcomes: list[Outcome]) -> Outcome:
    """The outcome of all ranks: a failure if one has failed, with the error that came first."""
    failed = sorted((one for one in outcomes if one.state == "FAIL"), key=lambda one: one.of_peer)
    return failed[0] if failed else outcomes[0]


def _line(number: int, outcome: Outcome, settings: TuneSettings, best: FrozenTrial | None) -> str:
    """What is printed of a trial that has ended."""
    if outcome.state == "FAIL":
        return f"trial {number} failed: {last_line(outcome.cause or '')}"
    if outcome.state == "PRUNED":
        told = "pruned"
    else:
        pairs = zip(settings.metrics, outcome.values or [], strict=True)
        told = ", ".join(f"{metric} {value:.6g}" for metric, value in pairs)
    if best is not None:
        told += f" (best: trial {best.number}, {best.value:.6g})"
    return f"trial {number}: {told}"


def _of_function(settings: Mapping[str, Any], given: Space | None) -> tuple[TuneSettings, Space]:
    """The settings of a function's study, which suggests its parameters itself.

    Raises:
        RecipeError: they have mistakes.
    """
    mistakes = Mistakes(lambda _: "settings")
    read = read_settings({"metric": "value", **settings}, mistakes, at="")
    for name in ("space", "seeds", "audit"):
        if settings.get(name):
            mistakes.add((name,), "it is for recipes: a function suggests and trains by itself.")
    if not mistakes.found:
        check_settings_alone(read, given, mistakes)
    mistakes.raise_any("Study(settings=...)")
    return read, given or Space(())


def _composed(objective: Any, folder: Path | str | None, overrides: Sequence[str]) -> Composed:
    """A study's recipe; that of a folder stays in the folder."""
    path = Path(objective)
    composed = compose(path, overrides)
    if folder is None and (path / RECIPE_FILE).is_file():
        folder = path
    return composed if folder is None else composed.changed({"run.dir": str(folder)})


def _name(path: Path, storage: str | None) -> str:
    """The study's name in its storage: of one that others share, its folder."""
    return "study" if storage is None else path.as_posix()


def _need_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("a study needs Optuna: pip install 'paceline[tune]'") from error


@contextlib.contextmanager
def _thawed() -> Iterator[None]:
    """Afterwards, what trials have kept from garbage collection is collected as before."""
    before = gc.get_freeze_count()
    try:
        yield
    finally:
        if not before:  # else somebody else's would be thawed too
            gc.unfreeze()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's own lines are left out: a trial's line is ours."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _say(text: str) -> None:
    print(f"paceline: {text}", file=sys.stderr, flush=True)
