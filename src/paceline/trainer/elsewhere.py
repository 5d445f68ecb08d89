"""What other systems call things: answered with what to write here.

Keywords of the constructor, methods that a subclass defines and events that a callback has are
looked for in the tables before training. What is called or read on a trainer by another system's
habit is answered at once: `OtherNames` holds the names that a Trainer does not have, and
`with_our_arguments` says what a method takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

from paceline.errors import ConfigError, unknown_settings

P = ParamSpec("P")
T = TypeVar("T")

# Keywords of the constructor.
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
    "num_epochs": "epochs",
    "min_epochs": "nothing: give early_stop a longer patience",
    "min_steps": "nothing: give early_stop a longer patience",
    "net": "model",
    "network": "model",
    "module": "model",
    "loss_function": "loss_fn",
    "objective": "loss_fn",
    "optim": "optimizer",
    "lr": "optimizer=torch.optim.AdamW(model.parameters(), lr=...)",
    "valid_loader": "val_dataloader",
    "valid_dataloader": "val_dataloader",
    "validation_loader": "val_dataloader",
    "eval_loader": "val_dataloader",
    "datamodule": "train_dataloader and val_dataloader",
    "dataset": "train_dataloader=DataLoader(...)",
    "test_dataloader": "evaluate(loader), after training",
    "test_loader": "evaluate(loader), after training",
    "test_dataset": "evaluate(loader), after training",
    "limit_test_batches": "validate_every=ValidationPolicy(max_batches=...)",
    "num_workers": "num_workers=... of the loader",
    "args": "the Trainer's own keywords",
    "config": "the Trainer's own keywords, or a recipe",
    "tokenizer": "collate_fn=... of the loader",
    "processing_class": "collate_fn=... of the loader",
    "gpus": "`paceline train RECIPE --nproc N`, or torchrun",
    "tpu_cores": "nothing: the device follows from the machine (trainer.device)",
    "cpu": "nothing: the device follows from the machine (trainer.device)",
    "use_cpu": "nothing: the device follows from the machine (trainer.device)",
    "no_cuda": "nothing: the device follows from the machine (trainer.device)",
    "use_distributed_sampler": "nothing: each sample counts once, on any number of ranks",
    "replace_sampler_ddp": "nothing: each sample counts once, on any number of ranks",
    "sync_batchnorm": "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), before the Trainer",
    "reload_dataloaders_every_n_epochs": "train_dataloader, an iterable whose __iter__ loads anew",
    "overfit_batches": "epoch_length, in micro-batches, of a loader that does not shuffle",
    "detect_anomaly": "on_nonfinite; `paceline train RECIPE --replay-failure RUN` finds the module",
    "benchmark": "torch.backends.cudnn.benchmark = True, before training",
    "clip_grad_norm": "max_grad_norm",
    "gradient_clip": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "clip_norm": "max_grad_norm",
    "amp": 'precision="bf16" or "fp16"',
    "use_amp": 'precision="bf16" or "fp16"',
    "patience": "early_stop",
    "monitor": "metric_monitor=MetricMonitor(metric_name=..., mode=...)",
    "log_dir": "run_dir",
    "logging_dir": "run_dir",
    "save_dir": "run_dir",
    "save_freq": "checkpoint=CheckpointPolicy(every_epochs=..., every_steps=...)",
    "ckpt_dir": "run_dir, which holds checkpoints/",
    "checkpoint_path": "run_dir, which holds checkpoints/",
    "ema": "callbacks=[AveragedWeights(...)]",
    "max_iterations": "max_steps",
    "train_iters": "max_steps",
    "eval_interval": "validate_every, in optimizer steps",
    "micro_batch_size": "data.micro_batch_size of a recipe, or the batch_size of train_dataloader",
    "kill_switch_path": "nothing: a file STOP in the run's folder stops a run",
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
# Names that are called or read on a trainer, beside METHODS_ELSEWHERE.
ATTRIBUTES_ELSEWHERE = {
    "test": "evaluate(loader)",
    "validate": "evaluate(), or evaluate(loader)",
    "test_step": "validation_step, which evaluate(loader) calls",
    "run": "train()",
    "fit_generator": "train(loader)",
    "fit_transform": "train(), then predict(loader)",
    "train_one_epoch": "epoch()",
    "save": "checkpoint() within a run; afterwards `paceline export RUN`",
    "save_model": "checkpoint() within a run; afterwards `paceline export RUN`",
    "save_pretrained": "checkpoint() within a run; afterwards `paceline export RUN`",
    "save_weights": "checkpoint() within a run; afterwards `paceline export RUN`",
    "save_state": "checkpoint(), which is called within a run",
    "save_checkpoint": "checkpoint(), which is called within a run",
    "save_metrics": "metrics.jsonl of the run's folder, or result.metrics",
    "save_hyperparameters": "nothing: run.json keeps the settings",
    "hparams": "nothing: run.json keeps the settings",
    "load": "train(), which resumes by itself; for weights alone resume=Resume(init_from=...)",
    "load_model": "paceline.recipe.load_model(RUN), or evaluate and predict with checkpoint=...",
    "load_weights": "resume=Resume(init_from=...), or evaluate and predict with checkpoint=...",
    "load_state": "train(), which resumes by itself",
    "load_checkpoint": "train(), which resumes by itself; or resume=PATH",
    "load_from_checkpoint": "paceline.recipe.load_model(RUN), or evaluate(checkpoint=...)",
    "resume_from_checkpoint": "train(), which resumes by itself; or resume=PATH",
    "from_argparse_args": "Trainer(**vars(args)), with the Trainer's own keywords",
    "from_pretrained": "paceline.recipe.load_model(RUN)",
    "push_to_hub": "nothing: `paceline export RUN` writes a safetensors file",
    "register_for_checkpointing": "checkpoint_objects, or any attribute that has a state_dict",
    "prepare": "nothing: a run places models and splits the data by itself",
    "prepare_model": "nothing: a run places models by itself",
    "unwrap_model": "model, which is yours again after a run; within one, named_models()",
    "model_wrapped": "model",
    "lightning_module": "the trainer itself",
    "accelerator": "world and device",
    "distributed_type": "parallel",
    "state": "progress within a run, result afterwards; state_dict() has all of it",
    "args": "the Trainer's own attributes",
    "config": "the Trainer's own attributes; of a recipe, resolved_recipe",
    "is_main_process": "world.is_main",
    "is_local_main_process": "world.is_main",
    "is_global_zero": "world.is_main",
    "is_world_process_zero": "world.is_main",
    "is_local_process_zero": "world.is_main",
    "global_rank": "world.rank",
    "process_index": "world.rank",
    "local_rank": "world.local_rank",
    "local_process_index": "world.local_rank",
    "world_size": "world.size",
    "num_processes": "world.size",
    "num_devices": "world.size",
    "wait_for_everyone": "world.barrier()",
    "gather": "world.all_gather_object(value)",
    "gather_for_metrics": "log, or predict, which have all samples of all ranks",
    "all_gather": "world.all_gather_object(value)",
    "reduce": "world.all_reduce(tensor)",
    "print": "say(text)",
    "is_last_batch": "window.is_last",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "epoch_idx": "current_epoch",
    "current_step": "global_step",
    "iteration": "global_step",
    "step_count": "global_step",
    "num_training_batches": "train_batches",
    "num_training_steps": "training_horizon",
    "estimated_stepping_batches": "training_horizon",
    "total_steps": "training_horizon",
    "optimizers": "optimizer, or named_optimizers()",
    "lr_schedulers": "lr_scheduler, or named_schedulers()",
    "scheduler": "lr_scheduler",
    "criterion": "loss_fn",
    "train_loader": "train_dataloader",
    "val_loader": "val_dataloader",
    "datamodule": "train_dataloader and val_dataloader",
    "train_dataset": "train_dataloader.dataset",
    "eval_dataset": "val_dataloader.dataset",
    "metrics": "result.metrics",
    "history": "result.history",
    "log_history": "result.history",
    "callback_metrics": "result.metrics",
    "logged_metrics": "result.metrics",
    "progress_bar_metrics": "result.metrics",
    "log_metrics": "log_dict(metrics), within a run",
    "logger": "loggers",
    "log_scalar": "log(name, value)",
    "track": "log(name, value)",
    "best_model_path": 'evaluate, predict and export with checkpoint="best"',
    "checkpoint_callback": "checkpoint_policy",
    "early_stopping_callback": "early_stop",
    "should_stop": "request_stop(reason), or is_over",
    "stop_training": "request_stop(reason)",
    "stop": "request_stop(reason)",
    "terminate": "request_stop(reason)",
    "interrupt": "request_stop(reason)",
    "add_callback": "callbacks=[...] of the constructor",
    "remove_callback": "callbacks=[...] of the constructor",
    "add_event_handler": "a Callback, in callbacks=[...] of the constructor",
    "on": "a Callback, in callbacks=[...] of the constructor",
    "attach": "callbacks=[...] of the constructor",
    "callback_handler": "callbacks",
    "zero_grad": "nothing: the loop clears gradients before each window",
    "clip_grad_norm_": "max_grad_norm=...",
    "clip_grad_value_": "on_before_optimizer_step, where gradients are whole and not yet clipped",
    "accumulate": "gradient_accumulation_steps=..., or windows() in a train() of your own",
    "sync_gradients": "window.is_last",
    "no_sync": "nothing: gradients are reduced with a window's last micro-batch",
    "toggle_optimizer": "backward(loss, only=NAME), in a step(window) of your own",
    "untoggle_optimizer": "backward(loss, only=NAME), in a step(window) of your own",
    "to": "nothing: a run places models by itself (trainer.device)",
    "cuda": "nothing: a run places models by itself (trainer.device)",
    "cpu": "nothing: a run places models by itself (trainer.device)",
    "eval": "nothing: validation puts models into eval mode; elsewhere model.eval()",
    "freeze": "callbacks=[Freeze(...)], or requires_grad_(False) of the model",
    "unfreeze": "callbacks=[Freeze(...)], or requires_grad_(True) of the model",
    "parameters": "model.parameters()",
    "named_parameters": "model.named_parameters()",
    "modules": "named_models()",
    "summary": "`paceline preview RECIPE`",
    "tune": "a RunConfig (paceline.tune), which trains several runs",
    "hyperparameter_search": "a RunConfig (paceline.tune), which trains several runs",
    "lr_find": "a RunConfig (paceline.tune), which trains several runs",
    "sanity_check": "`paceline preflight RECIPE`",
    "sanity_checking": "`paceline preflight RECIPE`, which runs by itself",
    "evaluate_generator": "evaluate(loader)",
    "predict_generator": "predict(loader)",
    "predict_on_batch": "predict(loader), or model(inputs)",
    "predict_proba": "predict(loader), with a predict_step of your own",
    "score": "evaluate(loader)",
}
# Arguments of methods, beside ELSEWHERE, by the method's name.
_TRAINED = {
    "model": "Trainer(model=...)",
    "x": "a loader of batches (inputs, targets): DataLoader(TensorDataset(x, y), batch_size)",
    "y": "a loader of batches (inputs, targets): DataLoader(TensorDataset(x, y), batch_size)",
    "callbacks": "Trainer(callbacks=[...])",
    "max_epochs": "epochs, of train(...) or Trainer(...)",
    "epochs": "Trainer(epochs=...), or train(epochs=...)",
    "trial": "a RunConfig (paceline.tune)",
    "ckpt_path": "nothing: a run resumes by itself; or Trainer(resume=PATH)",
    "resume_from_checkpoint": "nothing: a run resumes by itself; or Trainer(resume=PATH)",
    "verbose": "Trainer(progress=...)",
    "steps": "Trainer(max_steps=...)",
    "weights_only": "nothing: no file of a run is ever unpickled",
}
_LOADED = {
    **dict.fromkeys(
        (
            *("dataloaders", "dataloader", "loaders", "data_loader", "datamodule", "val_loader"),
            *("val_dataloader", "val_dataloaders", "test_dataloaders", "test_dataloader"),
            *("test_loader", "eval_dataset", "test_dataset", "dataset", "data", "x", "y"),
        ),
        "loader, a DataLoader",
    ),
    **dict.fromkeys(("ckpt_path", "resume_from_checkpoint", "checkpoint_path"), "checkpoint"),
    "model": "Trainer(model=...)",
    "batch_size": "the batch_size of the loader",
    "verbose": "progress=... of the Trainer",
    "metric_key_prefix": "a name of the loader: evaluate({NAME: loader})",
    "ignore_keys": "predict_step or validation_step, of a subclass",
    "return_predictions": "predict(loader), or predicting(loader) batch by batch",
    "return_dict": "nothing: metrics are a dictionary",
    "sample_weight": "log(name, value, weight) in a validation_step of your own",
    "steps": "ValidationPolicy(max_batches=...), or a shorter loader",
    "weights_only": "nothing: no file of a run is ever unpickled",
}
_ROWS = "a row every log_every steps, one an epoch under epoch/NAME, and one a validation"
_LOGGED = {
    "on_step": f"nothing: what is logged is in {_ROWS}",
    "on_epoch": f"nothing: what is logged is in {_ROWS}",
    "prog_bar": "nothing: the progress shows the loss and the last validation",
    "logger": "loggers of the Trainer",
    "sync_dist": "nothing: each value is the mean over all items of all ranks",
    "sync_dist_group": "nothing: each value is the mean over all items of all ranks",
    "rank_zero_only": "nothing: log on every rank; rows are written by rank 0",
    "reduce_fx": "nothing: a value is the mean over items; other ones come from get_val_metrics",
    "batch_size": "weight, the items that the value is a mean over",
    "add_dataloader_idx": "nothing: of loaders by name each has metrics of its own",
    "metric_attribute": "get_val_metrics, for a metric object of your own",
    "enable_graph": "nothing: values are detached",
    "step": "nothing: rows have the run's own step",
    "global_step": "nothing: rows have the run's own step",
    "epoch": "nothing: rows have the run's own epoch",
    "iteration": "nothing: rows have the run's own step",
    "commit": "nothing: rows are written every log_every steps",
    "start_time": "nothing: timing.jsonl has speeds",
}


class NoSuchName(ConfigError, AttributeError):
    """A trainer does not have what another system's has; still an AttributeError for `hasattr`."""


class _Answer:
    """Stands for a name that a trainer does not have: reading it says what to write instead.

    An attribute of an instance or a subclass comes first, and no other look-up gets slower, as it
    would with `__getattr__`.

    Args:
        text: the answer, with {} for the class.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: object, owner: type) -> Any:
        raise NoSuchName(self._text.format(owner.__name__))


class OtherNames:
    """Answers the names of other systems that are read on a trainer, and what comes later."""

    result = _Answer("a {}'s result is known once train() has returned, which returns it as well.")
    window = _Answer("a {}'s window is known within a step.")

    def __call__(self, *inputs: Any, **more: Any) -> NoReturn:
        """Raises: a trainer is not its model."""
        raise ConfigError(
            f"a {type(self).__name__} is no model: call trainer.model(inputs), or predict(loader) "
            "for the outputs of all batches in order."
        )

    def __dir__(self) -> Iterable[str]:
        answered = inspect.getattr_static
        return [n for n in super().__dir__() if not isinstance(answered(self, n, None), _Answer)]


for _name, _ours in {**METHODS_ELSEWHERE, **ATTRIBUTES_ELSEWHERE}.items():
    if not _name.startswith("on_") and _name != "compile":
        setattr(OtherNames, _name, _Answer(f"{{}} has no {_name}: here it is {_ours}."))


def is_answer(holder: object, name: str) -> bool:
    """Whether a name of an object or class only answers with ours.

    Args:
        holder: the object or class.
        name: of its attribute.
    """
    return isinstance(inspect.getattr_static(holder, name, None), _Answer)


def with_our_arguments(
    elsewhere: Mapping[str, str], hint: str
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: a call that a method does not take is answered with what it takes.

    Args:
        elsewhere: what other systems' keywords are here, beside those of the constructor.
        hint: what the method takes, and where the rest is given.
    """

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(method)

        @wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return method(*args, **kwargs)
            except TypeError:
                try:
                    signature.bind(*args, **kwargs)
                except TypeError as error:
                    why = str(error)
                else:
                    raise  # from within the method
            name, unknown = method.__name__, [n for n in kwargs if n not in signature.parameters]
            if unknown:
                own = {n: f"Trainer({n}=...)" for n in _settings_of(type(args[0]))}
                table = {**ELSEWHERE, **own, **elsewhere}
                why = str(unknown_settings(f"{name}(...)", unknown, signature.parameters, table))
            else:
                why = f"{name}(...): {why}."
            raise ConfigError(f"{why}\n{hint}")

        return checked

    return decorate


def _settings_of(trainer: type) -> list[str]:
    made = (base.__init__ for base in trainer.__mro__ if base.__module__.startswith("paceline."))
    return [
        name
        for make in made
        for name, parameter in inspect.signature(make).parameters.items()
        if name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


trains = with_our_arguments(
    _TRAINED,
    "Models, optimizers and settings are given to Trainer(...); loaders and epochs too, or to "
    "train(train_dataloader, val_dataloader, epochs, seed=...), of which fit(seed=...) is one name "
    "more. A loader of tensors is DataLoader(TensorDataset(x, y), batch_size).",
)
infers = with_our_arguments(
    _LOADED,
    "It takes (loader, checkpoint=..., weights=...); a loader's batches are (inputs, targets), or "
    "mappings, e.g. of DataLoader(TensorDataset(x, y), batch_size). The model is the Trainer's.",
)
logs = with_our_arguments(
    _LOGGED,
    "It is log(name, value, weight=None), or log_dict(values by name, weight=None): every value "
    "gets into the next row as the mean over all items of all ranks.",
)


def unknown_keyword(names: Mapping[str, Any], trainer: type) -> ConfigError:
    """The error for keywords that the Trainer does not have.

    Args:
        names: the unknown keywords; those of other systems are translated.
        trainer: the class, whose constructor's keywords are suggested.
    """
    known = [name for name in inspect.signature(trainer).parameters if name != "unknown"]
    return unknown_settings("Trainer(...)", names, known, ELSEWHERE)
