"""No row of pytorch_template's tables is dropped in silence."""

from __future__ import annotations

from parity_rows import Later, unanswered, without_test

ACCEPTANCE = [
    *("01", "02", "03", "04", "05", "06", "07", "09", "10", "11", "12", "13", "15", "17", "18"),
    *("20", "21", "22", "24", "25", "26", "27", "29", "30"),
]
REPORT = Later("the report of a study comes with `paceline report`")

DEFECTS: dict[str, str | Later] = {
    "1": "test_1_a_resumed_schedule_is_not_a_step_behind",
    "2": "test_PT_09_no_epoch_is_lost_or_doubled_at_a_resume",
    "3": "test_PT_10_on_the_device_resumed_in_a_new_process_it_ends_the_same",
    "4": "test_PT_13_other_settings_are_another_run",
    "5": "test_PT_12_only_new_seeds_are_trained_and_only_those_asked_for_count",
    "6": "test_6_the_oldest_checkpoints_go_first",
    "7": "test_PT_24_batch_size_and_optimizer_are_searched",
    "8": "test_8_an_error_in_a_trial_is_a_failure_with_its_trace",
    "9": "test_PT_22_pruners_work_and_a_restarted_study_keeps_what_it_knows",
    "10": "test_PT_21_two_fresh_studies_of_one_seed_suggest_the_same",
    "11": "test_33_early_stopping_is_relative_and_ends_a_seed_as_complete",
    "12": "test_PT_17_the_best_follows_the_metric_that_is_monitored",
    "13": "test_14_a_seed_that_diverged_is_not_complete",
    "14": "test_14_a_seed_that_diverged_is_not_complete",
    "15": "test_PT_07_a_callback_can_change_the_gradients_before_the_step",
    "16": "test_PT_11_more_epochs_go_on_where_the_run_stood",
    "17": "test_PT_15_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on",
    "18": "test_nothing_is_read_between_rows",
    "19": "test_stopped_again_and_again_and_in_a_validation_it_ends_the_same",
    "20": "test_the_prediction_is_compared_with_the_k_best_complete_trials",
    "21": REPORT,
    "22": REPORT,
    "23": "test_PT_05_preflight_answers_machines_and_people",
    "24": "test_24_what_a_run_writes_is_plain_yaml_and_json",
    "25": "test_PT_26_a_crashed_run_has_said_what_it_was",
    "26": "test_each_page_of_the_docs_runs",
    "27": "test_PT_04_what_is_hardly_meant_is_listed",
    "28": "test_PT_30_analyze_does_not_exist_yet_but_the_last_validation_is_kept",
    "29": "test_the_shipped_recipes_pass",
    "30": "test_PT_02_floats_and_merge_keys_are_read",
    "31": "test_31_another_scheduler_does_not_keep_the_old_ones_arguments",
    "32": "test_PT_24_batch_size_and_optimizer_are_searched",
    "33": "test_PT_29_without_wandb_everything_else_works",
    "34": "test_PT_30_analyze_does_not_exist_yet_but_the_last_validation_is_kept",
    "35": "test_35_wandb_true_tracks_each_seed_and_continues_its_run",
    "36": "test_ranks_equal_one_with_as_many_times_the_batch",
}

FEATURES: dict[str, str | Later] = {
    "1 RunConfig keys": "test_PT_01_a_template_configuration_trains",
    "2 EarlyStoppingConfig": "test_33_early_stopping_is_relative_and_ends_a_seed_as_complete",
    "3 CheckpointConfig": "test_PT_17_the_best_follows_the_metric_that_is_monitored",
    "4 YAML loader": "test_PT_02_a_wrong_file_is_refused_at_load",
    "5 checks at construction": "test_PT_02_all_mistakes_are_told_at_once_with_their_lines",
    "6 validate_for_execution": "test_PT_02_a_misspelt_name_is_found_before_anything_is_built",
    "7 validate_semantics": "test_PT_04_what_is_hardly_meant_is_listed",
    "8 with_overrides, from_yaml": "test_PT_03_overrides_merge_and_leave_the_original_alone",
    "9 object contracts": "test_PT_01_what_is_built_is_what_the_configuration_says",
    "10 DataLoaders": "test_PT_01_the_loaders_may_be_given",
    "11 CLI": "test_PT_11_the_command_trains_a_run_config",
    "12 train": "test_PT_01_a_template_configuration_trains",
    "13 validate": "test_PT_02_a_misspelt_name_is_found_before_anything_is_built",
    "14 preview": "test_everything_is_shown_and_nothing_written",
    "15 preflight": "test_PT_05_preflight_answers_machines_and_people",
    "16 doctor": "test_the_self_test_passes",
    "17 analyze": "test_PT_30_analyze_does_not_exist_yet_but_the_last_validation_is_kept",
    "18 hpo-report": REPORT,
    "19 monitor": Later("comes with `paceline monitor`"),
    "20 update-skills": Later("tools for other programs are no part of a trainer"),
    "21 run layout": "test_PT_01_a_template_configuration_trains",
    "22 group name": "test_PT_13_what_cannot_change_a_result_shares_the_run",
    "23 tags": "test_35_wandb_true_tracks_each_seed_and_continues_its_run",
    "24 several seeds": "test_PT_12_only_new_seeds_are_trained_and_only_those_asked_for_count",
    "25 SeedManifest": "test_PT_12_only_new_seeds_are_trained_and_only_those_asked_for_count",
    "26 loop": "test_the_golden_trace_of_two_epochs",
    "27 callback API": "test_PT_06_callbacks_come_by_priority_and_ties_as_given",
    "28 built-in callbacks": "test_none_is_left_out",
    "29 TUI line": "test_off_a_terminal_each_row_and_each_validation_is_one_line",
    "30 metrics.csv": "test_PT_09_no_epoch_is_lost_or_doubled_at_a_resume",
    "31 wandb": "test_35_wandb_true_tracks_each_seed_and_continues_its_run",
    "32 loss prediction": "test_exponentials_end_where_they_end",
    "33 early stopping": "test_33_early_stopping_is_relative_and_ends_a_seed_as_complete",
    "34 NaN": "test_14_a_seed_that_diverged_is_not_complete",
    "35 checkpoint content": "test_every_file_of_a_checkpoint_is_safetensors_or_json",
    "36 checkpoint triggers": "test_6_the_oldest_checkpoints_go_first",
    "37 resume": "test_1_a_resumed_schedule_is_not_a_step_behind",
    "38 config hash": "test_PT_13_other_settings_are_another_run",
    "39 provenance": "test_PT_26_a_crashed_run_has_said_what_it_was",
    "40 OptimizeConfig": "test_PT_21_two_fresh_studies_of_one_seed_suggest_the_same",
    "41 PFLPruner": "test_the_prediction_is_compared_with_the_k_best_complete_trials",
    "42 metrics lib": "test_PT_18_metrics_of_ones_own_are_in_every_epochs_row",
    "43 loading API": "test_43_the_best_model_and_any_other_are_loaded",
    "44 recipes": "test_each_recipe_trains",
    "45 migration tooling": "test_each_page_of_the_docs_runs",
}


def test_each_acceptance_row_has_a_test_of_its_name() -> None:
    assert without_test(ACCEPTANCE, "PT") == []


def test_each_feature_has_a_test_or_a_reason() -> None:
    assert [int(row.split()[0]) for row in FEATURES] == list(range(1, 46))
    assert unanswered(FEATURES) == {}


def test_each_defect_has_a_test_or_a_reason() -> None:
    assert [int(row) for row in DEFECTS] == list(range(1, 37))
    assert unanswered(DEFECTS) == {}
