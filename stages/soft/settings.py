"""The peft config of a soft-prompt technique."""

from __future__ import annotations

from typing import Any

from configs.schema import PrefixTuning, PromptTuning, PTuning


def peft_config(technique: PromptTuning | PrefixTuning | PTuning, tokenizer_folder: str) -> Any:
    """What peft is given; `tokenizer_folder` holds the tokenizer that init_text is read with."""
    import peft

    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": technique.virtual_tokens}
    if isinstance(technique, PrefixTuning):
        shared |= {"encoder_hidden_size": technique.encoder_hidden_size} if technique.encoder_hidden_size else {}
        return peft.PrefixTuningConfig(**shared, prefix_projection=technique.prefix_projection)
    if isinstance(technique, PTuning):
        shared |= {"encoder_hidden_size": technique.encoder_hidden_size} if technique.encoder_hidden_size else {}
        return peft.PromptEncoderConfig(
            **shared, encoder_reparameterization_type=technique.encoder.upper(), encoder_num_layers=technique.encoder_layers, encoder_dropout=technique.encoder_dropout
        )
    start: dict[str, Any] = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": technique.init_text, "tokenizer_name_or_path": tokenizer_folder} if technique.init_text else {}
    return peft.PromptTuningConfig(**shared, **start)
