"""Direct preference optimisation, from preference pairs: `accelerate launch … -m stages.dpo --config FILE`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from stages.training import entry

if TYPE_CHECKING:
    from configs.schema import DPOStage
    from stages.models import Origin

STAGE = "dpo"
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # the losses of TRL that read label_smoothing


def main(cfg: DPOStage) -> None:
    """Optimise a policy on preference pairs against a frozen reference and publish it as dpo/NAME."""
    from trl import DPOConfig, DPOTrainer

    from configs.schema import freezes_base
    from stages import data, models
    from stages.nodes.once import once_per_node
    from stages.tokens import load_tokens, refuse_other_tokens
    from stages.training import build, measures, plan, publish, ranks, ready, resume, text
    from stages.tuning import adapters, possible, quantized
    from stages.zero import load

    refuse_unread_smoothing(cfg)
    origin = models.find(cfg.init_from, cfg.registry, stages=("sft", "dpo", "ppo"))
    tied_to = models.find(cfg.reference, cfg.registry, stages=("sft", "dpo", "ppo")) if cfg.reference else origin
    ready.check(cfg, STAGE, origin, tied_to)
    possible.check(cfg)
    load.announce(cfg.train)
    parents = ranks.from_rank_0("reading the parents", lambda: [origin.parent("init_from"), tied_to.parent("reference")])
    tokens = load_tokens(origin, cfg.template)
    refuse_other_tokens(tokens, tied_to, cfg)
    loaded = once_per_node("reading the data", lambda: data.read_pairs(cfg.data), node_0_first=True)
    splits = data.Splitter(cfg.split).split(loaded.rows)

    dtype = models.weights_dtype(cfg.train.precision, frozen=freezes_base(cfg))
    policy = models.load_policy(origin, dtype=dtype, attn_implementation=cfg.attn_implementation)
    limit = text.fit(policy, tokens, cfg)
    quantized.pack(policy, cfg, bf16=models.uses_bf16(cfg.train.precision))
    reference = load_reference(policy, tied_to, cfg, shared=freezes_base(cfg) and tied_to.identity == origin.identity)
    (train, too_long), (validation, too_long_v) = once_per_node("tokenising", lambda: [
        data.encode_pairs(tokens.formatter, rows, limit, cfg.overlong, may_be_empty=rows is not splits.train) for rows in (splits.train, splits.validation)
    ])  # fmt: skip
    facts = text.data_facts(loaded, splits, {"train": too_long, "validation": too_long_v})
    text.report_rows(facts, loaded.report.warnings)

    steps = plan.make_plan(cfg.train, len(train), ranks.world_size())
    trainer = build.build(
        STAGE, DPOTrainer, DPOConfig, measures.preferred_pairs, cfg=cfg, plan=steps, train=build.in_order(ids(train), steps, cfg.seed),
        validation=build.as_dataset(ids(validation)) if validation else None,
        # DPOTrainer always tokenises what its constructor is given, and with its own rules; it trains on our ids because they
        # replace one placeholder row afterwards, through the Trainer's public attributes.
        placeholder=build.as_dataset([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        arguments={"max_length": None, "beta": cfg.beta, "loss_type": [cfg.loss_type], "label_smoothing": cfg.label_smoothing} | measures.dpo_batches(cfg),
        model=policy, ref_model=reference, processing_class=tokens.tokenizer,
        peft_config=adapters.peft_config(cfg.technique, "CAUSAL_LM", policy),
    )  # fmt: skip
    digests = [publish.digest(parent) for parent in parents]
    resume.train(trainer, cfg, resume.identity(cfg, data=facts["parts"], tokenizer=tokens.key, parents=digests))
    metrics = build.final_metrics(trainer, measures.preferred_pairs)
    publish.publish(
        trainer, cfg, STAGE, tokens, origin=origin, parents=parents, eval_set=facts["parts"]["validation"],
        info={"data": facts, "metrics": metrics, "stage_info": {"reference": tied_to.asked, "beta": cfg.beta}},
    )  # fmt: skip
    resume.forget(build.output_folder(cfg, STAGE) / "resume")


def load_reference(policy: Any, tied_to: Origin, cfg: DPOStage, *, shared: bool) -> Any:
    """The frozen model; None where it is the policy's own base with the adapter switched off. In the policy's dtype, so that
    both give the same log-probs at the start."""
    from stages import models
    from stages.zero import gather

    if shared:
        return None
    reference = models.load_policy(tied_to, dtype=policy.dtype, attn_implementation=cfg.attn_implementation)
    models.resize_to(reference, gather.shape(policy.get_input_embeddings().weight)[0])
    return reference.requires_grad_(False)


def ids(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns that DPO reads."""
    return [{key: pair[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs]


def refuse_unread_smoothing(cfg: DPOStage) -> None:
    """Raise where label_smoothing is set for a loss that would not read it."""
    if cfg.label_smoothing and cfg.loss_type not in SMOOTHED:
        raise UserError(f"label_smoothing {cfg.label_smoothing} is not used by loss_type {cfg.loss_type}; use loss_type: robust, or leave it out")


if __name__ == "__main__":
    entry.run(main, STAGE)
