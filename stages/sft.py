"""Supervised fine-tuning on demonstrations: `accelerate launch … -m stages.sft --config FILE`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.training import entry
from stages.training.labels import labelled

if TYPE_CHECKING:
    from configs.schema import SFTStage

STAGE = "sft"


def main(cfg: SFTStage, instead: Callable[[Any], None] | None = None) -> None:
    """Fine-tune a model on demonstrations and publish it as sft/NAME; `instead` is called with the trainer in place of all that."""
    from trl import SFTConfig, SFTTrainer

    from configs.schema import freezes_base
    from stages import data, models, soft
    from stages.continuing import report, same
    from stages.dropout import with_dropout
    from stages.loss.trainer import trainer_class
    from stages.nodes.once import once_per_node
    from stages.soft import training as prompts
    from stages.tokens import load_tokens
    from stages.training import build, measures, publish, ranks, ready, rehearsal, resume, text, watching
    from stages.tuning import adapters, possible, quantized
    from stages.validation import held_out, outcome
    from stages.zero import load

    origin = models.find(cfg.init_from, cfg.registry, stages=("sft", "dpo", "ppo"))
    ready.check(cfg, STAGE, origin)
    possible.check(cfg)
    load.announce(cfg.train)
    parent = ranks.from_rank_0("reading the parent", lambda: origin.parent("init_from"))
    tokens = load_tokens(origin, cfg.template)
    loaded = once_per_node("reading the data", lambda: data.read_demonstrations(cfg.data), node_0_first=True)
    splits = data.Splitter(cfg.split).split(loaded.rows)

    under = same.underneath(cfg, origin)
    dtype = models.weights_dtype(cfg.train.precision, frozen=freezes_base(cfg))
    model = models.load_policy(under, dtype=dtype, attn_implementation=cfg.attn_implementation)
    limit = text.fit(model, tokens, cfg)
    if cfg.train.dropout:
        with_dropout(model, cfg.train.dropout)
    quantized.pack(model, cfg, bf16=models.uses_bf16(cfg.train.precision))
    model = prompts.start(model, cfg, origin.folder) if under is origin else same.trained_on(model, origin, cfg)
    limit = min(limit, soft.room(model) or limit)
    (train, too_long), (validation, too_long_v), (test, _) = once_per_node("tokenising", lambda: [
        data.encode_demonstrations(tokens.formatter, rows, limit, cfg.overlong, cfg.loss_on, may_be_empty=rows is not splits.train)
        for rows in (splits.train, splits.validation, splits.test if cfg.evaluation.test else [])
    ])  # fmt: skip
    general = rehearsal.load(cfg, tokens, limit)
    facts = text.data_facts(loaded, splits, {"train": too_long, "validation": too_long_v}, general.facts)
    text.report_rows(facts, loaded.report.warnings)
    compared = report.prepare(cfg, tokens, splits, limit, soft.room(model))
    data.prove_loss_mask(tokens.formatter, train)
    covered, every = (sum(len(row["input_ids"]) if key is None else sum(row[key]) for row in train) for key in ("completion_mask", None))
    ranks.say(f"the loss covers {covered} of {every} tokens (align data show prints which; texts stay out of logs)")

    rows, collator = packed(model, train, limit, tokens.pad_id) if cfg.packing else ([labelled(row) for row in train], None)
    every_row = general.after(rows, packed=cfg.packing)
    steps = planned(cfg, len(rows), every_row, general.share)
    chunked = trainer_class(SFTTrainer, model, cfg.train, train[0]["input_ids"])
    further = held_out.prepare(cfg, tokens, splits, model, limit=limit, eval_every=steps.eval_every)
    trainer = build.build(
        STAGE, rehearsal.mixing(chunked, general, cfg.train.label_smoothing), SFTConfig, measures.tokens, cfg=cfg, plan=steps, train=build.in_order(every_row, steps, cfg.seed),
        validation=build.as_dataset([labelled(row) for row in validation]) if validation else None,
        # The rows are tokenised and labelled: TRL must not prepare, truncate or pack them again.
        arguments={"max_length": None, "packing": False, "padding_free": cfg.packing and collator is None, "dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False},
        watch=watching.watcher(cfg, tokens, limit, steps, splits, too_long),
        further=further, model=model, data_collator=collator, processing_class=tokens.tokenizer,
        peft_config=adapters.peft_config(cfg.technique, "CAUSAL_LM", model) if under is origin else None,
    )  # fmt: skip
    if instead is not None:
        return instead(trainer)
    report.measure_before(compared, trainer, cfg, tokens)
    resume.train(trainer, cfg, resume.identity(cfg, data=facts["parts"], tokenizer=tokens.key, parents=[publish.digest(parent)]))
    found = outcome.outcome(trainer, further, [labelled(row) for row in test], measures.tokens, cfg, parts=facts["parts"], parents=[publish.digest(parent)])
    info = {"data": facts, **found.info, "stage_info": watching.outcome(trainer), **report.finish(compared, trainer, cfg, tokens)}
    publish.publish(trainer, cfg, STAGE, tokens, origin=under, parents=[parent], eval_set=None, evaluations=found.evaluations, info=info)
    resume.forget(build.output_folder(cfg, STAGE) / "resume")


def planned(cfg: SFTStage, rows: int, every_row: list[dict[str, Any]], share: float) -> Any:
    """The run's optimizer steps over `rows` rows of the task and the general ones after them; says how much of its batches is padding."""
    from stages.training import build, plan, ranks, text

    lengths = build.lengths_of(every_row)
    grouped = lengths[:rows] if cfg.train.group_by_length else None
    steps = plan.make_plan(cfg.train, rows, ranks.world_size(), general_rows=len(every_row) - rows, share=share, lengths=grouped, chooses=cfg.evaluation.asks)
    text.report_padding(lengths, steps, cfg.seed, cfg.train.micro_batch_size)
    return steps


def packed(model: Any, rows: list[dict[str, Any]], max_length: int, pad_id: int) -> tuple[list[dict[str, Any]], Any]:
    """Several rows per sequence of at most `max_length` tokens (best fit), where this model keeps them apart; and what makes batches of them.

    Raises:
        UserError: the rows would see one another.
    """
    from stages.training import packing
    from stages.training.ranks import say

    labels = [labelled(row) for row in rows]
    way = packing.isolation(model, labels)
    sequences = packing.pack_rows(labels, max_length)
    say(f"packing: {len(rows)} rows in {len(sequences)} sequences of at most {max_length} tokens; train.batch_size counts sequences")
    return sequences, packing.collator(way, model, pad_id)


if __name__ == "__main__":
    entry.run(main, STAGE)
