"""An adapter that is trained on: the same one, over the base that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import SFTStage, lora_of
from stages import foreign, models, soft
from stages.soft import training as prompts
from stages.soft.settings import METHODS
from stages.zero import gather, machine


def underneath(cfg: SFTStage, origin: models.Origin) -> models.Origin:
    """What a run loads as whole weights: the base of the adapter that it trains on, else what it starts from.

    Raises:
        UserError: the base has changed or is gone, or what lies under a soft prompt is to be trained on and the prompt too.
    """
    if cfg.continued is not None and cfg.continued.adapter == "same" and soft.is_prompt(origin) and cfg.technique.method not in METHODS:
        raise UserError(f"{origin.asked} has a soft prompt in front, which stays as it is while what lies under it is trained on: set continued.adapter: merged; or train the prompt on: tune: prompt_tuning or prefix_tuning, as it is one")
    if cfg.continued is None or cfg.continued.adapter != "same" or not models.is_adapter(origin):
        return origin
    return models.adapter_base(origin)


def trained_on(model: Any, origin: models.Origin, cfg: SFTStage) -> Any:
    """The adapter of `origin` on its base `model`, trainable: a PeftModel. Embeddings grow to what it was trained with.

    Raises:
        UserError: an adapter that peft can't train on, or a config that would have it begin otherwise than it is.
    """
    from peft import PeftModel

    if soft.is_prompt(origin):
        models.resize_to(model, models.adapter_vocabulary(origin))
        return prompts.trained_on(model, origin, cfg)
    lora = lora_of(cfg)
    if lora is not None and lora.changes_base:
        raise UserError(f"lora.init {lora.init} takes an adapter's start out of the base, and the adapter of {origin.asked} has its values: set init: default, or continued.adapter: merged")
    foreign.check_folder(Path(origin.folder))
    models.resize_to(model, models.adapter_vocabulary(origin))
    try:
        with gather.whole(model.get_input_embeddings().parameters(), changed=True):
            # as TRL does for a new adapter: ZeRO-3 takes one dtype for all, and keeps float32 itself
            return PeftModel.from_pretrained(model, origin.folder, is_trainable=True, autocast_adapter_dtype=machine.zero_stage() != 3)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{origin.asked}: its adapter can't be trained on ({str(error).splitlines()[0]}); merge it and train a new one: --merge (continued.adapter: merged)") from error
