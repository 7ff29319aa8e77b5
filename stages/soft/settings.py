"""The peft config of a soft-prompt technique."""

from __future__ import annotations

from typing import Any

METHODS = ("prompt_tuning", "prefix_tuning", "p_tuning")


def peft_config(technique: Any, tokenizer_folder: str) -> Any:
    """What peft is given; `tokenizer_folder` holds the tokenizer that init_text is read with. `technique`: a `tune:` section of one of METHODS."""
    import peft

    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": technique.virtual_tokens}
    if technique.method == "prefix_tuning":
        return peft.PrefixTuningConfig(**shared, prefix_projection=technique.prefix_projection, encoder_hidden_size=technique.encoder_hidden_size)
    if technique.method == "p_tuning":
        lstm = {"encoder_num_layers": technique.encoder_layers, "encoder_dropout": technique.encoder_dropout} if technique.encoder == "lstm" else {}
        return peft.PromptEncoderConfig(**shared, **lstm, encoder_reparameterization_type=technique.encoder.upper(), encoder_hidden_size=technique.encoder_hidden_size)
    if technique.init_text is None:  # rows of the embeddings: drawn from a normal distribution they would be of another size than the model has ever seen
        return peft.PromptTuningConfig(**shared, prompt_tuning_init="SAMPLE_VOCAB")
    return peft.PromptTuningConfig(**shared, prompt_tuning_init="TEXT", prompt_tuning_init_text=technique.init_text, tokenizer_name_or_path=tokenizer_folder)
