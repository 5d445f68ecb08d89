"""Trainers broken on purpose, each with a test that has to notice.

A defect is put in with pytest's monkeypatch, here and in every rank that the test starts. P7 keeps
its mutants in its own file, since they are what a step does and not what a trainer is.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import defects
import pytest
from mathematics import Case as Sum
from test_p01_on_ranks import Plan
from test_p04_every_sample_once import Case as Pass
from test_p05_a_kill_loses_nothing import DAMAGE, HARMLESS

from paceline import reading
from paceline.callbacks import AveragedWeights, Freeze
from paceline.checkpoint import native_engine, publication, safetensors_file
from paceline.checkpoint.state import ModelForm
from paceline.data import fetch, loader
from paceline.data.indexed import IndexedSource, IndexedValidation, Layout
from paceline.data.streamed import StreamedSource
from paceline.lm import LMTrainer, attention
from paceline.lm.data import PackedDataset, chat, factory
from paceline.log import run_record, secrets
from paceline.log.sinks import RowFile
from paceline.losses import policy
from paceline.parallel import ddp
from paceline.parallel.ddp import Replica
from paceline.parallel.placement import Placement
from paceline.recipe import components, compose, recipe
from paceline.recipe.mistakes import Mistakes
from paceline.rl.algorithms.grpo import GRPO
from paceline.rl.control.environment import Episodes
from paceline.rl.text import generate
from paceline.rl.text.policy_system import PolicySystem
from paceline.rl.text.prompt_sampler import PromptSampler
from paceline.trackers import follower
from paceline.trainer import (
    events,
    identity,
    inference,
    lifecycle,
    names,
    recorder,
    saving,
    state_tree,
    window,
)
from paceline.trainer.base import TrainerBase
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.nonfinite import NonFiniteGuard
from paceline.trainer.optimization import Optimization
from paceline.trainer.recorder import Recorder
from paceline.trainer.stop import StopAgreement
from paceline.trainer.trainer import Trainer
from paceline.trainer.window import Window
from paceline.tune import trial
from paceline.tune.reporting import TrialReports
from paceline.world import meeting
from paceline.world.signals import LeaveAtOnce
from paceline.world.world import World
from storm_ranks import Kill


@dataclass(frozen=True)
class Mutant:
    """A defect, and the test that catches it.

    Args:
        name: what is wrong with this trainer.
        replaces: pairs of (owner, attribute) that the defect takes the place of.
        defect: the function, property or value put there.
        test: "module:function" under `tests/`.
        arguments: for the test, beside the fixtures `ranks` and `tmp_path` (or `folder`).
    """

    name: str
    replaces: tuple[tuple[Any, str], ...]
    defect: Any
    test: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for owner, attribute in self.replaces:
            monkeypatch.setattr(owner, attribute, self.defect)


def apply(name: str) -> None:
    """Puts a defect into this process for good."""
    next(mutant for mutant in MUTANTS if mutant.name == name).put_in(pytest.MonkeyPatch())


P1, P3, P4 = "test_p01_on_ranks", "test_p03_same_mathematics", "test_p04_every_sample_once"
P2, P5 = "test_p02_nothing_observed_is_disturbed", "test_p05_a_kill_loses_nothing"
P6, P8 = "test_p06_a_signal_is_a_clean_stop", "test_p08_cheap"
P9 = "test_p09_wrong_before_expensive"
P10, P11 = "test_p10_opening_a_run_executes_nothing", "test_p11_a_run_explains_itself"
P12, P13 = "test_p12_resume_costs_the_same_anywhere", "test_p13_nothing_behind_your_back"
FREEZE = "test_freeze"
ALONE, RECORD = "test_p01_exact_resume", "test_run_record"
AGREE = "test_ranks_agree"
WORDS, CHAT = "test_p03_language_models", "test_chat"
IDENTITY, INFERENCE, MEETING = "test_identity", "test_inference", "test_meeting"
STUDIES, TRACKERS = "test_study_rules", "test_trackers"
UNUSED = "test_what_no_loss_reaches_at_last_keeps_no_gradient_and_all_else_is_exchanged"
LONG = {"n": 7, "batch": 3, "ranks": 2, "accumulation": 2, "length": 3, "shuffle": True}
SHORT = {"n": 11, "batch": 2, "ranks": 3, "accumulation": 2, "length": None, "shuffle": True}


def chain(size: int, *stops: int, **plan: Any) -> dict[str, Any]:
    return {"size": size, "plan": Plan(**plan), "stops": list(stops)}


MUTANTS = [
    Mutant(
        "every micro-batch of a window weighs the same",
        ((Window, "present"),),
        defects.same_weight,
        f"{P3}:test_micro_batches_equal_one_batch",
        {"tokens": False},
    ),
    Mutant(
        "a batch without items spoils its window",
        ((Window, "weighs_nothing"),),
        False,
        f"{P3}:test_micro_batches_equal_one_batch",
        {"tokens": True},
    ),
    Mutant(
        "DDP's mean over ranks is taken for the mean over items",
        ((Window, "present"),),
        defects.one_rank_s_weight,
        f"{P3}:check_ranks",
        {"size": 2, "cases": [Sum()]},
    ),
    Mutant(
        "each rank counts its own items only",
        ((World, "all_reduce"),),
        defects.unreduced,
        f"{P3}:check_ranks",
        {"size": 2, "cases": [Sum(tokens=True)]},
    ),
    Mutant(
        "a metric is the mean of the ranks' means",
        ((recorder, "merge"),),
        defects.mean_of_means,
        f"{P3}:check_ranks",
        {"size": 2, "cases": [Sum()]},
    ),
    Mutant(
        "stand-ins are logged",
        ((window.buffers_kept, "__enter__"),),
        defects.unmuted,
        f"{P3}:check_ranks",
        {"size": 4, "cases": [Sum(3)]},
    ),
    Mutant(
        "stand-ins move running statistics",
        ((window.buffers_kept, "__exit__"),),
        defects.nothing,
        f"{P3}:test_stand_ins_leave_running_statistics_alone",
        {"size": 2, "shard": 1},
    ),
    Mutant(
        "gradients are exchanged in every micro-batch",
        ((Replica, "begin"),),
        defects.always_exchanged,
        f"{P3}:test_gradients_are_exchanged_once_a_window",
    ),
    Mutant(
        "gradients that are never exchanged go unnoticed",
        ((Replica, "check_exchanged"),),
        defects.nothing,
        f"{P3}:test_gradients_that_nobody_exchanged_are_refused",
    ),
    Mutant(
        "an exchange that waits for gradients that never come is left open",
        ((Replica, "_unreached"),),
        defects.none_of_them,
        f"test_p03_unused_parameters:{UNUSED}",
    ),
    Mutant(
        "what no rank has used gets a gradient of zeros",
        ((Optimization, "_drop_unused"),),
        defects.nothing,
        f"test_p03_unused_parameters:{UNUSED}",
    ),
    Mutant(
        "each backward pass of one call puts back what it has exchanged for the others",
        ((Optimization, "_backward_for"),),
        defects.goes_backward_openly,
        f"test_p03_unused_parameters:{UNUSED}",
    ),
    Mutant(
        "what ranks cannot share evenly is left out",
        ((Layout, "share"),),
        defects.floored,
        "test_p04_arithmetic:check_passes",
        {"layout": SHORT},
    ),
    Mutant(
        "ranks are filled up to the same number with samples seen twice",
        ((Layout, "share"),),
        defects.padded,
        "test_p04_arithmetic:check_passes",
        {"layout": SHORT},
    ),
    Mutant(
        "every epoch begins a pass, whatever its length",
        ((Layout, "request"),),
        defects.same_pass,
        "test_p04_arithmetic:check_passes",
        {"layout": LONG},
    ),
    Mutant(
        "a checkpoint counts this rank's samples",
        ((IndexedSource, "state_dict"),),
        defects.own_position,
        "test_p04_arithmetic:check_elastic",
        {"n": 50, "batch": 2, "shuffle": True, "sizes": [2, 1], "steps": [1, 1]},
    ),
    Mutant(
        "validation sees stand-ins",
        ((IndexedValidation, "batches"),),
        defects.with_stand_ins,
        f"{P4}:check_runs",
        {"size": 2, "cases": [Pass(5, 2)]},
    ),
    Mutant(
        "a DistributedSampler's share is shared out again",
        ((loader, "_shuffles"),),
        defects.keeps_share,
        f"{P4}:check_runs",
        {"size": 2, "cases": [Pass(sampler="distributed")]},
    ),
    Mutant(
        "a sampler's own share is shared out again",
        ((loader, "_shared"),),
        defects.unshared,
        f"{P4}:test_a_sampler_that_shares_out_the_data_itself_is_refused",
    ),
    Mutant(
        "a rank whose stream has ended leaves the others waiting",
        ((StreamedSource, "_level"),),
        defects.unleveled,
        f"{P4}:test_streams_of_any_lengths_end_together",
    ),
    Mutant(
        "DDP arranges its buckets anew in each process",
        ((ddp, "_fix_buckets"),),
        defects.nothing,
        f"{P1}:check_chain",
        chain(4, 4, batch=3),
    ),
    Mutant(
        "each rank saves its own running statistics",
        ((Placement, "share_buffers"),),
        defects.nothing,
        f"{P1}:check_chain",
        chain(2, 3),
    ),
    Mutant(
        "the open row is forgotten",
        ((Recorder, "load_state_dict"),),
        defects.nothing,
        f"{P1}:check_chain",
        chain(2, 1),
    ),
    Mutant(
        "dropout depends on how many batches this process has seen",
        ((window, "seed_everything"),),
        defects.by_local_count,
        f"{P1}:check_chain",
        chain(2, 2),
    ),
    Mutant(
        "a replayed stream begins again",
        ((StreamedSource, "_replay"),),
        defects.from_the_start,
        f"{P1}:check_chain",
        chain(2, 1, data="replayed", steps=4),
    ),
    Mutant(
        "each rank stops where it stands",
        ((StopAgreement, "_agree"),),
        defects.own_end,
        f"{AGREE}:test_a_rank_that_is_behind_comes_to_where_the_other_is",
        {"in_validation": False},
    ),
    Mutant(
        "a rank in validation takes back that it has passed the boundary's begin",
        ((StopAgreement, "hold"),),
        defects.held_before,
        f"{AGREE}:test_a_rank_that_is_behind_comes_to_where_the_other_is",
        {"in_validation": True},
    ),
    Mutant(
        "a bad loss is told to the others through the model alone",
        ((NonFiniteGuard, "_poisoned"),),
        defects.scaled_only,
        "test_nonfinite_on_ranks:test_one_ranks_loss_is_every_ranks_error",
        {"kind": "dead", "shard": 1},
    ),
    Mutant(
        "each rank decides by its own metrics",
        ((World, "broadcast_object"),),
        defects.own_value,
        f"{AGREE}:test_what_is_best_is_decided_by_rank_0_for_all",
    ),
    Mutant(
        "augmentation draws on from what this process has drawn",
        ((fetch, "seed_sample"), (fetch, "seed_everything")),
        defects.nothing,
        f"{ALONE}:check_stopped",
        {"step": 6},
    ),
    Mutant(
        "averaged weights begin anew",
        ((AveragedWeights, "load_state_dict"),),
        defects.nothing,
        f"{ALONE}:check_stopped",
        {"step": 6},
    ),
    Mutant(
        "what training has thawed is frozen again",
        ((ModelForm, "switch"),),
        defects.nothing,
        "test_state_comes_back:test_what_is_trained_changes_while_training",
    ),
    Mutant(
        "what training has set to eval mode is trained in train mode",
        ((ModelForm, "switch"),),
        defects.leaves_modes,
        "test_state_comes_back:test_what_is_trained_changes_while_training",
    ),
    Mutant(
        "callbacks of one class get their states in their order",
        ((names, "_matched"),),
        defects.in_order,
        "test_state_by_name:test_callbacks_of_one_class_keep_their_own",
        {"before": (1, 10), "after": (10, 1), "counts": (100, 10)},
    ),
    Mutant(
        "nobody tries whether the state can be loaded",
        ((lifecycle, "prove"), (lifecycle, "prove_first_step"), (saving, "prove_what_is_new")),
        defects.nothing,
        "test_proof:test_a_moment_that_comes_late_is_proven_at_its_first_save",
    ),
    Mutant(
        "schedules begin anew",
        ((state_tree, "load_schedule"),),
        defects.nothing,
        f"{ALONE}:check_stopped",
        {"step": 6},
    ),
    Mutant(
        "what was best is forgotten",
        ((MetricMonitor, "load_state_dict"),),
        defects.nothing,
        f"{ALONE}:check_stopped",
        {"step": 22},
    ),
    Mutant(
        "a validation that was left is not made",
        ((Trainer, "_leave"),),
        defects.forgets_what_is_left,
        f"{ALONE}:check_stopped_in_validation",
    ),
    Mutant(
        "dropout draws on from what a validation has drawn",
        (
            (window, "seed_everything"),
            (fetch, "seed_sample"),
            (fetch, "seed_everything"),
        ),
        defects.nothing,
        f"{P2}:check_watched",
        {"how": "validated each step"},
    ),
    Mutant(
        "averaged weights stay after a validation",
        ((AveragedWeights, "_put_back"),),
        defects.nothing,
        f"{P2}:check_watched",
        {"how": "averaged, and validated with the average"},
    ),
    Mutant(
        "samples that are asked for together share a random stream",
        ((fetch.Fetcher, "_several"),),
        defects.one_stream_a_batch,
        "test_users_objects:test_a_sample_s_noise_does_not_depend_on_its_batch",
    ),
    Mutant(
        "gradients of a validation enter the next step",
        ((Optimization, "begin"),),
        defects.keeps_gradients,
        f"{P2}:test_gradients_from_outside_a_window_reach_no_step",
    ),
    Mutant(
        "gradients made as a micro-batch starts enter its step",
        ((window, "announce"),),
        defects.announces_openly,
        f"{P2}:test_gradients_from_outside_a_window_reach_no_step",
    ),
    Mutant(
        "the checkpoint before goes first",
        ((native_engine.NativeEngine, "_begin"),),
        defects.prunes_first,
        f"{P5}:check_kills",
        {"kills": [Kill("file operation", 9)]},
    ),
    Mutant(
        "the best stay and the newest checkpoint goes",
        ((native_engine, "to_keep"),),
        defects.drops_newest,
        "test_checkpoints:test_pruning_keeps_the_newest_the_best_and_the_milestones",
    ),
    Mutant(
        "rows are not cut back to the checkpoint",
        ((RowFile, "cut"),),
        defects.nothing,
        f"{P5}:check_damage",
        {"damage": HARMLESS["rows beyond"], "goes_on_from": 8},
    ),
    Mutant(
        "what a checkpoint holds is believed",
        ((publication, "verify"),),
        defects.nothing,
        f"{P5}:check_damage",
        {"damage": DAMAGE["flipped shard-00"], "goes_on_from": 7},
    ),
    Mutant(
        "what could not be read is taken for damaged",
        ((reading, "is_answer"),),
        defects.always,
        f"{P5}:check_unreadable",
    ),
    Mutant(
        "signals are not heard",
        ((StopAgreement, "listen"),),
        defects.always,
        f"{P6}:check_where",
        {"at": "training"},
    ),
    Mutant(
        "a signal before training raises an exception wherever the process is",
        ((LeaveAtOnce, "__call__"),),
        defects.leaves_by_exception,
        f"{P6}:check_before_training",
    ),
    Mutant(
        "a validation is never left",
        ((StopAgreement, "abandons"),),
        defects.never,
        f"{P6}:check_where",
        {"at": "validation"},
    ),
    Mutant(
        "what the boundary had left to do is forgotten",
        ((Trainer, "_leave"),),
        defects.forgets_what_is_left,
        f"{P6}:check_where",
        {"at": "training"},
    ),
    Mutant(
        "events that nobody hears are called",
        ((events, "overrides"),),
        defects.always,
        f"{P8}:test_an_event_that_nobody_hears_calls_nothing",
    ),
    Mutant(
        "the first mistake is the only one told",
        ((Mistakes, "add"),),
        defects.first_only,
        f"{P9}:check_in",
    ),
    Mutant(
        "nobody knows where a recipe's values stand",
        ((compose, "_marks"),),
        defects.no_marks,
        f"{P9}:check_in",
    ),
    Mutant(
        "types are not looked at",
        ((components, "fit"),),
        defects.as_it_is,
        f"{P9}:check_in",
        {"kind": "a wrong type deep inside"},
    ),
    Mutant(
        "arguments that nobody takes are left to the constructor",
        ((components.Checker, "_names"),),
        defects.nothing,
        f"{P9}:check_in",
        {"kind": "a misspelt argument"},
    ),
    Mutant(
        "what cannot be combined is left to the trainer",
        ((recipe, "check_combinations"),),
        defects.nothing,
        f"{P9}:check_in",
        {"kind": "an epoch too few"},
    ),
    Mutant(
        "components are built to see whether they can be",
        ((components.Checker, "call"),),
        defects.built_at_once,
        f"{P9}:check_in",
        {"kind": "a misspelt setting"},
    ),
    Mutant(
        "a checkpoint may be a pickle",
        ((safetensors_file, "_read_header"),),
        defects.unpickled,
        f"{P10}:check_pickles",
    ),
    Mutant(
        "secrets are written down",
        ((secrets, "mask_text"),),
        defects.unchanged,
        f"{RECORD}:test_secrets_are_masked",
        {"argument": "--token=SECRET"},
    ),
    Mutant(
        "a run goes on with components of other arguments",
        ((identity, "_arguments_of_components"),),
        defects.none_of_them,
        f"{ALONE}:test_a_run_resumes_only_as_what_it_was",
    ),
    Mutant(
        "the code that trains a run is not kept",
        ((lifecycle, "keep"),),
        defects.nothing,
        f"{P11}:test_a_run_keeps_the_code_that_trained_it",
    ),
    Mutant(
        "why a run stopped is not kept",
        ((run_record.RunRecord, "finish"),),
        defects.nothing,
        f"{P11}:test_a_stopped_run_says_why_and_a_resumed_one_remembers",
    ),
    Mutant(
        "a resumed run reads again what it had read",
        ((IndexedSource, "load_state_dict"),),
        defects.nothing,
        f"{P12}:test_resume_reads_no_sample_that_the_stopped_run_had_seen",
    ),
    Mutant(
        "a loader that keeps its order is shuffled",
        ((loader, "_shuffles"),),
        defects.always,
        f"{P13}:test_a_loader_that_does_not_shuffle_is_not_shuffled",
    ),
    Mutant(
        "a setting that a run has read is assigned without a word",
        ((TrainerBase, "__setattr__"),),
        object.__setattr__,
        f"{P13}:test_what_a_run_has_read_is_not_changed_within_it",
        {"name": "optimizer"},
    ),
    Mutant(
        "what drop_last leaves out is not said",
        ((loader, "_trimmed"),),
        defects.unsaid,
        f"{P13}:test_what_drop_last_leaves_out_is_counted",
    ),
    Mutant(
        "a resumed run trains what is frozen until its next step",
        ((Freeze, "on_load_checkpoint"), (Freeze, "on_train_start")),
        defects.nothing,
        f"{FREEZE}:test_stopped_anywhere_it_ends_with_the_same_bytes",
    ),
    Mutant(
        "what is frozen has gradients of zero, and decays",
        ((Optimization, "begin"),),
        defects.zeros_for_frozen,
        f"{FREEZE}:test_it_trains_as_a_loop_in_plain_torch_that_unfreezes_by_and_by",
    ),
    Mutant(
        "attention reaches over a document's edges",
        ((attention, "_checked"),),
        defects.one_document_a_row,
        "test_attention:test_packed_documents_are_computed_as_each_alone",
        {"name": "Llama"},
    ),
    Mutant(
        "a language model's rows weigh the same, whatever they train",
        ((LMTrainer, "count_items"),),
        defects.rows_of,
        f"{WORDS}:test_steps_equal_those_on_each_document_alone",
        {"family": "GPT2"},
    ),
    Mutant(
        "the first label of a document in a pack is trained",
        ((PackedDataset, "__getitem__"),),
        defects.with_first_labels,
        f"{WORDS}:test_steps_equal_those_on_each_document_alone",
        {"family": "GPT2"},
    ),
    Mutant(
        "answers are looked for in the text",
        ((chat, "_spans"),),
        defects.found_in_the_text,
        f"{CHAT}:test_labels_are_exact_where_the_answer",
        {"template": "chatml", "answer": "is said in the question"},
    ),
    Mutant(
        "what equals the pad id is not trained",
        ((chat, "_encode"),),
        defects.without_pad_ids,
        f"{CHAT}:test_labels_are_exact_where_the_answer",
        {"template": "chatml", "answer": "is said in the question"},
    ),
    Mutant(
        "samples of another template are taken from the cache",
        ((factory, "tokenizer_key"),),
        defects.key_without_template,
        "test_lm_trainers:test_another_template_has_samples_of_its_own",
    ),
    Mutant(
        "a run goes on with other settings",
        ((identity, "_PARTS"),),
        {},
        f"{IDENTITY}:test_a_change_is_refused_with_its_key",
        {"change": "when the scheduler steps"},
    ),
    Mutant(
        "a run goes on with other code",
        ((identity, "own_code"),),
        defects.no_code,
        f"{IDENTITY}:test_code_is_compared_as_far_as_the_run_uses_it",
        {"edit": "a function it calls"},
    ),
    Mutant(
        "a run goes on with other samples",
        ((identity, "content_of"),),
        defects.not_looked_at,
        f"{IDENTITY}:test_a_change_is_refused_with_its_key",
        {"change": "the rows of a TensorDataset"},
    ),
    Mutant(
        "nobody listens to what objects say of themselves",
        ((identity, "_speakers"),),
        defects.none_of_them,
        "test_run_identity:test_what_an_object_says_of_itself_must_be_the_same",
        {"key": "data.dataset.what"},
    ),
    Mutant(
        "ranks may say different things of themselves",
        ((identity, "_check_ranks_agree"),),
        defects.nothing,
        "test_run_identity:test_ranks_must_say_the_same",
    ),
    Mutant(
        "a rank that waits for the others does not hear that one has left",
        ((meeting, "_await_all"),),
        defects.waits_for_all,
        f"{MEETING}:test_a_rank_that_leaves_before_they_meet_ends_the_other_for_its_reason",
    ),
    Mutant(
        "an earlier start's answer is taken for this one's",
        ((meeting, "_name_of_this_start"),),
        defects.takes_any_answer,
        f"{MEETING}:test_each_start_has_a_name_of_its_own_in_a_store_that_is_kept",
    ),
    Mutant(
        "an evaluation takes the latest checkpoint, whichever it was asked for",
        ((inference, "_look_up"),),
        defects.latest,
        f"{INFERENCE}:test_what_another_checkpoint_leaves_on_the_object_that_has_trained",
    ),
    Mutant(
        "an evaluation moves the generators",
        ((inference, "random_state_kept"),),
        contextlib.nullcontext,
        f"{INFERENCE}:test_after_training_it_measures_what_the_run_has_measured",
    ),
    Mutant(
        "an evaluation takes the models at hand for what a checkpoint holds",
        ((inference, "load_for_inference"),),
        defects.nothing,
        f"{INFERENCE}:test_what_training_has_changed_of_a_model_comes_with_its_weights",
    ),
    Mutant(
        "GRPO takes the mean of its micro-batches' means",
        ((GRPO, "count_items"),),
        defects.one_item,
        "test_text_runs:test_micro_batches_and_ranks_change_nothing",
    ),
    Mutant(
        "GRPO corrects for the policy as it is, so that its ratio is always 1",
        ((GRPO, "_loss"),),
        defects.on_policy(GRPO),
        "test_text_runs:test_the_ratio_leaves_one_on_the_second_pass",
    ),
    # What a tracker has got.
    Mutant(
        "a tracker's cursor is reset at a resume",
        ((follower, "read_cursor"),),
        lambda path: None,
        f"{TRACKERS}:test_rows_written_again_are_not_sent_again",
    ),
    Mutant(
        "a tracker skips rows",
        ((follower, "new_rows"),),
        defects.without_the_last_row,
        f"{TRACKERS}:test_rows_written_again_are_not_sent_again",
    ),
    # What a study may rely on.
    Mutant(
        "a killed trial is begun again",
        ((trial, "Resume"),),
        defects.begun_again,
        f"{STUDIES}:test_a_killed_trial_goes_on_from_its_checkpoint_under_its_own_number",
    ),
    Mutant(
        "rank 0 alone hears the verdict",
        ((TrialReports, "on_metrics"),),
        defects.heard_by_rank_0_alone,
        f"{STUDIES}:test_every_rank_hears_the_verdict_and_keeps_it",
    ),
    Mutant(
        "a probability's ratio is never clipped",
        ((policy, "_clipped"),),
        defects.unclipped,
        "test_loss_values:test_the_losses_of_grpo_and_their_gradients",
        {
            "settings": {"aggregation": "grpo"},
            "beta": 0.0,
            "value": 0.10520106445821198,
            "norm": 0.42082414281315944,
        },
    ),
    Mutant(
        "prompts are padded at the right",
        ((generate, "_left_padded"),),
        defects.right_padded,
        "test_generate:test_a_batch_is_as_transformers_generates_and_as_each_alone",
        {"family": "Llama"},
    ),
    Mutant(
        "a token that is the pad token is taken for padding",
        ((generate, "_left_padded"),),
        defects.masked_by_pad_id,
        "test_generate:test_a_batch_is_as_transformers_generates_and_as_each_alone",
        {"family": "Llama"},
    ),
    Mutant(
        "a text begins twice",
        ((generate, "_left_padded"),),
        defects.with_bos,
        "test_generate:test_a_batch_is_as_transformers_generates_and_as_each_alone",
        {"family": "Llama"},
    ),
    Mutant(
        "the same numbers choose the tokens of every completion",
        ((generate, "_noise"),),
        defects.one_noise,
        "test_generate:test_a_batch_is_as_transformers_generates_and_as_each_alone",
        {"family": "Llama"},
    ),
    Mutant(
        "what was sampled is tokenised again",
        ((PolicySystem, "_ids"),),
        defects.tokenised_again,
        "test_text_runs:test_the_ratio_leaves_one_on_the_second_pass",
    ),
    Mutant(
        "a step that only resets is a sample",
        ((Episodes, "step"),),
        defects.resets_are_steps,
        "test_environments:test_a_step_that_only_resets_is_no_sample",
    ),
    Mutant(
        "an episode that was cut off is worth nothing afterwards",
        ((Episodes, "step"),),
        defects.cut_off_is_over,
        "test_environments:test_advantages_bootstrap_what_was_cut_off_and_not_what_ended",
        {"mode": "SAME_STEP"},
    ),
    Mutant(
        "every rank lives the same episodes",
        ((Episodes, "_seed_of"),),
        defects.same_on_each_rank,
        "test_environments:test_each_environment_of_each_seed_begins_elsewhere",
    ),
    Mutant(
        "an evaluation plays the prompts of the training",
        ((PromptSampler, "eval_rollouts"),),
        defects.own_prompts,
        "test_prompts:test_an_evaluation_plays_the_prompts_that_it_is_given",
    ),
]
