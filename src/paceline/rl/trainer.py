"""RLTrainer: a Trainer whose data are rollouts of the policy that it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch

from paceline.checkpoint.export import Weights
from paceline.data.batches import to_device
from paceline.data.content import digest
from paceline.data.source import StopCollecting
from paceline.errors import ConfigError
from paceline.factories import Config, FactoryTrainer, ModelFactory, TrainerConfig
from paceline.recipe.typed import HumanInt
from paceline.rl.acting import acting
from paceline.rl.algorithm import Algorithm
from paceline.rl.baselines import RandomActions, RandomTokens
from paceline.rl.control.actor_critic import ActorCritic, Policy
from paceline.rl.control.collector import ControlCollector
from paceline.rl.control.environment import Environment
from paceline.rl.control.episodes import fresh_episodes
from paceline.rl.control.scaling import ObservationScaling
from paceline.rl.control.system import ControlSystem
from paceline.rl.engine import Engine
from paceline.rl.evaluation import Beside, Evaluation, Untrained
from paceline.rl.evaluation_report import FullEvaluation, report_of
from paceline.rl.graph import Graph, final_reward, first_turns
from paceline.rl.graph_collector import GraphCollector
from paceline.rl.in_step import in_step
from paceline.rl.played import Played, gain, summary
from paceline.rl.prompts import keep_beside_recipe
from paceline.rl.recorded import RecordRollouts, record_of
from paceline.rl.sampler import Sampler
from paceline.rl.source import Rollouts
from paceline.rl.system import System
from paceline.rl.text.local import LocalEngine
from paceline.trainer.arguments import arguments_of
from paceline.trainer.slots import Slot
from paceline.world.seeding import stream


class ActorCriticConfig(Config):
    """The settings of `ActorCritic`.

    Attributes:
        hidden: widths of the hidden layers of policy and value function.
    """

    hidden: list[HumanInt] = [64, 64]


class ActorCriticFactory(ModelFactory):
    """Makes a policy and a value function for the environment's spaces."""

    name = "actor_critic"
    config_type = ActorCriticConfig

    def create_model(self, model_config: Any) -> torch.nn.Module:
        observations, actions = self.trainer.spaces()  # pyright: ignore[reportAttributeAccessIssue]
        return ActorCritic(observations, actions, model_config.hidden)


class RLConfig(TrainerConfig):
    """The keys of `trainer:` of an `RLTrainer`.

    Attributes:
        max_empty: experiences in a row that may come to no step to train on.
    """

    max_empty: int = pydantic.Field(8, ge=0)

    @pydantic.model_validator(mode="after")
    def _no_loader(self) -> RLConfig:
        for name in ("overfit_first_batch", "min_steps"):
            if getattr(self, name):
                raise ValueError(f"{name} is about a loader's batches, and rollouts have none")
        return self


class RLTrainer(FactoryTrainer):
    """Trains a policy on its own rollouts: an epoch is one experience.

    Args:
        config: from `get_config`.
        environment: where the policy acts; or
        system: what the sampler plays, and
        sampler: plays episodes; or a function of `system` that makes it.
        algorithm: turns rollouts into losses; or a function of `system` that makes it.
        engine: a function of `model` and `tokenizer` that makes what completes prompts, such as
            `functools.partial(LocalEngine, batch=16)`; None for a `LocalEngine`.
        evaluation: what the policy is evaluated on, and when; None for no evaluation.
        max_empty: experiences in a row that may come to no step to train on.
        **settings: as of `FactoryTrainer`.

    Raises:
        ConfigError: nothing says what acts, or how it is trained.
    """

    name = "rl"
    config_type = RLConfig
    data_factory_type = None
    model_factory_type = None  # any: ActorCriticFactory, or one of the recipe's code
    slots = {
        "environment": Environment,
        "system": System,
        "sampler": Slot(Sampler, given=("system",)),
        "algorithm": Slot(Algorithm, given=("system",)),
        "engine": Slot(Engine, given=("model", "tokenizer")),
        "evaluation": Slot(Evaluation, choices=(Evaluation,), optional=True),
    }

    system: Any
    sampler: Any
    environment: Environment | None
    algorithm: Any
    engine: Any
    evaluation: Evaluation | None

    def __init__(
        self,
        config: Any = None,
        *,
        environment: Environment | None = None,
        system: System | None = None,
        sampler: Any = None,
        algorithm: Any = None,
        engine: Any = None,
        evaluation: Evaluation | None = None,
        max_empty: int = 8,
        **settings: Any,
    ) -> None:
        own = {
            "environment": environment,
            "system": system,
            "sampler": sampler,
            "algorithm": algorithm,
            "engine": engine,
            "evaluation": evaluation,
        }
        given = {name: value for name, value in own.items() if value is not None}
        super().__init__(config, **given, **settings)
        if self.environment is None and (self.loggers is None or self.loggers):
            self.loggers = [*(self.loggers or ()), RecordRollouts()]
        self.max_empty = max_empty if config is None else config.max_empty
        self.untrained = Untrained()
        self._beside: Beside | None = None

    def configure(self) -> None:
        if self.environment is not None:
            if self.engine is not None:
                raise ConfigError("engine: it completes prompts; an environment has none.")
            self._configure_control(self.environment)
        elif self.sampler is not None:
            self._configure_sampler()
        else:
            raise ConfigError("environment, sampler: nothing says where the policy acts.")
        self._collector = self.create_collector()
        self.train_dataloader = Rollouts(
            self._collector, self.algorithm, self._report, self.max_empty, self._goes_on
        )
        if self.evaluation is not None:
            self._schedule_evaluations(self.evaluation.every)
        if self.training_horizon is None and self.lr_scheduler_interval == "step":
            self.lr_scheduler_interval = "epoch"
            self.plan.add("schedules step with each experience", "lr_scheduler_interval")
        self.make("optimizer", "lr_scheduler")

    def make(self, *sections: str) -> None:
        """Makes what sections of the recipe describe; a sampler's system has its models.

        Args:
            sections: as for `FactoryTrainer.make`.
        """
        played = self.environment is None and self.sampler is not None
        if "model" in sections and played and self.model is None:
            self._configure_sampler()
        super().make(*sections)
        if "model" in sections and self.environment is not None:
            self._complete_policy(self.environment)

    def _complete_policy(self, environment: Environment) -> None:
        """Makes the policy if nothing describes it, and gives it a scaling of observations."""
        policy = ActorCritic(*self.spaces()) if self.model is None else self.model
        self.model = policy
        scales = environment.normalize_observations and isinstance(policy, torch.nn.Module)
        if scales and not hasattr(policy, "observation_scaling"):
            policy.observation_scaling = ObservationScaling(self.spaces()[0], environment.clip)

    def _configure_control(self, environment: Environment) -> None:
        found = self.world.all_gather_object(str(self.spaces()))
        if len(set(found)) > 1:  # before models are compared, of which it would be said less well
            raise ConfigError(
                "environment: ranks have different spaces of observations and actions:\n"
                + "\n".join(f"rank {rank}: {one}" for rank, one in enumerate(found))
            )
        self.make("model")
        if not isinstance(self.model, torch.nn.Module) or not hasattr(self.model, "act"):
            raise ConfigError(
                f"model: a {type(self.model).__qualname__} has no act(obs, deterministic); derive "
                "it from paceline.rl.Policy."
            )
        self.system = ControlSystem(lambda: self.policy)
        self._make_algorithm()

    def _configure_sampler(self) -> None:
        if isinstance(self.sampler, partial):
            if self.system is None:
                raise ConfigError("system: nothing says what the sampler plays.")
            self.sampler = self.sampler(system=self.system)
        for part in self._readers():
            part.locate(self._recipe_folder())
        self.system = self.sampler.system
        if self.engine is not None:
            if not callable(self.engine) or not isinstance(self.system, System):
                raise ConfigError(
                    "engine: expected a function of model and tokenizer for a System of "
                    "paceline.rl, such as functools.partial(LocalEngine, batch=16)."
                )
            make: Any = self.engine
            self.system.make_engine = make
        self._make_algorithm()
        if self.model is None:
            trained = trained_models(self.system)
            self.model = next(iter(trained.values())) if len(trained) == 1 else trained

    def _readers(self) -> list[Any]:
        """What reads files that the recipe names."""
        parts = (self.sampler, self.evaluation)
        return [part for part in parts if isinstance(part, Sampler | Evaluation)]

    def _recipe_folder(self) -> Path:
        recipe = getattr(self.config, "_described_by", None)
        return Path() if recipe is None else Path(recipe.composed.path).parent

    def _make_algorithm(self) -> None:
        if isinstance(self.algorithm, partial):
            self.algorithm = self.algorithm(system=self.system)
        if not isinstance(self.algorithm, Algorithm):
            raise ConfigError("algorithm: nothing says how the policy is trained.")
        if self.algorithm.system is None:
            self.algorithm.system = self.system
        if self.algorithm.compares and isinstance(self.system, System):
            if self.resume.init_from is not None:
                raise ConfigError(
                    "--init-from: the algorithm compares with a baseline, which is made before "
                    "these weights are loaded: name them as the system's model instead."
                )
            self.system.keep_baseline()

    def setup(self) -> None:
        before = self._trained()
        super().setup()
        placed = {id(model): self._trained()[name] for name, model in before.items()}
        # So that ranks exchange the gradients of what the system calls.
        for name, model in modules_of(self.system).items():
            if id(model) in placed:
                setattr(self.system, name, placed[id(model)])
                self._at_hand.cleanup.callback(setattr, self.system, name, model)
            else:
                model.to(self.device)

    def _trained(self) -> dict[str, Any]:
        """The models by name, as they are placed."""
        return dict(self.model) if isinstance(self.model, Mapping) else {"": self.model}

    def _schedule_evaluations(self, every: int) -> None:
        wanted = "epoch" if every == 1 else f"{every} epochs"
        if self.validate_every not in ("epoch", wanted):
            raise ConfigError(
                f"validate_every={self.validate_every!r}: with an evaluation, its `every` says how "
                "many experiences there are between two."
            )
        self.validate_every = wanted

    @property
    def has_validation(self) -> bool:
        """Whether the policy is evaluated."""
        return self.evaluation is not None and self.max_val_batches != 0

    def on_train_start(self) -> None:
        """Evaluates the policy before it is trained, if evaluations are compared with that."""
        super().on_train_start()
        if self.world.is_main and self.run_dir is not None and self.resolved_recipe is not None:
            files = [file for part in self._readers() for file in part.files]
            keep_beside_recipe(self.run_dir, self._recipe_folder(), files)
        wanted = self.evaluation is not None and self.evaluation.against_untrained
        if wanted and self.untrained.values is None and self.global_step == 0:
            played = self._play()
            self.untrained.values = None if played is None else [one.value for one in played]

    def evaluate(self) -> dict[str, float] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluates the policy on fresh episodes, or on prompts.

        Returns:
            Of an environment "val/return" and "val/length", means over the episodes; of a sampler
            "val/reward", the mean of the last turns', and "val/skipped", the episodes without a
            turn. "val/return_low" and "val/return_high" (of a sampler "val/reward_low" ...) are the
            ends of the mean's 95 % interval. With a threshold "val/success"; with several attempts
            at a prompt "val/reward_best", the mean of the best ones, and "val/hit_at_k", the share
            of prompts with a success; compared with the untrained policy "val/gain", the mean
            difference of the same episodes, with its interval. None if the run is to stop.
        """
        played = self._play()
        if played is None:
            return None
        if self._beside is not None:
            self._beside.played = played
        evaluation = self.evaluation or Evaluation()
        if self.environment is not None:
            name = "val/return"
            row = {"val/length": float(np.mean([one.length for one in played]))}
        else:
            name = "val/reward"
            row = {"val/skipped": float(sum(one.value is None for one in played))}
        said = summary(played, self.seed, evaluation.threshold, evaluation.attempts)
        for part, value in said.items():
            whole = {"mean": name, **{end: f"{name}_{end}" for end in ("low", "high", "best")}}
            row[whole.get(part, f"val/{part}")] = value
        before = self.untrained.values
        if evaluation.against_untrained and before is not None and len(before) == len(played):
            pairs = zip(played, before, strict=True)
            others = [replace(one, value=value) for one, value in pairs]
            found = gain(played, others, self.seed)
            if found is not None:
                names = ("val/gain", "val/gain_low", "val/gain_high")
                row |= dict(zip(names, found, strict=True))
        return row

    def full_evaluation(
        self, checkpoint: str | Path | None = None, weights: Weights = "auto"
    ) -> FullEvaluation:
        """Plays an evaluation's episodes with the trained policy and with its baselines.

        The trainer must be newly made, since the untrained policy is the one that it makes.

        Args:
            checkpoint, weights: of the trained policy, as for `evaluate`.
        """
        evaluation = self.evaluation or Evaluation()
        played: dict[str, list[Played]] = {}
        left_out: dict[str, str] = {}
        try:
            for name in ("trained", *evaluation.baselines)[::-1]:  # weights are loaded for the last
                self._beside = beside = Beside(name)
                trained = name == "trained"
                # Outside a run, the trainer wraps what it calls.
                judge: Any = self.evaluate
                metrics = judge(checkpoint=checkpoint, weights=weights) if trained else judge()
                if beside.left_out:
                    left_out[name] = beside.left_out
                else:
                    played[name] = beside.played
        finally:
            self._beside = None
        kind = "return" if self.environment is not None else "reward"
        prompts = [] if self.environment is not None else evaluation.prompts or []
        report = report_of(
            dict(reversed(played.items())),
            kind=kind,
            seed=self.seed,
            threshold=evaluation.threshold,
            attempts=evaluation.attempts,
            prompts=prompts,
        )
        return FullEvaluation(metrics or {}, {**report, "left_out": left_out})

    def _play(self) -> list[Played] | None:
        """The episodes of an evaluation, over all ranks; None if the run is to stop."""
        evaluation = self.evaluation or Evaluation()
        if self.environment is None:
            return self._dialogues(evaluation)
        randomly = self._beside is not None and self._beside.policy == "random"
        with self.acting():
            lived = fresh_episodes(
                self.environment,
                RandomActions(self.spaces()[1], self.seed) if randomly else self.policy,
                evaluation.episodes,
                seed=self.seed,
                world=self.world,
                device=self.device,
                deterministic=evaluation.deterministic,
                stopping=self.stopping,
            )
        if lived is None:
            return None
        return [Played(i, value, length) for i, (value, length) in enumerate(lived)]

    def _dialogues(self, evaluation: Evaluation) -> list[Played] | None:
        """Plays episodes of the sampler, each rank its share."""
        world, prompts = self.world, evaluation.prompts
        count = evaluation.attempts if prompts else 1
        cases = len(prompts) if prompts else evaluation.episodes
        wanted = [(case, attempt) for case in range(cases) for attempt in range(count)]
        own = wanted[world.dp_rank :: world.dp_size]
        with self.acting(), self._as_baseline():
            self.sampler.begin(self.global_step, self.stopping)
            try:
                graphs = self._played(own, prompts)
            except StopCollecting:
                graphs = None
            finally:
                self.sampler.end()
        mine = None
        if graphs is not None:
            mine = [
                self._of_graph(graph, case, attempt)
                for graph, (case, attempt) in zip(graphs, own, strict=True)
            ]
        parts = world.all_gather_object(mine)[:: max(1, world.size // world.dp_size)]
        if any(part is None for part in parts):
            return None
        return [parts[i % len(parts)][i // len(parts)] for i in range(len(wanted))]

    def _played(
        self, wanted: Sequence[tuple[int, int]], prompts: Sequence[Any] | None
    ) -> list[Graph]:
        """The sampler's episodes for cases and attempts at them."""
        sampler = self.sampler
        if not wanted:
            return []
        if prompts and hasattr(sampler, "eval_rollouts"):
            attempts = [attempt for _, attempt in wanted]
            return sampler.eval_rollouts([prompts[case] for case, _ in wanted], attempts)
        if any(attempt for _, attempt in wanted):
            raise ConfigError(
                f"evaluation.attempts: {type(sampler).__qualname__} has no eval_rollouts(prompts, "
                "attempts), which plays one prompt several times, each time another way."
            )
        if prompts:
            return [sampler.eval_rollout(prompts[case]) for case, _ in wanted]
        return [sampler.eval_rollout(stream(self.seed, "eval", case) >> 1) for case, _ in wanted]

    def _of_graph(self, graph: Graph, case: int, attempt: int) -> Played:
        record: dict[str, Any] = {}
        if self._beside is not None:
            record = record_of(graph, experience=0, episode=case, seed=attempt)
        return Played(case, final_reward(graph), len(first_turns(graph)), record)

    @contextmanager
    def _as_baseline(self) -> Iterator[None]:
        """Within it a random policy speaks in the auditor's place, if that is what is wanted."""
        beside, system = self._beside, self.system
        if beside is None or beside.policy != "random":
            yield
            return
        auditor = getattr(system, "auditor", None)
        if not isinstance(system, System) or auditor is None:
            beside.left_out = "only a system with an `auditor`, which an engine completes, has one"
            yield
            return
        make, drawn = system.make_engine, []

        def engine(model: Any, tokenizer: Any) -> Engine:
            if model is not auditor:
                return (LocalEngine if make is None else make)(model=model, tokenizer=tokenizer)
            drawn.append(RandomTokens(model, tokenizer))
            return drawn[-1]

        system.make_engine = engine
        try:
            yield
        finally:
            system.make_engine = make
        if not drawn:
            beside.left_out = (
                f"{type(system).__qualname__} asks no engine for what its auditor says"
            )

    @property
    def policy(self) -> Policy:
        """What acts and is trained, as it is placed."""
        return self.model  # pyright: ignore[reportReturnType]

    def spaces(self) -> tuple[Any, Any]:
        """The spaces of one environment's observations and actions."""
        assert self.environment is not None
        return self.environment.traits[:2]

    def create_collector(self) -> Any:
        """What makes the experiences."""
        algorithm: Any = self.algorithm
        identity = arguments_of("algorithm", algorithm)
        if self.environment is None:
            identity |= arguments_of("sampler", self.sampler)
            identity |= arguments_of("system", self.system)
            identity |= frozen_models(self.system)
            if self.engine is not None:
                engine = self.system.engine_of(next(iter(modules_of(self.system).values())), None)
                identity |= arguments_of("engine", engine)
            own = getattr(self.sampler, "run_identity", dict)()
            identity |= {f"sampler.{name}": value for name, value in own.items()}
            return GraphCollector(
                self.sampler,
                algorithm,
                self.acting,
                version=lambda: self.global_step,
                identity=identity,
                record=self._record,
            )
        return ControlCollector(
            self.environment,
            lambda: self.policy,
            self.acting,
            gamma=getattr(algorithm, "gamma", 1.0),
            lam=getattr(algorithm, "lam", 1.0),
            device=lambda: self.device,
            identity=identity | arguments_of("environment", self.environment),
        )

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Within it the models act: in eval mode, without gradients, in training's precision."""
        models = {**self.named_models(), **modules_of(self.system)}
        # A rank may call them as often as it needs: nothing may be exchanged with others.
        wrapped = {
            name: model
            for name, model in modules_of(self.system).items()
            if isinstance(model, torch.nn.parallel.DistributedDataParallel)
        }
        vars(self.system).update({name: model.module for name, model in wrapped.items()})
        try:
            each = [getattr(model, "module", model) for model in models.values()]
            sharded = list({id(model): model for model in each}.values())
            with acting(models.values(), self.autocast), in_step(sharded, self.world):
                yield
        finally:
            vars(self.system).update(wrapped)

    def _goes_on(self, steps: Any) -> bool:
        with self.acting():
            steps = to_device(steps, self.device) if isinstance(steps, Mapping) else steps
            return self.world.broadcast_object(self.algorithm.goes_on(steps))

    def _record(self, episodes: list[Any]) -> None:
        if self.world.is_main:
            for sink in self.recorder.sinks:
                if isinstance(sink, RecordRollouts):
                    sink.add(episodes)

    def _report(self, row: Mapping[str, float]) -> None:
        self.recorder.write_metrics(dict(row))

    def count_items(self, batch: Any) -> Any:
        """What the algorithm's loss of a batch is a mean over.

        Args:
            batch: of the experience's steps.
        """
        return self.algorithm.count_items(batch)

    def loss(self, batch: Any) -> torch.Tensor:
        """The algorithm's loss of a batch; what it gives beside it is logged.

        Args:
            batch: of the experience's steps.
        """
        loss, logged = self.algorithm.step(batch)
        for name, value in logged.items():
            self.log(name, value)
        return loss


def modules_of(system: Any) -> dict[str, torch.nn.Module]:
    """The models that a system keeps, by the names of its attributes.

    Args:
        system: of any class.
    """
    return {n: v for n, v in vars(system).items() if isinstance(v, torch.nn.Module)}


def frozen_models(system: Any) -> dict[str, str]:
    """What a resumed run has to find unchanged of a system's models that are not trained.

    A checkpoint does not hold them: a reference, or a target, comes from where it came before.

    Args:
        system: with `parameters()`.
    """
    trained = trained_models(system)
    frozen = {n: m for n, m in modules_of(system).items() if n not in trained}
    return {
        f"system.{n}": f"sha256 {digest(dict(m.named_parameters()))[:16]}"
        for n, m in frozen.items()
    }


def trained_models(system: Any) -> dict[str, torch.nn.Module]:
    """The models of a system that hold the parameters it wants trained.

    Args:
        system: with `parameters()`.

    Raises:
        ConfigError: a parameter is in none of the models that the system keeps as attributes.
    """
    wanted = {id(parameter) for parameter in system.parameters()}
    found = {
        name: model
        for name, model in modules_of(system).items()
        if any(id(parameter) in wanted for parameter in model.parameters())
    }
    if wanted - {id(p) for model in found.values() for p in model.parameters()}:
        raise ConfigError(
            f"{type(system).__qualname__}.parameters() has some that are in no module which the "
            "system keeps as an attribute: keep each trained module as one."
        )
    return found
