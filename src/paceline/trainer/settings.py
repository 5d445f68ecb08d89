"""Settings of a Trainer that belong together, and other systems' names for its own."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paceline.errors import ConfigError, refuses_unknown, unknown_settings

MODES = ("auto", "never", "must", "fresh")
ELSEWHERE = {
    "criterion": "loss_fn",
    "loss": "loss_fn",
    "scheduler": "lr_scheduler",
    "max_epochs": "epochs",
    "n_epochs": "epochs",
    "num_train_epochs": "epochs",
    "train_loader": "train_dataloader",
    "train_dataloaders": "train_dataloader",
    "val_loader": "val_dataloader",
    "val_dataloaders": "val_dataloader",
    "eval_dataloader": "val_dataloader",
    "gradient_clip_val": "max_grad_norm",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "train_steps_per_epoch": "epoch_length, in micro-batches",
    "val_every_n_steps": "validate_every",
    "num_sanity_val_steps": "nothing: `paceline preflight` validates before a run",
    "device_parameters": "**device_parameters.settings()",
    "log_every_n_steps": "log_every",
    "logger": "loggers",
    "save_every_n_steps": "checkpoint=CheckpointPolicy(every_steps=...)",
    "permanent_save_every_n_steps": "checkpoint=CheckpointPolicy(keep_every_steps=...)",
    "save_every_n_epochs": "checkpoint=CheckpointPolicy(every_epochs=...)",
    "save_last_k": "checkpoint=CheckpointPolicy(keep_last=...)",
    "checkpoint_dir": "run_dir, which holds checkpoints/",
    "resume_from_checkpoint": "resume",
    "auto_reusme_from_latest_ckpt": "nothing: a run resumes by itself (resume)",
    "project_dir": "run_dir",
    "exp_dir": "run_dir",
    "config_dict": "nothing: a recipe's run keeps recipe.yaml, any run its settings in run.json",
    "logging_config": "loggers",
    "even_batches": "nothing: each sample counts once, on any number of ranks",
    "warmup_params": "lr_scheduler=WarmupCosine(optimizer, total_steps=..., warmup=...)",
    "dump_config": "`paceline train RECIPE --dry-run`",
    "dl_train": "train_dataloader",
    "dl_val": "val_dataloader",
    "val_steps_per_epoch": "validate_every=ValidationPolicy(max_batches=...)",
    "limit_val_batches": "validate_every=ValidationPolicy(max_batches=...)",
    "seed": "train(seed=...)",
    "early_stopping_config": "early_stop=... with metric_monitor=MetricMonitor(...)",
    "device": "nothing: the device follows from the machine (trainer.device)",
    "accelerator": "nothing: the device follows from the machine (trainer.device)",
    "devices": "`paceline train RECIPE --nproc N`, or torchrun",
    "num_nodes": "torchrun, or `paceline train RECIPE --slurm nodes=N`",
    "strategy": "parallel=Parallel(...); several processes replicate the model by default",
    "default_root_dir": "run_dir",
    "output_dir": "run_dir",
    "enable_progress_bar": "progress",
    "verbose": "progress",
    "enable_checkpointing": "checkpoint=None for no checkpoints",
    "enable_model_summary": "`paceline preview RECIPE`",
    "fast_dev_run": "`paceline preflight RECIPE`",
    "limit_train_batches": "epoch_length, in micro-batches",
    "steps_per_epoch": "epoch_length, in micro-batches",
    "val_check_interval": "validate_every, in optimizer steps",
    "check_val_every_n_epoch": "validate_every, in optimizer steps",
    "validation_freq": "validate_every, in optimizer steps",
    "eval_strategy": 'validate_every, "epoch" or a number of optimizer steps',
    "eval_steps": "validate_every",
    "validation_steps": "validate_every=ValidationPolicy(max_batches=...)",
    "max_time": "callbacks=[TimeLimit(...)]",
    "profiler": "callbacks=[Profiler(...)]",
    "gradient_clip_algorithm": "max_grad_norm, which clips by the norm",
    "log_with": "loggers",
    "report_to": "loggers",
    "logging_steps": "log_every",
    "mixed_precision": "precision",
    "fp16": 'precision="fp16"',
    "bf16": 'precision="bf16"',
    "torch_compile": "compile",
    "jit_compile": "compile",
    "full_determinism": "deterministic",
    "gradient_checkpointing": "parallel=Parallel(activation_checkpointing=...)",
    "fsdp": "parallel=Parallel(dp_shard=...)",
    "deepspeed": "parallel=Parallel(dp_shard=...)",
    "ddp_find_unused_parameters": "parallel=Parallel(find_unused_parameters=...)",
    "split_batches": "global_batch_size",
    "step_scheduler_with_optimizer": "lr_scheduler_interval",
    "max_train_steps": "max_steps",
    "max_iters": "max_steps",
    "learning_rate": "optimizer=torch.optim.AdamW(model.parameters(), lr=...)",
    "weight_decay": "optimizer=torch.optim.AdamW(model.parameters(), weight_decay=...)",
    "optimizers": "optimizer and lr_scheduler",
    "lr_scheduler_type": "lr_scheduler=WarmupCosine(...), or any of torch's",
    "warmup_steps": "lr_scheduler=WarmupCosine(optimizer, total_steps=..., warmup=...)",
    "warmup_ratio": "lr_scheduler=WarmupCosine(optimizer, total_steps=..., warmup=...)",
    "per_device_train_batch_size": "the batch_size of train_dataloader, or global_batch_size",
    "per_device_eval_batch_size": "the batch_size of val_dataloader",
    "batch_size": "the batch_size of the loader, or global_batch_size",
    "shuffle": "shuffle=... of the loader",
    "dataloader_num_workers": "num_workers=... of the loader",
    "data_collator": "collate_fn=... of the loader",
    "train_dataset": "train_dataloader=DataLoader(...)",
    "eval_dataset": "val_dataloader=DataLoader(...)",
    "validation_data": "val_dataloader=DataLoader(...)",
    "validation_split": "val_dataloader=DataLoader(...), of a part of the data",
    "compute_metrics": "get_val_metrics, or log, of a subclass",
    "metrics": "get_val_metrics, or log, of a subclass",
    "class_weight": "loss_fn=CrossEntropyLoss(weight=...)",
    "save_strategy": "checkpoint=CheckpointPolicy(every_epochs=..., every_steps=...)",
    "save_steps": "checkpoint=CheckpointPolicy(every_steps=...)",
    "save_total_limit": "checkpoint=CheckpointPolicy(keep_last=...)",
    "metric_for_best_model": "metric_monitor=MetricMonitor(...)",
    "greater_is_better": 'metric_monitor=MetricMonitor(..., mode="max")',
    "load_best_model_at_end": 'nothing: evaluate, predict and export take checkpoint="best"',
    "initial_epoch": "nothing: a run resumes by itself (resume)",
    "ckpt_path": "nothing: a run resumes by itself (resume)",
}
METHODS_ELSEWHERE = {
    "train_step": "training_step",
    "training_loss": "loss",
    "compute_loss": "loss",
    "loss_function": "loss",
    "get_loss": "loss",
    "shared_step": "loss",
    "forward": "loss",
    "forward_step": "loss",
    "val_step": "validation_step",
    "valid_step": "validation_step",
    "eval_step": "validation_step",
    "evaluation_step": "validation_step",
    "prediction_step": "predict_step",
    "test_step": "validation_step",
    "validation_step_end": "on_validation_batch_end",
    "training_step_end": "on_train_batch_end",
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "get_val_metrics",
    "compute_metrics": "get_val_metrics",
    "validate": "evaluate",
    "evaluation_loop": "evaluate",
    "val_epoch": "evaluate",
    "train_epoch": "epoch",
    "training_epoch": "epoch",
    "run_epoch": "epoch",
    "train_one_epoch": "epoch",
    "train_loop": "train",
    "training_loop": "train",
    "optimizer_zero_grad": "step",
    "configure_optimizers": "configure",
    "configure_model": "configure",
    "create_optimizer": "configure",
    "create_scheduler": "configure",
    "create_optimizer_and_scheduler": "configure",
    "build_model": "configure",
    "build_optimizer": "configure",
    "configure_callbacks": "callbacks=[...]",
    "get_train_dataloader": "train_dataloader=...",
    "get_eval_dataloader": "val_dataloader=...",
    "val_dataloaders": "val_dataloader=...",
    "save_checkpoint": "checkpoint",
    "train_batch": "training_step",
    "training_batch": "training_step",
    "train_on_batch": "training_step",
    "process_function": "training_step",
    "run_step": "training_step",
    "run_iteration": "training_step",
    "one_batch": "training_step",
    "training_step_and_backward": "training_step",
    "calc_loss": "loss",
    "calculate_loss": "loss",
    "loss_func": "loss",
    "loss_step": "loss",
    "compute_loss_and_metrics": "loss",
    "get_batch_loss": "loss",
    "validate_step": "validation_step",
    "validation_batch": "validation_step",
    "val_batch": "validation_step",
    "eval_batch": "validation_step",
    "test_on_batch": "validation_step",
    "eval_forward": "validation_step",
    "eval_metrics": "get_val_metrics",
    "calculate_metrics": "get_val_metrics",
    "eval_epoch": "evaluate",
    "evaluate_epoch": "evaluate",
    "validate_epoch": "evaluate",
    "valid_epoch": "evaluate",
    "test_epoch": "evaluate",
    "run_validation": "evaluate",
    "validation_loop": "evaluate",
    "eval_loop": "evaluate",
    "fit_epoch": "epoch",
    "one_epoch": "epoch",
    "do_fit": "train",
    "backward_step": "backward",
    "configure_gradient_clipping": "max_grad_norm=...",
    "clip_gradients": "max_grad_norm=...",
    "lr_scheduler_step": "lr_scheduler_interval=...",
    "transfer_batch_to_device": "training_step",
    "setup_model": "configure",
    "setup_optimizer": "configure",
    "init_optimizer": "configure",
    "create_optimizers": "configure",
    "configure_optimizer": "configure",
    "configure_scheduler": "configure",
    "configure_schedulers": "configure",
    "create_lr_scheduler": "configure",
    "test_dataloader": "val_dataloader=...",
    "get_val_dataloader": "val_dataloader=...",
    "on_fit_start": "on_train_start",
    "on_fit_end": "on_train_end",
    "on_train_begin": "on_train_start",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_epoch_begin": "on_train_epoch_start",
    "on_train_epoch_begin": "on_train_epoch_start",
    "on_batch_begin": "on_train_batch_start",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_train_batch_begin": "on_train_batch_start",
    "on_step_begin": "on_train_batch_start",
    "on_substep_end": "on_train_batch_end",
    "on_before_zero_grad": "on_step_end",
    "on_after_batch_transfer": "on_train_batch_start",
    "on_before_batch_transfer": "on_train_batch_start",
    "on_log": "on_step_end",
    "on_save": "on_save_checkpoint",
    "on_evaluate": "on_validation_end",
    "on_validation_epoch_start": "on_validation_start",
    "on_validation_epoch_end": "on_validation_end",
    "on_prediction_step": "on_validation_batch_end",
    "on_test_start": "on_validation_start",
    "on_test_begin": "on_validation_start",
    "on_test_end": "on_validation_end",
    "on_test_epoch_start": "on_validation_start",
    "on_test_epoch_end": "on_validation_end",
    "on_test_batch_start": "on_validation_batch_start",
    "on_test_batch_end": "on_validation_batch_end",
    "on_test_batch_begin": "on_validation_batch_start",
    "prediction_loop": "evaluate",
    "make_train_function": "step",
    "manual_backward": "backward",
    "prepare_data": "configure",
    "configure_sharded_model": "parallel=Parallel(...)",
    "get_decay_parameter_names": "configure",
    "get_optimizer_cls_and_kwargs": "configure",
    "predict_dataloader": "predict(loader)",
    "get_test_dataloader": "evaluate(loader)",
    "teardown": "on_teardown",
}
# Of callbacks and hooks, where they do not begin with "on_".
EVENTS_ELSEWHERE = {
    "setup": "on_setup",
    "teardown": "on_teardown",
    "set_model": "on_setup",
    "before_fit": "on_train_start",
    "before_run": "on_train_start",
    "before_train": "on_train_start",
    "after_fit": "on_train_end",
    "after_run": "on_train_end",
    "after_train": "on_train_end",
    "before_epoch": "on_train_epoch_start",
    "before_train_epoch": "on_train_epoch_start",
    "after_epoch": "on_train_epoch_end",
    "after_train_epoch": "on_train_epoch_end",
    "before_batch": "on_train_batch_start",
    "before_train_iter": "on_train_batch_start",
    "after_batch": "on_train_batch_end",
    "after_train_iter": "on_train_batch_end",
    "before_backward": "on_before_backward",
    "after_backward": "on_after_backward",
    "before_validate": "on_validation_start",
    "before_val": "on_validation_start",
    "before_val_epoch": "on_validation_start",
    "after_validate": "on_validation_end",
    "after_val": "on_validation_end",
    "after_val_epoch": "on_validation_end",
}
READ_BY_OPENING = (
    "train_dataloader",
    "val_dataloader",
    "gradient_accumulation_steps",
    "global_batch_size",
    "epoch_length",
)
# What counts from the moment on when it is assigned within a run.
READ_ALWAYS = (
    *("max_grad_norm", "check_gradients", "lr_scheduler_interval", "max_steps", "early_stop"),
    *("validate_every", "max_val_batches", "log_every", "metric_monitor"),
)
# What a run reads at its start: assigned within it, it would be ignored.
READ_ONCE = frozenset(
    {
        "optimizer",
        "lr_scheduler",
        *READ_BY_OPENING,
        "count_items",
        "precision",
        "compile",
        "deterministic",
        "on_nonfinite",
        "checkpoint_policy",
        "parallel",
        "callbacks",
        "loggers",
        "show_progress",
        "run_dir",
        "resume",
        "seed",
    }
)


def whole_seed(seed: Any) -> int:
    """A run's seed; None is 0.

    Args:
        seed: as it was given to `train` or `fit`.

    Raises:
        ConfigError: it is no whole number, such as a model that other trainers' `fit` takes.
    """
    try:
        return 0 if seed is None else operator.index(seed)
    except TypeError:
        raise ConfigError(
            f"seed={seed!r:.60}: expected a whole number. Models, optimizers and loaders are given "
            "to Trainer(...)."
        ) from None


def read_already(name: str) -> ConfigError:
    """The error for what is changed within a run that would go on with what it has read.

    Args:
        name: of the Trainer's attribute.
    """
    return ConfigError(
        f"{name}: the run that is open read it at its start, and would ignore the change. Set it "
        "before train(), or in configure(); a run that is stopped and started again reads it anew."
    )


class FixedList(list[Any]):
    """A list of the Trainer's that its open run has read."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise read_already("callbacks, loggers")

    append = extend = insert = remove = pop = clear = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse


class FixedDict(dict[str, Any]):
    """Components or loaders by name, which the Trainer's open run has read.

    Args:
        attribute: of the Trainer.
        held: what it holds.
        grows: whether models may be added, and those that are not trained be replaced.
    """

    def __init__(self, attribute: str, held: Mapping[str, Any], *, grows: bool) -> None:
        super().__init__(held)
        self._attribute, self._grows = attribute, grows

    def __setitem__(self, key: str, value: Any) -> None:
        held = self.get(key)
        if not self._grows or (held is not None and any(map(_trains, held.parameters()))):
            raise read_already(f"{self._attribute}[{key!r}]")
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise read_already(self._attribute)

    pop = popitem = clear = __delitem__ = __ior__ = _refuse

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy is the user's


def _trains(parameter: Any) -> bool:
    return parameter.requires_grad


@refuses_unknown(
    every_n_steps="every", val_steps_per_epoch="max_batches", limit_val_batches="max_batches"
)
@dataclass(frozen=True)
class ValidationPolicy:
    """When to validate, and on how much: what `validate_every` takes besides "epoch" and a number.

    Args:
        every: "epoch", or a number of optimizer steps.
        max_batches: the first batches of each rank from each loader; None for all of them, 0 for
            no validation.

    Raises:
        ConfigError: `max_batches` is no number of batches.
    """

    every: Literal["epoch"] | int = "epoch"
    max_batches: int | None = None

    def __post_init__(self) -> None:
        count = self.max_batches
        if count is not None and (type(count) is not int or count < 0):
            raise ConfigError(
                f"ValidationPolicy(max_batches={count!r}): expected a number of batches, or None "
                "for all."
            )


@dataclass(frozen=True)
class Resume:
    """What a run does that finds an earlier one in its folder.

    Args:
        mode: "auto" resumes from the newest intact checkpoint, or starts if there is none;
            "must" fails if there is none; "never" fails if there is one; "fresh" moves an earlier
            run aside; any other text is the path of a checkpoint.
        accept: identity keys that may differ from the checkpoint's, e.g. ("optimizer.lr",).
        init_from: a checkpoint, a run folder or an exported safetensors file, whose model weights
            a new run starts from.
    """

    mode: str = "auto"
    accept: tuple[str, ...] = ()
    init_from: str | Path | None = None

    @property
    def path(self) -> Path | None:
        """The checkpoint asked for by path."""
        return None if self.mode in MODES else Path(self.mode)


def unknown_keyword(names: dict[str, Any], trainer: type) -> ConfigError:
    """The error for keywords that the Trainer does not have.

    Args:
        names: the unknown keywords; those of other systems are translated.
        trainer: the class, whose constructor's keywords are suggested.
    """
    known = [name for name in inspect.signature(trainer).parameters if name != "unknown"]
    return unknown_settings("Trainer(...)", names, known, ELSEWHERE)
