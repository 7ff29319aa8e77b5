"""The lines that a run prints of its logs."""

from __future__ import annotations

from types import SimpleNamespace

from stages.training.progress import Progress

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
