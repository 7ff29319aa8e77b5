"""The lines that a run prints of its logs."""

from __future__ import annotations

from types import SimpleNamespace

from stages.training.progress import Progress, named

STATE = SimpleNamespace(global_step=9, max_steps=27)


def line(stage, metrics, tmp_path):
    return Progress(stage, None, tmp_path / "metrics.jsonl").eval_line(STATE, metrics)


def test_what_a_watched_run_looks_at_is_not_taken_for_its_evaluation(tmp_path):
    """Both have a perplexity: that of the plain text is named whole."""
    assert line("sft", {"forgetting/perplexity": 4.594, "forgetting/start": 1, "data/dropped": 0}, tmp_path) == "sft 9/27  forgetting/perplexity 4.594  data/dropped 0"
    both = {"evaluation/perplexity": 49.62, "sft/eval_loss": 3.9, "forgetting/perplexity": 4.594}
    assert line("sft", both, tmp_path) == "sft 9/27  evaluation: perplexity 49.62"


def test_other_stages_show_what_they_measure(tmp_path):
    assert line("dpo", {"dpo/eval_loss": 0.5, "dpo/eval_accuracy": 0.75}, tmp_path) == "dpo 9/27  eval_loss 0.5  eval_accuracy 0.75"


def test_means_of_means_are_not_kept():
    """TRL's token accuracy of DPO is a mean over micro-batches, so it changes with the number of processes; SFT counts its own."""
    logs = {"loss": 0.5, "mean_token_accuracy": 0.25, "entropy": 1.5, "rewards/margins": 0.125, "eval_mean_token_accuracy": 0.5}
    assert named("dpo", logs) == {"dpo/loss": 0.5, "dpo/margin": 0.125}
    assert named("sft", {"loss": 0.5, "mean_token_accuracy": 0.25, "entropy": 1.5}) == {"sft/loss": 0.5, "sft/token_accuracy": 0.25, "sft/entropy": 1.5}
