"""Where each row of the specification's table, and each defect it names, is tested. A test below checks that the tests exist.

row 1   KL per completion token, k1 and k3    test_row_1_k1_and_k3_by_hand, test_row_1_kl_is_a_penalty_on_every_completion_token
row 2   where the score lands                 test_row_2_trap_2_the_score_is_on_the_last_real_token, test_row_2_post_eos_puts_the_score_one_position_later, test_row_2_post_eos_trains_a_value_one_position_later_too
row 3   kl_coef and its controller            test_row_3_the_kl_controller_by_hand, test_row_3_the_adaptive_controller_moves_once_per_iteration
row 4   missing EOS                           test_row_4_each_rule_for_a_missing_eos_by_hand, test_row_4_the_penalty_comes_after_centring, test_row_4_row_5_completions_that_were_cut_off_are_told_from_finished_ones
row 5   generation stops                      test_row_5_a_completion_ends_with_the_first_of_any_eos_id, test_row_5_the_last_token_of_a_full_completion_may_be_the_eos, test_row_5_fixed_length_treats_an_eos_like_any_other_token
row 6   temperature                           test_row_6_trap_6_log_probs_are_those_of_the_models_own_logits_at_the_temperature, test_the_reference_divides_by_the_temperature_too, test_row_6_logits_of_half_precision_are_divided_by_the_temperature_in_float32
row 7   tokens                                test_row_7_trap_10_the_sampled_ids_are_what_is_trained_on, test_row_7_a_reward_model_with_another_tokenizer_reads_text_in_its_own_template
row 8   old log-probs                         test_row_8_the_samplers_log_probs_are_those_of_a_training_forward, test_trap_11_row_8_in_bf16_the_reference_is_still_the_start_policy
row 9   GAE                                   test_row_9_gae_by_hand, test_row_9_gae_of_a_completion_that_was_cut_off_by_hand, test_row_9_gae_with_a_discount_by_hand, test_row_9_gae_equals_the_double_sum_on_ragged_rows, test_row_9_a_finished_completion_ends_with_value_zero_and_a_cut_one_goes_on
row 10  whitened advantages                   test_row_10_whitening_by_hand, test_row_10_row_11_whitening_of_advantages_and_rewards
row 11  whitened rewards                      test_row_10_row_11_whitening_of_advantages_and_rewards
row 12  value loss                            test_row_12_value_loss_by_hand, test_row_12_value_loss_equals_a_plain_loop_on_ragged_rows
row 13  policy loss                           test_row_13_policy_loss_by_hand, test_row_13_asymmetric_clip_by_hand, test_row_13_dual_clip_by_hand, test_row_13_policy_loss_equals_a_plain_loop_on_ragged_rows
row 14  one mean over all tokens              test_row_14_trap_9_the_same_new_weights_for_every_micro_batch_size, test_row_14_the_step_is_the_gradient_of_one_mean_over_all_completion_tokens, test_row_14_one_update_of_a_fixed_rollout_is_the_same_for_any_processes_and_accumulation
row 15  epochs and minibatches                test_row_15_trap_12_every_minibatch_is_an_optimizer_step_of_its_own, test_row_15_a_pass_visits_each_row_once_in_an_order_of_its_own
row 16  optimizer                             test_row_16_trap_15_the_gradient_norm_is_clipped_without_deepspeed, test_row_16_policy_and_value_function_have_learning_rates_of_their_own
row 17  value function                        test_row_17_a_value_copy_starts_as_the_centred_score, test_row_17_a_head_on_the_policys_trunk, test_one_backbone_the_value_adapter_starts_as_the_centred_reward_adapter, test_row_17_warm_up_trains_the_value_function_alone
row 18  score normalisation                   test_row_18_centring_scaling_and_clipping_by_hand, test_row_18_scores_are_centred_and_scaled_only_when_asked
row 19  dropout                               test_row_19_dropout_is_switched_off_wherever_it_hides_and_asserted
row 20  padding                               test_row_20_a_batch_of_one_gives_what_a_batch_of_many_gives, test_row_20_what_the_padding_holds_does_not_matter, test_row_20_every_row_begins_at_position_0, test_row_20_padding_full_of_nan_changes_no_weight
row 21  empty and one-token completions       test_row_21_an_empty_completion_gets_no_reward, test_row_21_a_batch_without_any_token_has_log_probs_zero
row 22  seeds                                 test_row_22_the_same_tokens_for_any_batch_size_order_and_share_of_processes, test_row_22_seeds_differ_between_iterations_completions_and_runs, test_row_22_every_bit_of_a_seed_counts, test_row_22_the_stream_is_a_function_of_seed_and_iteration
row 23  evaluation                            test_row_23_evaluations_stand_where_the_config_says_and_hold_every_metric
row 24  stopping                              test_row_24_the_best_policy_is_published_and_the_manifest_says_which, test_row_24_over_optimisation_stops_a_run_and_publishes_its_best, test_row_24_a_run_above_its_kl_budget_stops_and_publishes_what_is_within
row 25  extras                                test_row_25_the_mix_adds_the_gradient_of_one_mean_over_completion_tokens, test_row_25_the_average_by_hand, test_row_25_a_run_with_the_mix_and_the_average_goes_on_to_the_bit, test_row_25_what_is_published_is_the_average, test_row_25_the_way_back_by_hand, test_row_25_the_way_back_scales_what_an_adapter_adds, test_row_25_what_is_published_lies_on_the_way_back, test_row_25_weights_on_the_way_back_are_what_is_evaluated, test_row_25_an_earlier_best_is_published_as_it_was_evaluated, test_row_25_a_run_goes_back_to_the_weights_that_it_began_with_or_not_at_all
trap 1  pad = EOS                             test_trap_1_a_base_without_a_pad_token_gets_one_and_still_starts_at_its_reference
trap 2  score on a pad                        test_row_2_trap_2_the_score_is_on_the_last_real_token
trap 3  KL of the wrong sign                  test_trap_3_kl_has_the_sign_of_the_divergence, test_trap_3_trap_11_the_kl_is_zero_at_the_reference_and_grows_when_the_policy_moves_away, test_trap_3_kl_to_the_reference_grows_when_the_policy_moves_and_the_score_rises
trap 4  whitening over pads or per rank       test_trap_4_whitening_is_over_the_real_tokens_of_all_rows, test_trap_4_row_14_two_processes_have_the_trajectory_of_one
trap 5  value mask, metrics over padding      test_trap_5_the_value_before_a_token_reads_the_state_before_it, test_trap_5_metrics_leave_padding_out
trap 6  temperature in sampling alone         test_row_6_trap_6_log_probs_are_those_of_the_models_own_logits_at_the_temperature, test_trap_17_samples_follow_the_softmax_at_the_temperature_and_are_not_greedy
trap 7  head initialised with 1/(d + 1)       test_trap_7_a_head_starts_with_standard_deviation_one_over_root_of_d_plus_one
trap 8  scores change with the batch          test_trap_8_the_reward_adapters_scores_do_not_depend_on_the_batch
trap 9  mean of micro-batch means             test_row_14_trap_9_the_same_new_weights_for_every_micro_batch_size
trap 10 decode and tokenise again             test_row_7_trap_10_the_sampled_ids_are_what_is_trained_on
trap 11 the first update                      test_trap_11_the_first_step_has_ratio_one_and_no_kl, test_trap_11_a_run_starts_with_ratio_one_and_no_kl_to_its_reference
trap 12 minibatches without steps             test_row_15_trap_12_every_minibatch_is_an_optimizer_step_of_its_own
trap 13 logits of the whole rollout           test_trap_13_logits_exist_for_completion_tokens_only_and_a_chunk_at_a_time
trap 14 resume                                test_trap_14_a_run_killed_by_the_kernel_ends_as_the_uninterrupted_run_to_the_bit, test_trap_14_wherever_a_run_is_cut_it_ends_alike, test_trap_14_a_run_of_two_processes_that_was_killed_ends_as_the_uninterrupted_one, test_trap_14_killed_at_every_point_a_run_ends_as_the_uninterrupted_one_to_the_bit
trap 15 clipping under DeepSpeed alone        test_row_16_trap_15_the_gradient_norm_is_clipped_without_deepspeed
trap 16 prompts fewer than the batch          test_trap_16_any_set_fills_any_batch_and_each_prompt_is_seen_once_per_epoch, test_trap_16_prompts_fewer_than_the_batch
trap 17 greedy, generation config             test_trap_17_samples_follow_the_softmax_at_the_temperature_and_are_not_greedy, test_trap_17_a_generation_config_neither_counts_nor_changes, test_trap_17_generation_config_of_the_start_is_not_what_samples_nor_what_is_saved
trap 18 ZeRO-3 generation                     test_trap_18_a_rollout_gathers_the_policy_once_and_nothing_else
trap 19 templates that end after EOS          test_trap_19_the_score_is_read_at_the_eos_that_a_rollout_ends_with
"""

from __future__ import annotations

import re
from pathlib import Path


def test_every_row_and_trap_has_a_test_that_exists():
    table = [re.match(r"(row|trap) (\d+) ", line) for line in (__doc__ or "").splitlines()[2:]]
    found = [(entry[1], int(entry[2])) for entry in table if entry]
    assert found == [("row", n) for n in range(1, 26)] + [("trap", n) for n in range(1, 20)]
    files = sorted(Path(__file__).parents[1].glob("*/test_ppo_*.py"))
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    named = set(re.findall(r"test_(?:row|trap|one|the)_\w+", __doc__ or ""))
    assert named <= written
    for name in written:
        for kind, number in re.findall(r"_(row|trap)_(\d+)", name):
            line = next((entry.string for entry in table if entry and (entry[1], entry[2]) == (kind, number)), None)
            assert line is not None, f"{name} names {kind} {number}, which the table does not have"
