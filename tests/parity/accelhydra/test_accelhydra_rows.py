"""No row of AccelHydra's tables is dropped in silence."""

from __future__ import annotations

from parity_rows import Later, unanswered, without_test

ACCEPTANCE = [
    *("01", "02", "03", "04", "06", "07", "09", "10", "11", "13", "14", "17", "18", "19", "20"),
    *("21", "22", "23", "25", "26", "27", "28"),
]

FEATURES: dict[str, str | Later] = {
    "1 entry point": "test_AH_01_overrides_reach_trainer_and_optimizer",
    "2 config loading": "test_groups_interpolation_and_overrides_compose",
    "3 resolvers": "test_AH_02_defaults_and_interpolation",
    "4 dump_config": "test_AH_03_the_resolved_recipe_is_written_once_without_training",
    "5 top-level keys": "test_all_mistakes_at_once_each_with_place_and_nearest_name",
    "6 launcher flow": "test_every_part_reaches_the_trainer",
    "7 data loader building": "test_AH_13_the_seed_makes_the_weights_and_the_data_too",
    "8 trainer fields": "test_a_keyword_of_another_system_names_ours",
    "9 training_step and validation_step": "test_AH_14_resume_in_mid_epoch",
    "10 hooks": "test_AH_27_hooks_need_no_super",
    "11 hook order": "test_AH_04_hook_order",
    "12 step": "test_accumulation_goes_on_after_a_validation",
    "13 epoch_length": "test_AH_06_epoch_longer_than_the_loader",
    "14 validation": "test_modes_and_gradients_in_a_validation",
    "15 lr stepping": "test_schedulers_of_interval_step_and_epoch",
    "16 lr horizon": "test_a_schedule_is_told_the_length_of_the_run",
    "17 warm-up": "test_AH_09_warm_up_is_counted_in_optimizer_steps",
    "18 accumulation": "test_accumulation_equals_the_large_batch_short_window_included",
    "19 clipping": "test_clipping_is_that_of_torch",
    "20 logging": "test_AH_28_a_tracker_gets_the_settings_and_goes_on_where_it_stood",
    "21 LoggingLogger": Later("Python's logging.FileHandler in two lines; no helper of our own"),
    "22 checkpoint triggers": "test_AH_26_permanent_checkpoints_survive",
    "23 retention": "test_AH_11_the_newest_by_progress_are_kept",
    "24 checkpoint contents": "test_AH_25_checkpoint_objects_come_back_by_name",
    "25 resume, trainer": "test_AH_14_resume_in_mid_epoch",
    "26 resume, launcher": "test_AH_18_an_override_at_resume_wins_or_is_named",
    "27 config.yaml": "test_AH_17_the_recipe_stands_in_the_run_and_runs_it_again",
    "28 MetricMonitor": "test_nan_is_never_better_and_never_the_best",
    "29 early stop": "test_early_stop_counts_validations_without_a_better_one",
    "30 seeds": "test_AH_13_the_seed_makes_the_weights_and_the_data_too",
    "31 DDP": "test_ranks_equal_one_with_as_many_times_the_batch",
    "32 trainable-only checkpoints": "test_AH_20_only_what_is_trained_is_saved",
    "33 model mixins": Later("counting is preview's, loading is init_from's; no mixins"),
    "34 pretrained helpers": "test_init_from_takes_weights_alone_and_says_which",
    "35 tensor helpers": Later("masks and padding belong to a model's own code"),
    "36 loss wrappers": Later("training_step adds its losses; independent ones by optimizer name"),
    "37 PaddingCollate": Later("collate_fn takes any function; padding comes with paceline.lm"),
    "38 BucketSampler": Later("a batch_sampler of one's own works; buckets come with paceline.lm"),
    "39 progress": "test_on_a_terminal_bars_are_drawn_and_the_terminal_is_given_back",
    "40 read_jsonl_to_mapping": Later("json.loads in one line; no helper of our own"),
}

DEFECTS: dict[str, str | Later] = {
    "1": "test_accumulation_goes_on_after_a_validation",
    "2": "test_AH_07_one_cycle_horizon",
    "3": "test_AH_10_best_does_not_push_out_the_newest",
    "4": "test_the_monitor_is_saved_with_the_epoch_it_has_seen",
    "5": "test_AH_13_the_seed_makes_the_weights_and_the_data_too",
    "6": "test_AH_14_resume_in_mid_epoch",
    "7": "test_7_no_gradient_is_lost_at_a_checkpoint",
    "8": "test_the_order_of_checkpoints_is_numeric",
    "9": "test_AH_17_the_recipe_stands_in_the_run_and_runs_it_again",
    "10": "test_AH_18_an_override_at_resume_wins_or_is_named",
    "11": "test_AH_18_an_override_at_resume_wins_or_is_named",
    "12": "test_AH_22_gradient_norm_at_every_row",
    "13": "test_AH_21_ranks_with_different_metrics_stop_together",
    "14": "test_AH_19_a_renamed_module_is_refused",
    "15": "test_AH_09_warm_up_is_counted_in_optimizer_steps",
    "16": "test_an_error_in_validation_leaves_gradients_and_modes_as_they_were",
    "17": "test_every_count_of_the_constructor_is_checked",
    "18": "test_AH_27_hooks_need_no_super",
    "19": "test_AH_23_a_metric_that_never_comes_is_said_at_once",
    "20": "test_early_stop_without_a_monitor_or_validation_is_refused",
    "21": "test_21_a_run_that_diverges_does_not_go_on",
    "22": "test_22_the_norm_logged_under_fp16_is_that_of_the_true_gradients",
    "23": "test_buffers_of_the_loss_function_are_saved_and_learnt_losses_learn",
    "24": "test_gradients_are_exchanged_once_a_window",
    "25": "test_25_loaders_need_no_length",
    "26": "test_AH_28_a_tracker_gets_the_settings_and_goes_on_where_it_stood",
    "27": "test_27_a_schedule_runs_as_fast_on_two_ranks_as_on_one",
    "28": "test_AH_09_warm_up_is_counted_in_optimizer_steps",
    "29": Later("there is no BucketSampler"),
    "30": Later("there is no BucketSampler"),
    "31": "test_init_from_falls_back_on_an_older_intact_checkpoint",
    "32": "test_init_from_what_has_nothing_in_common_is_refused",
    "33": "test_a_misspelt_flag_is_not_ignored",
    "34": "test_resolvers_of_others_are_left_alone",
    "35": "test_35_a_trainer_is_an_object_like_any_other",
    "36": "test_AH_25_checkpoint_objects_come_back_by_name",
    "37": "test_37_triggers_that_meet_make_one_checkpoint",
    "38": "test_each_recipe_trains",
}


def test_each_acceptance_row_has_a_test_of_its_name() -> None:
    assert without_test(ACCEPTANCE, "AH") == []


def test_each_feature_has_a_test_or_a_reason() -> None:
    assert [int(row.split()[0]) for row in FEATURES] == list(range(1, 41))
    assert unanswered(FEATURES) == {}


def test_each_defect_has_a_test_or_a_reason() -> None:
    assert [int(row) for row in DEFECTS] == list(range(1, 39))
    assert unanswered(DEFECTS) == {}
