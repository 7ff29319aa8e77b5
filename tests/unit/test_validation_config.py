"""The `evaluation:` section of SFT: what it refuses, and in which words."""

import pytest

from configs.errors import UserError
from configs.load import load
from configs.schema.validation import KNOWN, MEASURED, Validation

BASE = "name: x\ninit_from: base\ndata: d.jsonl\n"
OWN = "{kind: python, function: 'm:f1'}"


def read(tmp_path, section: str, extra: str = ""):
    file = tmp_path / "sft.yaml"
    file.write_text(f"{BASE}{extra}evaluation: {section}\n")
    return load(file, "sft").evaluation


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{metrics: [rouge]}", r"sft\.yaml:4: evaluation: metrics: rouge compare completions, and evaluation\.generate is off; set evaluation\.generate: \{rows: 64\}"),
        (f"{{metrics: [accuracy, {OWN}]}}", "metrics: f1 compare completions, and evaluation.generate is off"),
        ("{metrics: [rogue], generate: {}}", r"found 'rogue'; expected .*'rouge'.*Did you mean 'rouge'\?"),
        ("{generate: {rows: 8}}", "generate: nothing compares what would be generated"),
        ("{metrics: [bleu, bleu], generate: {}}", "metrics: bleu is there twice"),
        (f"{{metrics: [{OWN}, {OWN}], generate: {{}}}}", "metrics: f1 is there twice"),
        ("{labels: ['yes', 'no']}", "labels are those of the metric accuracy"),
        ("{metric: loss}", r"metric 'loss' is not measured; expected one of evaluation/loss, evaluation/perplexity, evaluation/token_accuracy\. Did you mean 'evaluation/loss'\?"),
        ("{metrics: [rouge], generate: {}, metric: evaluation/rogueL}", r"metric 'evaluation/rogueL' is not measured; .*Did you mean 'evaluation/rougeL'\?"),
        ("{metric: evaluation/bleu}", r"metric 'evaluation/bleu' is not measured; .*Add bleu to evaluation\.metrics and set evaluation\.generate"),
        ("{metric: evaluation/macro_f1}", "Add accuracy to evaluation.metrics$"),
        ("{metric: evaluation/loss, mode: max}", "mode max contradicts metric evaluation/loss, of which less is better"),
        ("{mode: max}", "mode belongs to evaluation.metric"),
        (f"{{metrics: [{OWN}], generate: {{}}, metric: evaluation/f1}}", "mode is needed for a metric of your own, evaluation/f1: set mode: max"),
        ("{early_stopping: {patience: 0}}", "evaluation.early_stopping.patience: found 0; expected a number of at least 1"),
        ("{early_stoping: {}}", "Did you mean 'early_stopping'"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_and_what_to_do(tmp_path, section, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, section)


def test_two_rules_of_stopping_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.early_stopping_patience is short for evaluation\.early_stopping"):
        read(tmp_path, "{early_stopping: {patience: 2}}", "train: {early_stopping_patience: 2}\n")


def test_better_is_known_of_our_metrics():
    assert {name for name, higher in KNOWN.items() if not higher} == {"loss", "perplexity"}
    assert set(KNOWN) == {"loss", "perplexity", "token_accuracy", *(name for names in MEASURED.values() for name in names)}
    sections = {"evaluation/loss": {}, "evaluation/rougeL": {"metrics": ["rouge"], "generate": {}}}
    assert [Validation.model_validate({"metric": name, **section}).higher_is_better for name, section in sections.items()] == [False, True]


def test_the_default_measures_what_is_cheap_and_chooses_nothing():
    default = Validation()
    assert (default.chosen_by, default.generate, default.metrics, default.test) == (None, None, [], True)


def test_a_chain_passes_the_section_through(tmp_path):
    file = tmp_path / "chain.yaml"
    file.write_text("name: c\nbase: ./base\nsft:\n  data: d.jsonl\n  evaluation: {metrics: [rouge], generate: {rows: 8}, metric: evaluation/rougeL}\n")
    assert load(file, "chain").sft.evaluation.generate.rows == 8
    file.write_text(file.read_text().replace("metric:", "metrc:").replace("  evaluation", "\n  evaluation"))
    with pytest.raises(UserError, match=r"chain\.yaml:6: sft\.evaluation\.metrc: unknown key.*Did you mean"):
        load(file, "chain")
