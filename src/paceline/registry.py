"""Names -> classes, for recipes (`type: name`) and for the parts the Trainer adds by itself.

The tables below give import paths, so that a class is imported only when it is used and this module
depends on nothing: `KINDS` lists what there are names for, `_SHIPPED` the names that ship with
Paceline. Three things add a user's own:

- a class that derives from a kind's base class and gives itself a `name` registers itself; one that
  has none of its own is abstract;
- `register` adds any class or function;
- installed packages name modules or classes as entry points of the group "paceline", which are
  imported once a name is asked for that is not known.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from paceline.errors import ConfigError, nearest

__all__ = ["lookup", "names", "register"]

T = TypeVar("T")

# Kind -> "module:Class", the base class of what is registered; "" for functions. To add a kind, add
# a line.
KINDS: dict[str, str] = {
    "trainer": "paceline.trainer.trainer:Trainer",
    "model": "torch.nn:Module",
    "optimizer": "torch.optim:Optimizer",
    "lr_scheduler": "torch.optim.lr_scheduler:LRScheduler",
    "loss_fn": "torch.nn:Module",
    "dataloader": "torch.utils.data:DataLoader",
    "dataset": "torch.utils.data:Dataset",
    "sampler": "torch.utils.data:Sampler",
    "collate_fn": "",
    "callback": "paceline.trainer.callback:Callback",
    "logger": "paceline.log.sinks:Sink",
    "checkpoint_engine": "paceline.checkpoint.engine:CheckpointEngine",
    "model_factory": "paceline.factories.bases:ModelFactory",
    "tokenizer_factory": "paceline.factories.bases:TokenizerFactory",
    "data_factory": "paceline.factories.bases:DataFactory",
    "data_source": "paceline.factories.bases:DataSource",
    "optimizer_factory": "paceline.factories.bases:OptimizerFactory",
    "scheduler_factory": "paceline.factories.bases:SchedulerFactory",
    "environment": "paceline.rl.control.environment:Environment",
    "system": "paceline.rl.system:System",
    "rollout_sampler": "paceline.rl.sampler:Sampler",
    "engine": "paceline.rl.engine:Engine",
    "algorithm": "paceline.rl.algorithm:Algorithm",
    "scorer": "paceline.rl.scorer:Scorer",
    "checkpoint": "paceline.factories.checkpoint:CheckpointEngine",
}

_SHIPPED: dict[str, dict[str, str]] = {
    "trainer": {
        "causal": "paceline.lm.trainers:CausalTrainer",
        "rl": "paceline.rl.trainer:RLTrainer",
        "sft": "paceline.lm.trainers:SFTTrainer",
        "trainer": "paceline.trainer.trainer:Trainer",
    },
    "data_factory": {
        "causal": "paceline.lm.data.factory:CausalDataFactory",
        "sft": "paceline.lm.data.factory:SFTDataFactory",
    },
    "data_source": {
        "csv": "paceline.lm.data.sources:Csv",
        "huggingface": "paceline.lm.data.sources:HuggingFace",
        "json": "paceline.lm.data.sources:Json",
        "jsonl": "paceline.lm.data.sources:Jsonl",
        "parquet": "paceline.lm.data.sources:Parquet",
        "python": "paceline.lm.data.sources:Function",
        "python_manual": "paceline.lm.data.sources:PythonManual",
        "text": "paceline.lm.data.sources:Text",
    },
    "callback": {
        "progress": "paceline.callbacks.progress:Progress",
        "averaged_weights": "paceline.callbacks.averaged_weights:AveragedWeights",
        "early_stopping": "paceline.callbacks.early_stopping:EarlyStopping",
        "exit_step": "paceline.callbacks.exit_step:ExitStep",
        "freeze": "paceline.callbacks.freeze:Freeze",
        "gradient_explosion": "paceline.callbacks.gradient_explosion:GradientExplosion",
        "gradient_monitor": "paceline.callbacks.gradient_monitor:GradientMonitor",
        "learning_rate": "paceline.callbacks.learning_rate:LearningRate",
        "loss_prediction": "paceline.callbacks.loss_prediction:LossPrediction",
        "memory_snapshot": "paceline.callbacks.memory_snapshot:MemorySnapshot",
        "overfit_detection": "paceline.callbacks.overfit_detection:OverfitDetection",
        "profiler": "paceline.callbacks.profiler:Profiler",
        "schedule_free": "paceline.callbacks.schedule_free:ScheduleFree",
        "swa": "paceline.callbacks.swa:SWA",
        "throughput": "paceline.callbacks.throughput:Throughput",
        "time_limit": "paceline.callbacks.time_limit:TimeLimit",
        "update_ratio": "paceline.callbacks.update_ratio:UpdateRatio",
    },
    "checkpoint_engine": {
        "native": "paceline.checkpoint.native_engine:NativeEngine",
    },
    "lr_scheduler": {
        "warmup_constant": "paceline.recipe.schedules:WarmupConstant",
        "warmup_cosine": "paceline.recipe.schedules:WarmupCosine",
        "warmup_linear": "paceline.recipe.schedules:WarmupLinear",
        "warmup_stable_decay": "paceline.recipe.schedules:WarmupStableDecay",
    },
    "checkpoint": {
        "huggingface": "paceline.lm.hf_engine:HFCheckpointEngine",
    },
    "environment": {
        "gym": "paceline.rl.control.environment:GymEnvironment",
    },
    "algorithm": {
        "dpo": "paceline.rl.algorithms.dpo:DPO",
        "grpo": "paceline.rl.algorithms.grpo:GRPO",
        "ipo": "paceline.rl.algorithms.dpo:IPO",
        "ppo": "paceline.rl.algorithms.ppo:PPO",
        "reinforce": "paceline.rl.algorithms.reinforce:REINFORCE",
        "rloo": "paceline.rl.algorithms.reinforce:RLOO",
    },
    "engine": {
        "local": "paceline.rl.text.local:LocalEngine",
    },
    "system": {
        "hf_ast": "paceline.rl.redteam.hf_ast_system:HFASTSystem",
        "hf_ast_value": "paceline.rl.redteam.hf_ast_value_system:HFASTValueSystem",
        "policy": "paceline.rl.text.policy_system:PolicySystem",
        "policy_value": "paceline.rl.text.value_system:PolicyValueSystem",
        "hf_evaluation": "paceline.rl.redteam.hf_ast_system:HFEvaluationSystem",
    },
    "rollout_sampler": {
        "ast": "paceline.rl.redteam.ast_sampler:ASTSampler",
        "prompts": "paceline.rl.text.prompt_sampler:PromptSampler",
    },
    "scorer": {
        "classifier": "paceline.rl.redteam.scorers:ClassifierScorer",
        "detoxify": "paceline.rl.redteam.scorers:DetoxifyScorer",
        "llama_guard": "paceline.rl.redteam.scorers:LlamaGuardScorer",
        "profanity": "paceline.rl.redteam.scorers:ProfanityScorer",
    },
    "model_factory": {
        "actor_critic": "paceline.rl.trainer:ActorCriticFactory",
        "huggingface": "paceline.lm.models:HFModelFactory",
    },
    "tokenizer_factory": {
        "huggingface": "paceline.lm.models:HFTokenizerFactory",
    },
    "optimizer_factory": {
        "adamw": "paceline.factories.optimizers:AdamWFactory",
        "sgd": "paceline.factories.optimizers:SGDFactory",
    },
    "scheduler_factory": {
        "constant": "paceline.factories.schedules:ConstantFactory",
        "cosine": "paceline.factories.schedules:CosineFactory",
        "linear": "paceline.factories.schedules:LinearFactory",
        "wsd": "paceline.factories.schedules:StableDecayFactory",
    },
    "logger": {
        "jsonl": "paceline.log.sinks:JsonlSink",
        "mlflow": "paceline.trackers.tracker:MLflow",
        "swanlab": "paceline.trackers.tracker:SwanLab",
        "tensorboard": "paceline.log.tensorboard:TensorBoard",
        "trackio": "paceline.trackers.tracker:Trackio",
        "wandb": "paceline.trackers.tracker:Wandb",
    },
}
# What users of other systems ask for by name, and what it is.
_NOT_YET = {
    "trainer": {"dpo": "training on preferences (DPO)"},
    "data_source": {"snowflake": "reading from Snowflake"},
    "engine": {
        "http": "completing prompts by a server",
        "ray": "completing prompts on Ray",
        "sglang": "completing prompts with SGLang",
        "vllm": "completing prompts with vLLM",
    },
    "model_factory": {"liger": "training with Liger's kernels"},
}
_registered: dict[str, dict[str, Any]] = {}
_of_packages: dict[str, dict[str, Any]] = {}  # what their entry points have registered


def register(kind: str, name: str) -> Callable[[T], T]:
    """Makes a class or function known to recipes as `type: name` in slots of `kind`.

    Registering the same class again (a reloaded module, a notebook cell run twice) replaces it.

    Args:
        kind: one of `KINDS`, such as "callback".
        name: as recipes write it.

    Returns:
        A decorator that returns what it is given.

    Raises:
        ConfigError: there is no such kind, or the name is taken by another class.
    """
    _check_kind(kind)

    def add(target: T) -> T:
        if held := taken_by(kind, name, target):
            raise ConfigError(f"the {kind} name {name!r} is taken by {held}; choose another.")
        _registered.setdefault(kind, {})[name] = target
        return target

    return add


def register_named(kind: str, cls: type) -> None:
    """Registers a class of `kind` that gives itself a `name`; for `__init_subclass__` of a base.

    Args:
        kind: one of `KINDS`.
        cls: a class just defined. An inherited name is not its own: it is abstract then.

    Raises:
        ConfigError: the name is taken by another class, or the class lacks a method that its kind
            must have.
    """
    name = vars(cls).get("name")
    if isinstance(name, str) and name:
        if missing := missing_methods(cls):
            lines = "".join(f"\n  {text}" for text in missing)
            raise ConfigError(f"the class {cls.__qualname__}:{lines}")
        register(kind, name)(cls)


def missing_methods(cls: type) -> list[str]:
    """The methods that a class still has to define, as its bases say; each in a sentence.

    Args:
        cls: a class whose bases mark such methods as `abstractmethod`.
    """
    return [
        f"it has no {name}: define {name}({', '.join(inspect.signature(method).parameters)})."
        for name, method in sorted(inspect.getmembers_static(cls))
        if getattr(method, "__isabstractmethod__", False)
    ]


def taken_by(kind: str, name: str, target: Any) -> str | None:
    """The dotted path of what already has a name; None if it is free, or is this very target's.

    Args:
        kind: one of `KINDS`.
        name: as recipes write it.
        target: the class or function that asks for it.
    """
    held = _held(kind, name)
    return None if held in (None, _reference(target)) else held.replace(":", ".")


def names(kind: str) -> list[str]:
    """Every name that `lookup` knows for `kind`, sorted.

    Raises:
        ConfigError: there is no such kind, or an installed package cannot be imported.
    """
    _check_kind(kind)
    _import_packages()
    return sorted(
        {n for table in (_SHIPPED, _of_packages, _registered) for n in table.get(kind, {})}
    )


def lookup(kind: str, name: str) -> Any:
    """The class or function registered as `name`.

    Args:
        kind: one of `KINDS`, such as "callback".
        name: as recipes write it.

    Raises:
        ConfigError: no such kind or name; the nearest known one is suggested.
    """
    _check_kind(kind)
    if name in _registered.get(kind, {}):
        return _registered[kind][name]
    if name in _SHIPPED.get(kind, {}):
        module, _, attribute = _SHIPPED[kind][name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    known = names(kind)
    if name in _of_packages.get(kind, {}):
        return _of_packages[kind][name]
    if later := _NOT_YET.get(kind, {}).get(name):
        raise ConfigError(f"no {kind} is registered as {name!r}: {later} does not exist yet.")
    there_is = f" Known: {', '.join(known)}" if known else ""
    raise ConfigError(f"no {kind} is registered as {name!r}{nearest(name, known) or '.'}{there_is}")


def origin(kind: str, name: str) -> str:
    """Where a registered class or function comes from, for people.

    Args:
        kind: one of `KINDS`.
        name: one of `names(kind)`.

    Returns:
        Its dotted path, and the file for what is neither Paceline's nor an installed package's.
    """
    held = _held(kind, name) or ""
    module = held.partition(":")[0]
    path = held.replace(":", ".")
    if name in _SHIPPED.get(kind, {}) or name in _of_packages.get(kind, {}):
        return path
    file = getattr(sys.modules.get(module), "__file__", None)
    return f"{path} ({file})" if file else path


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Afterwards the names mean what they meant before."""
    before = {kind: dict(named) for kind, named in _registered.items()}
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(before)


def _reference(target: Any) -> str:
    """What a class or function is known by: a reloaded module's is the same one."""
    name = getattr(target, "__qualname__", None) or repr(target)
    return f"{getattr(target, '__module__', '')}:{name}"


def _held(kind: str, name: str) -> str | None:
    """What is registered as `name`, by its reference."""
    for table in (_registered, _of_packages):
        if name in table.get(kind, {}):
            return _reference(table[kind][name])
    return _SHIPPED.get(kind, {}).get(name)


@cache
def _import_packages() -> None:
    """Imports what installed packages name as entry points; their classes register themselves.

    Raises:
        ConfigError: one cannot be imported.
    """
    with restored():
        before = {kind: dict(named) for kind, named in _registered.items()}
        for point in entry_points(group="paceline"):
            try:
                point.load()
            except Exception as error:
                raise ConfigError(
                    f"the entry point {point.name!r} of an installed package, {point.value!r}, "
                    f"cannot be imported: {type(error).__name__}: {error}"
                ) from error
        for kind, named in _registered.items():
            known = before.get(kind, {})
            fresh = {name: held for name, held in named.items() if name not in known}
            _of_packages.setdefault(kind, {}).update(fresh)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(
            f"nothing can be registered as {kind!r}{nearest(kind, KINDS) or '.'} "
            f"Kinds: {', '.join(KINDS)}"
        )
