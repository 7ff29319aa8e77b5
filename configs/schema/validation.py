"""Schema of what an SFT run measures on held-out rows, what it stops and chooses by, and its final test."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, model_validator

from configs.schema.common import PositiveInt, Strict

MetricName = Literal["exact_match", "accuracy", "bleu", "chrf", "rouge"]
PREFIX = "evaluation/"
HIGHER, LOWER = True, False
# What an entry of `metrics` measures, and whether higher is better; the names stand after evaluation/.
ALWAYS = {"loss": LOWER, "perplexity": LOWER, "token_accuracy": HIGHER}
MEASURED: dict[str, dict[str, bool]] = {
    "exact_match": {"exact_match": HIGHER}, "accuracy": {"accuracy": HIGHER, "macro_f1": HIGHER}, "bleu": {"bleu": HIGHER}, "chrf": {"chrf": HIGHER},
    "rouge": {"rouge1": HIGHER, "rouge2": HIGHER, "rougeL": HIGHER},
}  # fmt: skip
KNOWN = ALWAYS | {name: better for names in MEASURED.values() for name, better in names.items()}
WITHOUT_COMPLETIONS = "accuracy"  # the metric that needs no generated text: labels are told apart by their likelihood


class PythonMetric(Strict):
    """Your own function, f(prompts, completions, references, **columns) -> float or dict[str, float]."""

    kind: Literal["python"]
    function: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:function; a float is evaluation/NAME, each key of a dict evaluation/KEY.")
    name: str | None = Field(default=None, pattern=r"^[A-Za-z][\w.@-]*$", description="NAME in evaluation/NAME; null is the function's.")

    @property
    def title(self) -> str:
        """What a single number of it is called, after evaluation/."""
        return self.name or self.function.rpartition(":")[2]


class Generate(Strict):
    """Completions of a fixed subset of the validation rows, written greedily, to be compared with the rows' own."""

    rows: PositiveInt = Field(default=64, description="Validation rows: the same at every evaluation and on any number of processes, drawn by the run's seed.")
    max_new_tokens: PositiveInt = Field(default=128, description="Tokens of the longest completion.")
    every: PositiveInt = Field(default=1, description="Evaluations from one that generates to the next; the last one always does.")
    batch_size: PositiveInt = Field(default=16, description="Rows of one process per generation batch; the results do not depend on it. Under ZeRO-3 every process holds the whole model meanwhile.")


class EarlyStopping(Strict):
    """When a run ends before its last step: worked out from its evaluations, so that a resumed run decides the same."""

    patience: PositiveInt = Field(default=3, description="Stop after this many evaluations (of those that measure the metric) without an improvement.")
    min_improvement: float = Field(default=0.0, ge=0, description="What counts as one: a better value by more than this, in units of the metric, than the last that counted.")


class Validation(Strict):
    """What an SFT run measures on held-out rows. Loss, perplexity and token accuracy over all validation rows are always measured."""

    metrics: list[MetricName | PythonMetric] = Field(
        default_factory=list,
        description="Further metrics: exact_match, bleu, chrf, rouge (1, 2, L) and {kind: python, function: module:function} compare generated completions with the rows' own; "
        "accuracy (and macro_f1) is of labels, over all validation rows, each told by its likelihood.",
    )  # fmt: skip
    labels: list[str] | None = Field(default=None, min_length=2, description="Labels of `accuracy`; null takes the distinct completions of the training rows.")
    generate: Generate | None = Field(default=None, description="Generation at evaluations; null generates nothing.")
    metric: str | None = Field(default=None, description="What the published state is chosen by, such as evaluation/rougeL; null publishes the last one, or with early stopping the one of least loss.")
    mode: Literal["max", "min"] | None = Field(default=None, description="Whether more of `metric` is better; null knows it of our own metrics.")
    early_stopping: EarlyStopping | None = Field(default=None, description="Stop when `metric` no longer improves (null: evaluation/loss), and publish the best state; the last one is kept to go on from (keep_resume).")
    test: bool = Field(
        default=True, description="After training, measure the state to be published once on the split's test part, as test/…: never to choose by. Generates where `generate` is on, on as many rows.",
    )  # fmt: skip

    @property
    def chosen_by(self) -> str | None:
        """The metric that the published state is chosen by, if it is chosen."""
        return self.metric or (PREFIX + "loss" if self.early_stopping else None)

    @property
    def asks(self) -> str | None:
        """The setting that asks for that, for messages."""
        return "evaluation.metric" if self.metric else "evaluation.early_stopping" if self.early_stopping else None

    @property
    def higher_is_better(self) -> bool:
        """Whether more of `chosen_by` is better."""
        return self.mode == "max" if self.mode else KNOWN[(self.chosen_by or PREFIX + "loss").removeprefix(PREFIX)]

    @property
    def own(self) -> list[PythonMetric]:
        """The metrics of the user."""
        return [metric for metric in self.metrics if isinstance(metric, PythonMetric)]

    @property
    def compared(self) -> list[str]:
        """What needs completions, by name."""
        return [metric if isinstance(metric, str) else metric.title for metric in self.metrics if metric != WITHOUT_COMPLETIONS]

    @model_validator(mode="after")
    def _can_be_measured(self) -> Validation:
        if self.compared and self.generate is None:
            raise ValueError(f"metrics: {', '.join(self.compared)} compare completions, and evaluation.generate is off; set evaluation.generate: {{rows: 64}}, or leave them out")
        if self.generate is not None and not self.compared:
            raise ValueError("generate: nothing compares what would be generated; name exact_match, bleu, chrf, rouge or a python function under evaluation.metrics")
        names = [metric if isinstance(metric, str) else metric.title for metric in self.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"metrics: {', '.join(twice)} is there twice; give one of them another `name`, or leave it out")
        if self.labels is not None and WITHOUT_COMPLETIONS not in self.metrics:
            raise ValueError("labels are those of the metric accuracy, which evaluation.metrics does not name; add it, or leave labels out")
        return self

    @model_validator(mode="after")
    def _metric_is_measured(self) -> Validation:
        if self.metric is None:
            if self.mode is not None:
                raise ValueError("mode belongs to evaluation.metric, which is not set; name the metric, or leave mode out")
            return self
        bare = self.metric.removeprefix(PREFIX)
        there = [*ALWAYS, *(name for metric in self.metrics if isinstance(metric, str) for name in MEASURED[metric])]
        if not self.metric.startswith(PREFIX) or (bare not in there and not self.own):
            options = ", ".join(PREFIX + name for name in there)
            raise ValueError(f"metric {self.metric!r} is not measured; expected one of {options}{self._hint(bare, there)}")
        if bare in there and self.mode is not None and (self.mode == "max") is not KNOWN[bare]:
            raise ValueError(f"mode {self.mode} contradicts metric {self.metric}, of which {'more' if KNOWN[bare] else 'less'} is better; leave mode out")
        if bare not in there and self.mode is None:
            raise ValueError(f"mode is needed for a metric of your own, {self.metric}: set mode: max where more is better, else mode: min")
        return self

    def _hint(self, bare: str, there: list[str]) -> str:
        section = next((name for name, measured in MEASURED.items() if bare in (name, *measured)), None)
        if section is not None and not set(MEASURED[section]) & set(there):
            return f". Add {section} to evaluation.metrics" + ("" if section == WITHOUT_COMPLETIONS or self.generate else " and set evaluation.generate")
        close = difflib.get_close_matches(bare, there, n=1, cutoff=0.5)
        return f". Did you mean {PREFIX + close[0]!r}?" if close else ""
