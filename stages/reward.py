"""The reward model, from preference pairs: `accelerate launch … -m stages.reward --config FILE`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.training import entry

if TYPE_CHECKING:
    from configs.schema import RewardStage
    from stages.models import Origin

STAGE = "reward"
DEMONSTRATIONS = 1024  # at most; their mean score then has a standard error of 1/32 of their spread


def main(cfg: RewardStage) -> None:
    """Train a reward model (Bradley-Terry) on preference pairs and publish it as reward/NAME."""
    from trl import RewardConfig, RewardTrainer

    from stages import data, models
    from stages.nodes.once import once_per_node
    from stages.tokens import load_tokens
    from stages.training import build, measures, plan, publish, ranks, ready, resume, scoring, text
    from stages.tuning import adapters, possible, quantized
    from stages.zero import load

    origin = models.find(cfg.init_from, cfg.registry, stages=("sft", "dpo", "ppo", "reward"))
    ready.check(cfg, STAGE, origin)
    possible.check(cfg)
    load.announce(cfg.train)
    parent = ranks.from_rank_0("reading the parent", lambda: origin.parent("init_from"))
    tokens = load_tokens(origin, cfg.template)
    loaded = once_per_node("reading the data", lambda: data.read_pairs(cfg.data), node_0_first=True)
    splits = data.Splitter(cfg.split).split(loaded.rows)

    model = load_model(origin, cfg, tokens.pad_id)
    limit = text.fit(model, tokens, cfg)
    quantized.pack(model, cfg, bf16=models.uses_bf16(cfg.train.precision))
    parts = once_per_node("tokenising", lambda: {
        name: data.encode_pairs(tokens.formatter, getattr(splits, name), limit, cfg.overlong, may_be_empty=name != "train")
        for name in ("train", "validation", "test")
    })  # fmt: skip
    facts = text.data_facts(loaded, splits, {name: dropped for name, (_, dropped) in parts.items()})
    text.report_rows(facts, loaded.report.warnings)
    train, validation, _ = ([whole(pair, cfg.use_margin) for pair in pairs] for pairs, _ in parts.values())

    steps = plan.make_plan(cfg.train, len(train), ranks.world_size())
    trainer = build.build(
        STAGE, RewardTrainer, RewardConfig, measures.scored_pairs, cfg=cfg, plan=steps, train=build.in_order(train, steps, cfg.seed),
        validation=build.as_dataset(validation) if validation else None,
        # max_length None: TRL would drop longer pairs without a word; ours are within the limit, and the dropped ones counted.
        arguments={"max_length": None, "center_rewards_coefficient": cfg.center_coefficient or None},
        model=model, processing_class=tokens.tokenizer, peft_config=adapters.peft_config(cfg.technique, "SEQ_CLS", model),
    )  # fmt: skip
    resume.train(trainer, cfg, resume.identity(cfg, data=facts["parts"], tokenizer=tokens.key, parents=[publish.digest(parent)]))
    held_out = "test" if parts["test"][0] else "validation"
    metrics = scoring.quality(trainer, parts["train"][0], parts[held_out][0])
    demonstrations = demonstration_ids(cfg, tokens, splits, parts["train"][0], limit)
    publish.publish(
        trainer, cfg, STAGE, tokens, origin=origin, parents=[parent], eval_set=facts["parts"][held_out],
        info={
            "data": facts, "metrics": metrics,
            "stage_info": {"score_position": "last_token", "head": "score", "held_out": held_out, **scoring.scale(trainer, demonstrations)},
        },
    )  # fmt: skip
    resume.forget(build.output_folder(cfg, STAGE) / "resume")


def load_model(origin: Origin, cfg: RewardStage, pad_id: int) -> Any:
    """A classifier with one output: a new head on a policy's trunk, or the reward model that training goes on from."""
    from configs.schema import freezes_base
    from stages import models

    dtype = models.weights_dtype(cfg.train.precision, frozen=freezes_base(cfg))
    if origin.checkpoint is not None and origin.checkpoint.stage == STAGE:
        return models.load_scorer(origin, dtype=dtype, attn_implementation=cfg.attn_implementation)
    policy = models.load_policy(origin, dtype=dtype, attn_implementation=cfg.attn_implementation)
    return models.scorer_from_policy(policy, pad_id=pad_id, seed=cfg.seed)


def whole(pair: dict[str, Any], use_margin: bool) -> dict[str, Any]:
    """TRL's columns: prompt and completion as one row of ids, twice, and the margin."""
    row = {"chosen_ids": pair["prompt_ids"] + pair["chosen_ids"], "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"]}
    return row | ({"margin": pair["margin"]} if use_margin and "margin" in pair else {})


def demonstration_ids(cfg: RewardStage, tokens: Any, splits: Any, pairs: list[dict[str, Any]], limit: int) -> list[list[int]]:
    """Rows whose scores PPO centres by: the demonstrations' training part, else the chosen completions; evenly spread."""
    from stages import data
    from stages.nodes.once import once_per_node

    if cfg.demonstrations is None:
        rows = [pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs]
    else:
        sources = cfg.demonstrations
        loaded = once_per_node("reading the demonstrations", lambda: data.read_demonstrations(sources), node_0_first=True)
        demonstrations = data.Splitter(cfg.split).split(loaded.rows).train
        encoded, _ = once_per_node("tokenising the demonstrations", lambda: data.encode_demonstrations(tokens.formatter, demonstrations, limit))
        rows = [row["input_ids"] for row in encoded]
    count = min(len(rows), DEMONSTRATIONS)
    return [rows[index * len(rows) // count] for index in range(count)]


if __name__ == "__main__":
    entry.run(main, STAGE)
